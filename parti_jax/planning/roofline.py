"""Estimates the minimum time of a step from its computation, memory traffic and communication.

Model of the network: chips form a torus. A collective runs simultaneously along each torus
dimension that its devices extend over, and in both directions if the dimension closes to a ring.
Devices that aren't neighbors share their links with the devices between them. Between slices, a
collective runs over each chip's share of the data-center network. A chip's devices share its links
and its part of that network. Collectives run one after another. The model ignores latency and the
time of arithmetic outside the matrix units.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from parti_jax.planning import chips
from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import replica_groups

MODEL = (
  'network: each collective uses all torus dimensions that its devices extend over, both '
  'ways round where they close; collectives take turns; no latency'
)
_MAX_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
  """Collectives of one kind along the same mesh axes.

  Attributes:
    kind: kind of collective, such as 'all-gather'.
    axes: mesh axes along which the devices of a group differ.
    count: number of collectives per step.
    bytes_sent: bytes that a device sends per step, along rings.
    seconds: seconds per step; None without published constants of the network.
    dcn: whether the groups extend over several slices.
  """

  kind: str
  axes: tuple[str, ...]
  count: float
  bytes_sent: float
  seconds: float | None
  dcn: bool


@dataclasses.dataclass(frozen=True)
class Times:
  """Minimum seconds of a step.

  Attributes:
    compute: seconds of the matrix units.
    hbm: seconds of the main memory.
    interconnect: seconds of the network within and between slices.
  """

  compute: float
  hbm: float
  interconnect: float

  @property
  def bound(self) -> str:
    """The name of the longest of the three."""
    return max(('compute', 'hbm', 'interconnect'), key=lambda name: getattr(self, name))

  @property
  def longest(self) -> float:
    """Seconds if all three overlap completely."""
    return max(self.compute, self.hbm, self.interconnect)

  @property
  def sum(self) -> float:
    """Seconds if none overlap."""
    return self.compute + self.hbm + self.interconnect


class Network:
  """The network between the devices of a mesh.

  Args:
    mesh: a jax.sharding.Mesh over TPU devices.
    chip: constants of its chips.
  """

  def __init__(self, mesh, chip: chips.Chip):
    self._chip = chip
    devices = list(mesh.devices.flat)
    self._slices = np.array([getattr(device, 'slice_index', None) or 0 for device in devices])
    self._coordinates = np.array([device.coords for device in devices])
    self._sizes = self._coordinates.max(axis=0) + 1
    # Slices of 3-dimensional tori close if they are made of whole cubes, others by dimension.
    rings = self._sizes % chip.closes_at == 0
    self._rings = rings if chip.torus_dimensions == 2 else np.full(len(rings), rings.all())
    self._known: dict[tuple, tuple[float, bool]] = {}

  def seconds(self, collective: hlo_cost.Collective) -> tuple[float, bool]:
    """Returns the seconds of one execution of a collective, and whether it crosses slices."""
    key = (collective.kind, collective.whole, collective.groups.shape, collective.groups.tobytes())
    if key not in self._known:
      rows = collective.groups
      if collective.kind != 'collective-permute':
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_GROUPS), dtype=int)]
      found = [self._group_seconds(collective, row) for row in rows]
      self._known[key] = max(found)
    return self._known[key]

  def _group_seconds(self, collective, row) -> tuple[float, bool]:
    slices = len(set(self._slices[row]))
    within = row[self._slices[row] == self._slices[row[0]]]
    if slices == 1:
      return self._torus_seconds(collective, collective.whole, within), False
    dcn_bandwidth = self._chip.dcn_bandwidth / self._chip.devices
    if collective.kind == 'collective-permute':
      return collective.whole / dcn_bandwidth, True
    # Within slices first, so that each chip sends only its part over the slower network.
    part = collective.whole / len(within)
    times = 2 if collective.kind == 'all-reduce' else 1
    across = times * part * (slices - 1) / slices / dcn_bandwidth
    inside = self._torus_seconds(collective, collective.whole, within) if len(within) > 1 else 0.0
    return inside + across, True

  def _torus_seconds(self, collective, whole: float, group) -> float:
    dimensions = self._dimensions(group)
    if not dimensions:
      return 0.0  # The devices are on one chip.
    chips_in_group = len({tuple(position) for position in self._coordinates[group]})
    # Other groups use the same links for the devices of these chips that aren't in this group.
    whole = whole * self._chip.devices / (len(group) / chips_in_group)
    if collective.kind == 'collective-permute':
      return whole * max(distance for _, _, distance in dimensions) / self._chip.link_bandwidth
    if collective.kind in ('all-to-all', 'ragged-all-to-all'):
      # The traffic across the middle of the longest dimension.
      size, closed, distance = max(dimensions)
      return whole * size / (8 if closed else 4) * distance / self._chip.link_bandwidth
    ways = sum((2 if closed else 1) / distance for _, closed, distance in dimensions)
    times = 2 if collective.kind == 'all-reduce' else 1
    part = whole * (chips_in_group - 1) / chips_in_group
    return times * part / (ways * self._chip.link_bandwidth)

  def _dimensions(self, group) -> list[tuple[int, bool, int]]:
    """Returns (positions, whether they close, links between) for each dimension of a group."""
    found = []
    for dimension, size in enumerate(self._sizes):
      positions = np.unique(self._coordinates[group][:, dimension])
      if len(positions) < 2:
        continue
      ring = self._rings[dimension]
      gaps = np.diff(positions)
      last = size - positions[-1] + positions[0]
      if collective_closes := ring and (len(positions) > 2) and last <= gaps.max():
        gaps = np.append(gaps, last)
      elif ring and len(positions) == 2:
        gaps = np.array([min(gaps[0], last)])
      found.append((len(positions), bool(collective_closes), int(gaps.max())))
    return found


def slice_groups(mesh) -> np.ndarray:
  """Returns the mesh indices of corresponding devices in all slices: int [slice devices, slices]."""
  indices: dict[tuple, list[int]] = {}
  for index, device in enumerate(mesh.devices.flat):
    key = (*device.coords, getattr(device, 'core_on_chip', 0))
    indices.setdefault(key, []).append(index)
  return np.array(list(indices.values()))


def summarize(collectives, mesh, chip: chips.Chip | None) -> list[CollectiveSum]:
  """Sums collectives by kind and mesh axes; those that take longest come first."""
  network = Network(mesh, chip) if chip else None
  sums: dict[tuple, list] = {}
  for collective in collectives:
    axes = replica_groups.axes(collective.groups, dict(mesh.shape))
    seconds, dcn = network.seconds(collective) if network else (0.0, False)
    entry = sums.setdefault((collective.kind, axes, dcn), [0.0, 0.0, 0.0])
    for index, value in enumerate((1, collective.sent, seconds)):
      entry[index] += collective.count * value
  found = [
    CollectiveSum(kind, axes, count, sent, seconds if network else None, dcn)
    for (kind, axes, dcn), (count, sent, seconds) in sums.items()
  ]
  return sorted(found, key=lambda entry: (-(entry.seconds or 0), -entry.bytes_sent))


def times(costs: hlo_cost.Costs, sums: list[CollectiveSum], chip: chips.Chip) -> Times:
  """Returns the roofline of a step."""
  return Times(
    costs.flops * chip.devices / chip.peak_flops,
    costs.hbm_bytes * chip.devices / chip.hbm_bandwidth,
    sum(entry.seconds or 0.0 for entry in sums),
  )


def mfu(model_flops: float, seconds: float, chip: chips.Chip, chip_count: int) -> float:
  """Returns the model FLOPs utilization of a step of `seconds` (PaLM, appendix B)."""
  return model_flops / (seconds * chip.peak_flops * chip_count)

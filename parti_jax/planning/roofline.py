"""The least time that a step can take, by what it computes, reads and writes, and sends.

The model of the network: chips form a torus. A collective runs at once along every dimension of
the torus that its devices extend over, in both directions where the dimension closes to a ring;
devices that are not neighbours share their links with those between them. Between slices it runs
over each chip's share of the data-centre network. A chip's devices share its links and its part of
that network. Collectives take turns. Latency is left out, and
so is all time that arithmetic outside of the matrix units takes.
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
_GROUPS_LOOKED_AT = 8


@dataclasses.dataclass(frozen=True)
class CollectiveSum:
  """Collectives of one kind along the same mesh axes.

  Attributes:
    kind: such as 'all-gather'.
    axes: mesh axes that the devices of a group differ in.
    count: how many a step runs.
    bytes_sent: by a device in a step, along rings.
    seconds: in a step; None where nothing is published of the network.
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
  """Least seconds of a step; None where nothing is published of the chip.

  Attributes:
    compute: of the matrix units.
    hbm: of the main memory.
    interconnect: of the network within slices and between them.
  """

  compute: float
  hbm: float
  interconnect: float

  @property
  def bound(self) -> str:
    """The name of the longest."""
    return max(('compute', 'hbm', 'interconnect'), key=lambda name: getattr(self, name))

  @property
  def longest(self) -> float:
    """Seconds if all three overlap wholly."""
    return max(self.compute, self.hbm, self.interconnect)

  @property
  def sum(self) -> float:
    """Seconds if none overlap."""
    return self.compute + self.hbm + self.interconnect


class Network:
  """The network between the devices of a mesh.

  Args:
    mesh: a jax.sharding.Mesh over TPU devices.
    chip: its chips' constants.
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
    """Seconds of one turn of a collective, and whether it crosses slices."""
    key = (collective.kind, collective.whole, collective.groups.shape, collective.groups.tobytes())
    if key not in self._known:
      rows = collective.groups
      if collective.kind != 'collective-permute':
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), _GROUPS_LOOKED_AT), dtype=int)]
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
    # Within slices first, so that every chip sends only its part over the slower network.
    part = collective.whole / len(within)
    times = 2 if collective.kind == 'all-reduce' else 1
    across = times * part * (slices - 1) / slices / dcn_bandwidth
    inside = self._torus_seconds(collective, collective.whole, within) if len(within) > 1 else 0.0
    return inside + across, True

  def _torus_seconds(self, collective, whole: float, group) -> float:
    dimensions = self._dimensions(group)
    if not dimensions:
      return 0.0  # The devices are on one chip.
    chips_in_group = len({tuple(place) for place in self._coordinates[group]})
    # As many groups as this one leaves devices of its chips to use the same links.
    whole = whole * self._chip.devices / (len(group) / chips_in_group)
    if collective.kind == 'collective-permute':
      return whole * max(distance for _, _, distance in dimensions) / self._chip.link_bandwidth
    if collective.kind in ('all-to-all', 'ragged-all-to-all'):
      # What crosses the middle of the longest dimension.
      size, closed, distance = max(dimensions)
      return whole * size / (8 if closed else 4) * distance / self._chip.link_bandwidth
    ways = sum((2 if closed else 1) / distance for _, closed, distance in dimensions)
    times = 2 if collective.kind == 'all-reduce' else 1
    part = whole * (chips_in_group - 1) / chips_in_group
    return times * part / (ways * self._chip.link_bandwidth)

  def _dimensions(self, group) -> list[tuple[int, bool, int]]:
    """Dimensions a group extends over: places in it, whether they close, links between them."""
    found = []
    for dimension, size in enumerate(self._sizes):
      places = np.unique(self._coordinates[group][:, dimension])
      if len(places) < 2:
        continue
      ring = self._rings[dimension]
      gaps = np.diff(places)
      last = size - places[-1] + places[0]
      if collective_closes := ring and (len(places) > 2) and last <= gaps.max():
        gaps = np.append(gaps, last)
      elif ring and len(places) == 2:
        gaps = np.array([min(gaps[0], last)])
      found.append((len(places), bool(collective_closes), int(gaps.max())))
    return found


def slice_groups(mesh) -> np.ndarray:
  """Places in a mesh of the devices that stand for each other: int [devices of a slice, slices]."""
  places: dict[tuple, list[int]] = {}
  for place, device in enumerate(mesh.devices.flat):
    key = (*device.coords, getattr(device, 'core_on_chip', 0))
    places.setdefault(key, []).append(place)
  return np.array(list(places.values()))


def summarize(collectives, mesh, chip: chips.Chip | None) -> list[CollectiveSum]:
  """Collectives by kind and mesh axes, those that take longest first."""
  network = Network(mesh, chip) if chip else None
  sums: dict[tuple, list] = {}
  for collective in collectives:
    axes = replica_groups.axes(collective.groups, dict(mesh.shape))
    seconds, dcn = network.seconds(collective) if network else (0.0, False)
    entry = sums.setdefault((collective.kind, axes, dcn), [0.0, 0.0, 0.0])
    for place, value in enumerate((1, collective.sent, seconds)):
      entry[place] += collective.count * value
  found = [
    CollectiveSum(kind, axes, count, sent, seconds if network else None, dcn)
    for (kind, axes, dcn), (count, sent, seconds) in sums.items()
  ]
  return sorted(found, key=lambda entry: (-(entry.seconds or 0), -entry.bytes_sent))


def times(costs: hlo_cost.Costs, sums: list[CollectiveSum], chip: chips.Chip) -> Times:
  """The roofline of a step."""
  return Times(
    costs.flops * chip.devices / chip.peak_flops,
    costs.hbm_bytes * chip.devices / chip.hbm_bandwidth,
    sum(entry.seconds for entry in sums),
  )


def mfu(model_flops: float, seconds: float, chip: chips.Chip, chip_count: int) -> float:
  """Model FLOPs utilisation of a step of that many seconds (PaLM, appendix B)."""
  return model_flops / (seconds * chip.peak_flops * chip_count)

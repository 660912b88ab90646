"""Makes devices of a topology that this machine doesn't have, only for compiling."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from parti_jax.core import errors
from parti_jax.core import native_notes
from parti_jax.core import optional_packages
from parti_jax.planning import chips

_FORM = re.compile(r'(?:(\d+)x(?=[a-z]))?([a-z]+\d*[a-z]*):(\d+(?:x\d+)*)')
_EXAMPLES = 'v4:8x8x8, v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4, 2xv5p:8x8x8 or cpu:8'

# On these chips the two TensorCores form one device; on tpu7x they are two devices.
_MEGACORE = ('v4', 'v5p')

# Keeps libtpu from looking for a metadata server and for other processes that use local chips.
_NO_MACHINE = {
  'TPU_SKIP_MDS_QUERY': '1',
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  'TPU_MIN_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
  'TPU_STDERR_LOG_LEVEL': '3',
}


@dataclasses.dataclass(frozen=True)
class Topology:
  """A requested topology.

  Attributes:
    name: name of the topology, such as '2xv5p:8x8x8'.
    kind: kind of chip, a key of `chips.CHIPS`, or 'cpu'.
    dims: chips along each dimension of a slice; the number of devices for 'cpu'.
    slices: number of slices, which the data-center network connects.
  """

  name: str
  kind: str
  dims: tuple[int, ...]
  slices: int = 1

  @property
  def chip(self) -> chips.Chip | None:
    """The chip's constants; None for 'cpu', which has no published constants."""
    return chips.CHIPS.get(self.kind)

  @property
  def chip_count(self) -> int:
    return self.slices * math.prod(self.dims)

  def devices(self) -> list[jax.Device]:
    """Returns devices for a mesh; only CPU devices can run programs.

    Raises:
      UserError: if libtpu is missing, or doesn't know the topology.
    """
    return _cpu_devices(self) if self.kind == 'cpu' else _tpu_devices(self)


def parse(name: str) -> Topology:
  """Parses a topology's name: `KIND:SIZES`, with the prefix `Nx` for N slices.

  Raises:
    UserError: if the form, the kind or the number of dimensions is invalid.
  """
  match = _FORM.fullmatch(name)
  if not match:
    raise errors.UserError(f'--topology={name}: not a topology; examples are {_EXAMPLES}')
  slices, kind, sizes = match.groups()
  dims = tuple(map(int, sizes.split('x')))
  topology = Topology(name, kind, dims, int(slices or 1))
  if kind != 'cpu' and kind not in chips.CHIPS:
    raise errors.UserError(
      f'--topology={name}: unknown chip {kind!r}; choose from {", ".join(chips.CHIPS)} and cpu'
    )
  expected = 1 if kind == 'cpu' else chips.CHIPS[kind].torus_dimensions
  if len(dims) != expected or min(dims) < 1 or topology.slices < 1:
    form = 'x'.join('ABC'[:expected]) if kind != 'cpu' else 'N'
    raise errors.UserError(
      f'--topology={name}: {kind} needs {expected} sizes of at least 1, {kind}:{form}'
    )
  if kind == 'cpu' and topology.slices > 1:
    raise errors.UserError(f'--topology={name}: cpu has no slices')
  return topology


def _cpu_devices(topology: Topology) -> list[jax.Device]:
  count = topology.dims[0]
  if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    with contextlib.suppress(RuntimeError):  # The backend is already initialized.
      jax.config.update('jax_num_cpu_devices', count)
  devices = jax.devices('cpu')
  if len(devices) < count:
    raise errors.UserError(
      f'--topology={topology.name}: only {len(devices)} CPU devices exist; '
      f'set XLA_FLAGS=--xla_force_host_platform_device_count={count}'
    )
  return devices[:count]


def _tpu_devices(topology: Topology) -> list[jax.Device]:
  if importlib.util.find_spec('libtpu') is None:
    missing = optional_packages.missing_extra(ImportError("No module named 'libtpu'"))
    raise errors.UserError(f'--topology={topology.name}: {missing}')
  for name, value in _NO_MACHINE.items():
    os.environ.setdefault(name, value)
  dims = topology.dims + (1,) * (3 - len(topology.dims))
  keywords: dict[str, Any] = {'chips_per_host_bounds': (min(2, dims[0]), min(2, dims[1]), 1)}
  if topology.kind in _MEGACORE:
    keywords['chip_config_name'] = 'megacore'
  if topology.slices > 1:
    keywords['num_slices'] = topology.slices
  sizes = 'x'.join(map(str, topology.dims))
  with native_notes.hidden():
    try:
      return list(
        topologies.get_topology_desc(
          platform='tpu', topology_name=f'{topology.kind}:{sizes}', **keywords
        ).devices
      )
    except Exception as error:  # The types vary; libtpu's message says what is wrong.
      unknown = error
  said = str(unknown).split('\n', maxsplit=1)[0]
  raise errors.UserError(
    f"--topology={topology.name}: libtpu doesn't know this topology: {said}"
  ) from unknown

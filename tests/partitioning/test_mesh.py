"""Tests the mesh from gin: sizes that fit the devices, and errors for others."""

import types

import jax
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.partitioning import mesh


@pytest.mark.parametrize(
  'sizes, shape',
  [
    ({}, (1, 8, 1, 1)),
    ({'tensor': 4}, (1, 2, 1, 4)),
    ({'data': 1, 'fsdp': -1, 'tensor': 2}, (1, 1, 4, 2)),
    ({'data': 2, 'fsdp': 2, 'tensor': 2}, (1, 2, 2, 2)),
    ({'stage': 4}, (4, 2, 1, 1)),
  ],
)
def test_each_device_is_in_the_mesh_once(sizes, shape):
  made = mesh.make_mesh(**sizes)
  assert made.axis_names == ('stage', 'data', 'fsdp', 'tensor')
  assert made.devices.shape == shape
  assert set(made.devices.flat) == set(jax.devices())


def test_devices_can_be_chosen():
  assert mesh.make_mesh(devices=jax.devices()[:2]).devices.shape == (1, 2, 1, 1)


@pytest.mark.parametrize(
  'sizes, words',
  [
    ({'data': 3}, ['make_mesh.data=3', '8', 'devices']),
    ({'fsdp': 3}, ['make_mesh.fsdp=3', 'multiple of 3', '8']),
    ({'data': 2, 'fsdp': 2, 'tensor': 4}, ['make_mesh.tensor=4', '16', '8']),
    ({'data': 1}, ['make_mesh.data=1', '8']),
    ({'fsdp': -1}, ['make_mesh.data=-1', 'make_mesh.fsdp=-1', 'at most one']),
    ({'tensor': 0}, ['make_mesh.tensor=0', 'positive']),
    ({'tensor': -2}, ['make_mesh.tensor=-2', 'positive']),
  ],
)
def test_sizes_that_do_not_fit_the_devices_are_named(sizes, words):
  with pytest.raises(UserError) as caught:
    mesh.make_mesh(**sizes)
  assert all(word in str(caught.value) for word in words)


def test_a_mesh_is_made_by_a_line_of_gin():
  gin_config.parse([], ['make_mesh.fsdp=2', 'make_mesh.tensor=4'])
  try:
    assert dict(mesh.make_mesh().shape) == {'stage': 1, 'data': 1, 'fsdp': 2, 'tensor': 4}
  finally:
    gin_config.parse([], [])


class _Device:
  """A fake of one of eight devices on two hosts or slices, for the layout of a mesh."""

  def __init__(self, index, platform):
    self.id, self.process_index, self.slice_index = index, index // 4, index // 4
    self.platform, self.device_kind = platform, 'TPU v4' if platform == 'tpu' else 'any'
    self.coords, self.core_on_chip = (index % 4, 0, 0), 0


def test_slices_are_laid_out_along_the_data_axis():
  devices = [_Device(index, 'tpu') for index in range(8)]
  slices = mesh._layout({'stage': 1, 'data': 4, 'fsdp': 1, 'tensor': 2}, devices)
  slice_of = [[device.slice_index for device in row.flat] for row in slices[0]]
  assert slice_of == [[0, 0], [0, 0], [1, 1], [1, 1]]
  with pytest.raises(UserError, match='make_mesh.data=1 is not divisible by the 2 slices'):
    mesh._layout({'stage': 1, 'data': 1, 'fsdp': 4, 'tensor': 2}, devices)


def test_hosts_of_other_platforms_are_not_slices():
  devices = [_Device(index, 'gpu') for index in range(8)]
  laid_out = mesh._layout({'stage': 1, 'data': 1, 'fsdp': 8, 'tensor': 1}, devices)
  assert laid_out.shape == (1, 1, 8, 1)


def test_the_current_mesh_determines_the_platform():
  assert mesh.current() is None
  assert mesh.platform() == 'cpu'
  made = mesh.make_mesh(tensor=2)
  with mesh.use(made):
    assert mesh.current() is made
    assert mesh.platform() == 'cpu'
  assert mesh.current() is None


@pytest.mark.parametrize('found, expected', [('9.0', (9, 0)), ('12.1', (12, 1)), ('gfx942', None)])
def test_compute_capability(monkeypatch, found, expected):
  """AMD's GPUs have no numbers."""
  device = types.SimpleNamespace(compute_capability=found)
  monkeypatch.setattr(jax, 'local_devices', lambda backend: [device] if backend == 'gpu' else [])
  assert mesh.compute_capability.__wrapped__() == expected


def test_shapes_are_traced_for_no_special_platform(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert mesh.platform() == 'gpu'
  with mesh.without_mesh():
    assert mesh.platform() == 'cpu'
  assert mesh.platform() == 'gpu'

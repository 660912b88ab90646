"""Tests names of topologies and their devices."""

import importlib.util

import jax
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.planning import chips
from parti_jax.planning import topology


@pytest.mark.parametrize(
  'name, kind, dims, slices, count',
  [
    ('v4:8x8x8', 'v4', (8, 8, 8), 1, 512),
    ('v5e:16x16', 'v5e', (16, 16), 1, 256),
    ('2xv5p:4x4x8', 'v5p', (4, 4, 8), 2, 256),
    ('tpu7x:4x4x4', 'tpu7x', (4, 4, 4), 1, 64),
    ('cpu:8', 'cpu', (8,), 1, 8),
  ],
)
def test_parse(name, kind, dims, slices, count):
  parsed = topology.parse(name)
  assert (parsed.kind, parsed.dims, parsed.slices, parsed.chip_count) == (kind, dims, slices, count)
  assert (parsed.chip is None) == (kind == 'cpu')


@pytest.mark.parametrize(
  'name, message',
  [
    ('v4', 'examples are v4:8x8x8'),
    ('v4:8x8', 'v4:AxBxC'),
    ('v5e:4x4x4', 'v5e:AxB'),
    ('v9:4x4', "unknown chip 'v9'; choose from v4, v5e, v5p, v6e, tpu7x and cpu"),
    ('v4:0x8x8', 'sizes of at least 1'),
    ('0xv4:4x4x4', 'sizes of at least 1'),
    ('2xcpu:8', 'no slices'),
    ('cpu:9999', 'xla_force_host_platform_device_count=9999'),
  ],
)
def test_bad_names(name, message):
  with pytest.raises(UserError, match='--topology=' + name) as raised:
    topology.parse(name).devices()
  assert message in str(raised.value) and '\n' not in str(raised.value)


def test_emulated_devices():
  assert topology.parse('cpu:4').devices() == jax.devices('cpu')[:4]


def test_without_libtpu_its_extra_is_named(monkeypatch):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda name: None if name == 'libtpu' else find(name)
  )
  with pytest.raises(UserError, match=r'pip install "parti_jax\[tpu\]"'):
    topology.parse('v5e:2x2').devices()


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
  'name', ['v4:2x2x1', 'v5e:1x1', 'v5p:2x2x2', 'v6e:4x4', 'tpu7x:2x2x1', '2xv4:2x2x1']
)
def test_each_kind_makes_a_mesh(name, tpu_devices):
  del tpu_devices  # Skips if libtpu is missing.
  parsed = topology.parse(name)
  devices = parsed.devices()
  assert len(devices) == parsed.chip_count * parsed.chip.devices
  mesh = mesh_lib.make_mesh(data=parsed.slices, fsdp=-1, devices=devices)
  assert mesh.size == len(devices) and mesh.shape['data'] == parsed.slices


@pytest.mark.tpu_compile
def test_an_error_of_libtpu_is_one_line_and_its_notes_stay_hidden(tpu_devices, capfd):
  del tpu_devices
  with pytest.raises(
    UserError, match="--topology=v4:3x3x3: libtpu doesn't know this topology: .*3x3"
  ):
    topology.parse('v4:3x3x3').devices()
  captured = capfd.readouterr()
  assert not captured.err and not captured.out


def test_constants_of_each_chip_have_a_source():
  for kind, chip in chips.CHIPS.items():
    assert chip.kind == kind and f'/tpu/docs/{kind}' in chip.source
    # A chip computes more FLOPs than it reads bytes, and reads more bytes than a link sends.
    assert chip.peak_flops > 100 * chip.hbm_bandwidth > 1000 * chip.link_bandwidth


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
  'name, sizes',
  [
    ('v4:4x4x4', {'stage': 8, 'data': 2, 'tensor': 4}),
    ('v4:4x4x8', {'stage': 4, 'data': 8, 'tensor': 4}),
    ('v6e:4x4', {'stage': 4, 'data': 2, 'fsdp': 2}),
  ],
)
def test_each_stage_is_next_to_the_following_one(tpu_devices, name, sizes):
  """Also the last one to the first, and neighbors along `tensor` stay next to each other."""
  del tpu_devices
  parsed = topology.parse(name)
  devices = parsed.devices()
  mesh = mesh_lib.make_mesh(devices=devices, **sizes)
  assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1, **sizes}
  assert {device.id for device in mesh.devices.flat} == {device.id for device in devices}
  lengths = np.array([*parsed.dims, 1])[:3]
  positions = np.array([device.coords for device in mesh.devices.flat])
  positions = positions.reshape(mesh.devices.shape + (3,))
  for axis in ('stage', 'tensor'):
    apart = np.abs(positions - np.roll(positions, -1, mesh_lib.AXES.index(axis)))
    links = np.minimum(apart, lengths - apart).sum(axis=-1)
    assert links.max() <= 1, axis

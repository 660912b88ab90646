"""Tests the rows of a process and their positions on the mesh."""

from unittest import mock

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.partitioning import local_rows


def _on_one_process(sharding, devices):
  """A sharding of which this process has only some devices."""

  def indices_map(shape):
    indices = sharding.devices_indices_map(shape)
    return {device: indices[device] for device in devices}

  return mock.Mock(spec=NamedSharding, addressable_devices_indices_map=indices_map)


def _sharding(order, shape, spec):
  devices = np.asarray(jax.devices())[order].reshape(shape)
  return NamedSharding(jax.sharding.Mesh(devices, ('data', 'tensor')), PartitionSpec(spec))


def test_the_rows_are_those_of_the_processs_devices():
  # The mesh's order differs from that of the devices; `tensor` spans pairs.
  order = [6, 1, 0, 7, 2, 5, 4, 3]
  sharding = _sharding(order, (4, 2), 'data')
  devices = jax.devices()
  rows = lambda *numbers: local_rows.local_rows(
    _on_one_process(sharding, [devices[number] for number in numbers]), 12
  ).tolist()
  assert rows(0, 1) == [0, 1, 2, 3, 4, 5]
  assert rows(6, 1) == [0, 1, 2]
  assert rows(6, 3) == [0, 1, 2, 9, 10, 11]
  assert rows(*range(8)) == list(range(12))
  split_by_tensor = _on_one_process(_sharding(order, (4, 2), 'tensor'), devices[:2])
  assert local_rows.local_rows(split_by_tensor, 12).tolist() == list(range(12))


def test_each_row_is_where_the_mesh_puts_it():
  sharding = _sharding([6, 1, 0, 7, 2, 5, 4, 3], (4, 2), 'data')
  batch = np.arange(8 * 3).reshape(8, 3)
  array = local_rows.global_arrays(sharding, {'x': batch}, 8)['x']
  np.testing.assert_array_equal(array, batch)
  assert array.sharding == sharding
  shards = {shard.device.id: np.asarray(shard.data) for shard in array.addressable_shards}
  np.testing.assert_array_equal(shards[6], batch[:2])
  np.testing.assert_array_equal(shards[3], batch[6:])


def test_what_one_process_gathers_is_its_own():
  assert local_rows.gathered({'3': [1, None, 'ö']}) == [{'3': [1, None, 'ö']}]

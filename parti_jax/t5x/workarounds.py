"""Works around problems of t5x; each function says why.

They don't change what t5x computes in cases that already work.
"""

from __future__ import annotations

import functools
import itertools
import math
import os

import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from t5x import checkpoints
from t5x import partitioning

from parti_jax.t5x import checkpoints as our_checkpoints

_default_mesh = partitioning.default_mesh
_Manager = checkpoints.OrbaxCheckpointManagerInterface
_manager_init, _manager_restore = _Manager.__init__, _Manager.restore
_maybe_make_sharded_array = checkpoints._maybe_make_sharded_array
_KINDS_THAT_T5X_KNOWS = ('TPU v2', 'TPU v3', 'TPU v4', 'TPU v4 lite')


def _default_mesh_where_t5x_has_none(num_partitions, model_parallel_submesh=None, *args, **kwargs):
  """`partitioning.default_mesh`, with `PjitPartitioner.num_partitions` on more kinds of devices.

  On CPUs, t5x ignores the number and puts all devices of a process along 'model', so that the mesh
  of a pod can't be emulated. It supports TPUs only up to v4; on others not even one partition
  works. On both it does support a submesh, from which the number of partitions follows.
  """
  backend = args[0] if args else kwargs.get('backend')
  shaped = any(args[1:]) or kwargs.get('ici_mesh_shape') or kwargs.get('dcn_mesh_shape')
  last = jax.devices(backend)[-1]
  if last.platform == 'tpu' and not shaped:
    _check_one_slice(jax.devices(backend))
  if not model_parallel_submesh and not shaped:
    if last.platform == 'cpu':
      model_parallel_submesh = _cpu_submesh(num_partitions, backend)
    elif last.platform == 'tpu' and last.device_kind not in _KINDS_THAT_T5X_KNOWS:
      model_parallel_submesh = tpu_submesh(
        num_partitions, partitioning.bounds_from_last_device(last)
      )
  return _default_mesh(num_partitions, model_parallel_submesh, *args, **kwargs)


def _check_one_slice(devices):
  """Raises ValueError for several TPU slices, of which t5x would silently use only one.

  t5x places chips in the mesh by their coordinates, which are the same in all slices.
  """
  slices = {getattr(device, 'slice_index', 0) for device in devices}
  if len(slices) > 1:
    raise ValueError(
      f'the devices are in {len(slices)} slices: in addition to num_partitions, set '
      'PjitPartitioner.ici_mesh_shape and PjitPartitioner.dcn_mesh_shape to (replica, data, model)'
    )


def _cpu_submesh(num_partitions: int, backend) -> tuple[int, int]:
  """Returns the numbers of processes and of their emulated devices that share a model.

  Raises:
    ValueError: if the number of partitions does not divide the devices.
  """
  local = jax.local_device_count(backend)
  within = min(num_partitions, local)
  if (
    num_partitions % within
    or local % within
    or jax.process_count(backend) % (num_partitions // within)
  ):
    raise ValueError(
      f'PjitPartitioner.num_partitions={num_partitions} does not divide the emulated devices, '
      f'{local} in each of {jax.process_count(backend)} processes; choose another number, or set '
      'XLA_FLAGS=--xla_force_host_platform_device_count=N'
    )
  return num_partitions // within, within


def tpu_submesh(num_partitions: int, bounds: tuple[int, int, int, int]) -> tuple[int, ...]:
  """Returns the part of a TPU slice that shares a model, chosen much like t5x does on TPU v4.

  It prefers all devices of a chip, then a line of chips to a rectangle, then a ring around the
  torus.

  Args:
    num_partitions: number of devices of the part.
    bounds: the slice's chips along x, y and z, and the devices of a chip.

  Returns:
    The devices of the part along each of these axes.

  Raises:
    ValueError: if no part has this number of devices.
  """

  def divisors(number):
    return [size for size in range(1, number + 1) if number % size == 0]

  found = [
    shape
    for shape in itertools.product(*map(divisors, bounds))
    if math.prod(shape) == num_partitions
  ]
  if not found:
    raise ValueError(
      f'PjitPartitioner.num_partitions={num_partitions}: no part of a slice of {bounds} has this '
      'number of devices; choose another number'
    )
  dimensions = lambda shape: sum(size > 1 for size in shape[:3])
  rings = lambda shape: sum(1 < size == all_of_it for size, all_of_it in zip(shape[:3], bounds))
  return max(found, key=lambda shape: (shape[3], -dimensions(shape), rings(shape), shape))


def _absolute(path):
  """Makes a path absolute, since Orbax rejects relative ones; returns URLs unchanged."""
  return path if path is None or '://' in os.fspath(path) else os.path.abspath(path)


@functools.wraps(_manager_init)
def _init_with_absolute_path(self, directory, *args, **kwargs):
  _manager_init(self, _absolute(directory), *args, **kwargs)


@functools.wraps(_manager_restore)
def _restore_with_factored_moments(self, step=None, path=None, *args, **kwargs):
  """Restores from an absolute path, and factors second moments that an earlier version saved.

  t5x doesn't compare shapes, and would use the saved moments unchanged.
  """
  path, wanted = _absolute(path), self._train_state
  found = path or os.path.join(self.directory, f'checkpoint_{step}')
  saved_form = our_checkpoints.saved_form(found, wanted.state_dict())
  if saved_form is None:
    return _manager_restore(self, step, path, *args, **kwargs)
  try:
    self._train_state = wanted.restore_state(saved_form)
    state = _manager_restore(self, step, path, *args, **kwargs)
  finally:
    self._train_state = wanted
  specs = flax.traverse_util.flatten_dict(
    self._partitioner.get_mesh_axes(wanted).state_dict(), sep='/'
  )
  shardings = {
    name: NamedSharding(self._partitioner.mesh, PartitionSpec() if spec is None else spec)
    for name, spec in specs.items()
  }
  return wanted.restore_state(our_checkpoints.with_factored_moments(state.state_dict(), shardings))


@functools.wraps(_maybe_make_sharded_array)
def _sharded_array_with_whole_numbers(arr, mesh, axes=None, restore_dtype=None, *args, **kwargs):
  """Keeps the integer dtype of the step and of the optimizer's counts in restored states.

  `RestoreCheckpointConfig.dtype`, which t5x.train sets when it resumes, is meant for parameters.
  But t5x also casts all arrays that are not partitioned, so the counts would become float32.
  """
  if hasattr(arr, 'dtype') and jnp.issubdtype(arr.dtype, jnp.integer):
    restore_dtype = None
  return _maybe_make_sharded_array(arr, mesh, axes, restore_dtype, *args, **kwargs)


def apply():
  """Applies all workarounds; repeated calls change nothing."""
  checkpoints._maybe_make_sharded_array = _sharded_array_with_whole_numbers
  partitioning.default_mesh = _default_mesh_where_t5x_has_none
  _Manager.__init__, _Manager.restore = _init_with_absolute_path, _restore_with_factored_moments

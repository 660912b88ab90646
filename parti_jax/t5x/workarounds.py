"""What of t5x is worked around, each with its reason; `apply` does it.

Nothing here changes what t5x computes where it already works.
"""

from __future__ import annotations

import functools
import os

import jax
from t5x import checkpoints
from t5x import partitioning

_default_mesh = partitioning.default_mesh
_Manager = checkpoints.OrbaxCheckpointManagerInterface
_manager_init, _manager_restore = _Manager.__init__, _Manager.restore


def _default_mesh_with_partitions_on_cpu(
    num_partitions, model_parallel_submesh=None, *args, **kwargs):
  """`partitioning.default_mesh` in which emulated devices heed `PjitPartitioner.num_partitions`.

  t5x's mesh of CPU devices has all of a process' devices along 'model', whatever was asked for, so
  that a mesh of a pod could not be emulated. A submesh says the same and is heeded.
  """
  backend = args[0] if args else kwargs.get('backend')
  shaped = any(args[1:]) or kwargs.get('ici_mesh_shape') or kwargs.get('dcn_mesh_shape')
  if model_parallel_submesh or shaped or jax.devices(backend)[0].platform != 'cpu':
    return _default_mesh(num_partitions, model_parallel_submesh, *args, **kwargs)
  local = jax.local_device_count(backend)
  within = min(num_partitions, local)
  if num_partitions % within or local % within or jax.process_count(backend) % (
      num_partitions // within):
    raise ValueError(
        f'PjitPartitioner.num_partitions={num_partitions} does not divide the emulated devices, '
        f'{local} in each of {jax.process_count(backend)} processes; choose another number, or set '
        'XLA_FLAGS=--xla_force_host_platform_device_count=N')
  return partitioning.get_mesh((num_partitions // within, within), backend=backend)


def _absolute(path):
  """A path as Orbax takes it today, which refuses relative ones; URLs stay as they are."""
  return path if path is None or '://' in os.fspath(path) else os.path.abspath(path)


@functools.wraps(_manager_init)
def _init_with_absolute_path(self, directory, *args, **kwargs):
  _manager_init(self, _absolute(directory), *args, **kwargs)


@functools.wraps(_manager_restore)
def _restore_from_absolute_path(self, step=None, path=None, *args, **kwargs):
  return _manager_restore(self, step, _absolute(path), *args, **kwargs)


def apply():
  """Does all of it; again, nothing more."""
  partitioning.default_mesh = _default_mesh_with_partitions_on_cpu
  _Manager.__init__, _Manager.restore = _init_with_absolute_path, _restore_from_absolute_path

"""What of t5x is worked around, each with its reason; importing this module does it.

Nothing here changes what t5x computes where it already works.
"""

from __future__ import annotations

import warnings

import jax
from t5x import partitioning

_default_mesh = partitioning.default_mesh


def mesh_in_use():
  """The mesh that t5x's partitioner traces a function for; None outside of its functions.

  t5x enters its mesh as `with mesh:`. Under current versions of JAX this sets neither the mesh that
  flax looks for before it constrains an activation, so that all of these constraints would vanish
  without a word, nor the one that `jax.shard_map` takes. The place where JAX still has it is
  deprecated in favour of the other one.
  """
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    from jax.interpreters import pxla  # pylint: disable=g-import-not-at-top
    mesh = pxla.thread_resources.env.physical_mesh
  return None if mesh.empty else mesh


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


partitioning.default_mesh = _default_mesh_with_partitions_on_cpu

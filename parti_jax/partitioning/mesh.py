"""The device mesh: axes `data`, `fsdp` and `tensor`, sized by gin."""

from __future__ import annotations

import math

import gin
import jax
from jax.experimental import mesh_utils

from parti_jax import errors

AXES = ('data', 'fsdp', 'tensor')


@gin.configurable
def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices=None):
  """A mesh over the devices, laid out along the platform's topology.

  Args:
    data: ways of data parallelism, parameters replicated; -1 takes the devices left over.
    fsdp: ways of data parallelism with parameters split along `embed`; may be -1 instead.
    tensor: ways of splitting heads, MLP and vocabulary; may be -1 instead.
    devices: the devices to use; all of them by default.

  Returns:
    A jax.sharding.Mesh with the axes of `AXES`.

  Raises:
    UserError: if the sizes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = dict(zip(AXES, (data, fsdp, tensor)))
  asked = ', '.join(f'make_mesh.{axis}={size}' for axis, size in sizes.items())
  free = [axis for axis, size in sizes.items() if size == -1]
  known = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or known < 1 or any(size < 1 and size != -1 for size in sizes.values()):
    raise errors.UserError(f'{asked}: sizes are positive, and at most one may be -1')
  if free and len(devices) % known == 0:
    sizes[free[0]] = len(devices) // known
  if math.prod(sizes.values()) != len(devices):
    raise errors.UserError(
        f'{asked} needs a multiple of {known} devices, but there are {len(devices)}; '
        'choose sizes whose product is the number of devices')
  shape = tuple(sizes.values())
  return jax.sharding.Mesh(mesh_utils.create_device_mesh(shape, devices=devices), AXES)

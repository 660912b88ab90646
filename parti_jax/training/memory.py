"""Whether a run's state can be held at all: refused before anything is computed."""

from __future__ import annotations

import math
import os
import pathlib

import jax

from parti_jax.core import errors

# Where Linux says how much a container may have.
_CONTAINER_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')


def check(state) -> None:
  """Compares what parameters and optimizer take with what the devices have.

  A step takes more, so that what passes may still not fit; `parti-jax plan` knows.

  Args:
    state: a TrainState of shapes and shardings.

  Raises:
    UserError: if they do not fit.
  """
  device = jax.local_devices()[0]
  leaves = jax.tree.leaves(state)
  needed = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in leaves
    if leaf.sharding.memory_kind in (None, device.default_memory().kind)
  )
  if device.platform == 'cpu':
    needed *= jax.local_device_count()
    limit, whose = _host_memory(), 'this machine has'
  else:
    limit, whose = (device.memory_stats() or {}).get('bytes_limit'), 'each device has'
  if limit is not None and needed > limit:
    raise errors.UserError(
      f'parameters and optimizer take {needed / 2**30:.1f} GiB, and {whose} {limit / 2**30:.1f} '
      'GiB; split them over more devices (make_mesh.fsdp, make_mesh.tensor) or choose a smaller '
      'model; `parti-jax plan` tells what fits'
    )


def _host_memory() -> int:
  """Bytes of memory that this process may have."""
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    return min(physical, int(_CONTAINER_LIMIT.read_text()))
  except (OSError, ValueError):  # There is no limit, or 'max'.
    return physical

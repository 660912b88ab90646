"""Checks before the first step that a run's state fits in memory."""

from __future__ import annotations

import math
import os
import pathlib
from typing import Any

import jax

from parti_jax.core import errors

# The file with the memory limit of a Linux container.
_CONTAINER_LIMIT = pathlib.Path('/sys/fs/cgroup/memory.max')


def check(state: Any) -> None:
  """Checks that the parameters and the optimizer's state fit in the devices' memory.

  A step needs more memory than that, which only `parti-jax plan` computes.

  Args:
    state: a TrainState of shapes and shardings, or a tree with one.

  Raises:
    UserError: if they don't fit.
  """
  device = jax.local_devices()[0]
  leaves = jax.tree.leaves(state)
  needed = sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in leaves
    if leaf.sharding.memory_kind in (None, device.default_memory().kind)
  )
  limit: int | None
  if device.platform == 'cpu':
    needed *= jax.local_device_count()
    limit, whose = _host_memory(), 'this machine has'
  else:
    limit, whose = (device.memory_stats() or {}).get('bytes_limit'), 'each device has'
  if limit is not None and needed > limit:
    raise errors.UserError(
      f'parameters and optimizer take {needed / 2**30:.1f} GiB, and {whose} {limit / 2**30:.1f} '
      'GiB; split them over more devices (make_mesh.fsdp, make_mesh.tensor) or choose a smaller '
      'model; `parti-jax plan` shows what fits'
    )


def _host_memory() -> int:
  """Returns the bytes of memory that this process may use."""
  physical = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
  try:
    return min(physical, int(_CONTAINER_LIMIT.read_text()))
  except (OSError, ValueError):  # No file, or 'max' for no limit.
    return physical

"""Puts arrays on the devices of a mesh."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np


def put(array: Any, sharding: jax.sharding.Sharding) -> jax.Array:
  """Puts an array on devices.

  Args:
    array: a NumPy or JAX array, or a lazily read one, such as a
      `parti_jax.exported_model.parameter_files.StoredArray`. Of a lazily read one, each process reads
      the shards of its own devices, one after another, and each of them once, even if several
      devices hold it.
    sharding: its sharding.
  """
  if isinstance(array, (np.ndarray, jax.Array)):
    return jax.device_put(array, sharding)
  shards: dict[tuple[tuple[int | None, int | None], ...], np.ndarray] = {}

  def shard(index: tuple[slice, ...] | None) -> np.ndarray:
    assert index is not None
    place = tuple((part.start, part.stop) for part in index)  # Slices aren't hashable.
    if place not in shards:
      shards[place] = np.asarray(array[index])
    return shards[place]

  return jax.make_array_from_callback(array.shape, sharding, shard)

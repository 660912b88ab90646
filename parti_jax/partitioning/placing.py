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
      the shards of its own devices, one after another.
    sharding: its sharding.
  """
  if isinstance(array, (np.ndarray, jax.Array)):
    return jax.device_put(array, sharding)
  return jax.make_array_from_callback(array.shape, sharding, lambda index: np.asarray(array[index]))

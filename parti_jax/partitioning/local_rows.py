"""Finds the rows of a global batch that a process holds, and makes global arrays from them.

A process needs the rows that the batch's sharding puts on its devices. They need not be
contiguous, and several processes may hold the same rows: if the mesh splits parameters or layers
across processes, these processes all work on the same examples.
"""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import Shaped


def local_rows(sharding: Sharding, batch_size: int) -> Int[np.ndarray, 'local_batch']:
  """Returns the rows of a global batch that this process must provide.

  Args:
    sharding: sharding of an array whose first axis is the batch; it must divide the batch.
    batch_size: number of rows of the global batch.

  Returns:
    The rows in ascending order, without repetitions.
  """
  indices = sharding.addressable_devices_indices_map((batch_size,)).values()
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in indices]))


def global_arrays(
  sharding: Sharding, batch: dict[str, Shaped[np.ndarray, 'local_batch ...']], batch_size: int
) -> dict[str, Shaped[Array, '{batch_size} ...']]:
  """Makes global arrays from the rows that each process has.

  Args:
    sharding: sharding of all these arrays, over their first axis.
    batch: arrays with the rows of `local_rows`, in that order.
    batch_size: number of rows of the global batch.

  Returns:
    Arrays on the sharding's devices.
  """
  rows = local_rows(sharding, batch_size)

  def put(value: Shaped[np.ndarray, 'local_batch ...']) -> Shaped[Array, 'batch ...']:
    def part(index: Any) -> np.ndarray:
      first, stop, _ = index[0].indices(batch_size)
      start = np.searchsorted(rows, first)
      return value[(slice(start, start + stop - first), *index[1:])]

    return jax.make_array_from_callback((batch_size, *value.shape[1:]), sharding, part)

  return {name: put(value) for name, value in batch.items()}


def gathered(value: Any) -> list[Any]:
  """Gathers a value from each process, in the order of processes; all must call it together.

  Args:
    value: a JSON value of any size.

  Returns:
    The values of all processes, decoded from JSON.
  """
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
  padded = np.pad(text, (0, int(sizes.max()) - text.size))
  rows = multihost_utils.process_allgather(padded).reshape(sizes.size, -1)
  return [json.loads(row[:size].tobytes()) for row, size in zip(rows, sizes)]

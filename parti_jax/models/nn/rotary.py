"""Rotary positions in two dimensions (RoPE, arXiv 2104.09864; LlamaGen, arXiv 2406.06525)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

# The slowest rotation takes almost 2π · THETA rows or columns for a turn.
THETA = 10_000.0


def rotate(
  x: Float[Array, 'batch length heads head_dim'],
  position: int | Int[Array, ''] | Int[Array, 'batch'],
  grid: tuple[int, int],
  of_inputs: bool = False,
) -> Float[Array, 'batch length heads head_dim']:
  """Rotates queries or keys by the rows and columns of their positions.

  Two adjacent features form a pair. The pairs in the first half of head_dim rotate by the row, those
  in the second half by the column. The angle of pair i of a half is the row or the column times
  THETA^(-4i / head_dim). So the dot product of a query and a key depends on how many rows and
  columns they are apart.

  Args:
    x: queries or keys; head_dim is a multiple of 4.
    position: the first position of x in raster order, in all rows of the batch or in each. Positions
      beyond the grid count as the last one.
    grid: rows and columns.
    of_inputs: whether a position has the row and the column of its input, the image token before it,
      as in LlamaGen, rather than those of the token that it predicts. What comes before the first
      image token then has no place, and its vectors become 0.

  Returns:
    The rotated vectors, in the dtype of x. They are computed in float32.
  """
  rows, columns = grid
  head_dim = x.shape[-1]
  positions = jnp.asarray(position)[..., None] + jnp.arange(x.shape[1])
  if of_inputs:
    positions = positions - 1
  has_place = positions >= 0
  positions = jnp.minimum(positions, rows * columns - 1)
  speeds = (THETA ** (-4 * np.arange(head_dim // 4) / head_dim)).astype(np.float32)
  places = jnp.stack([positions // columns, positions % columns], axis=-1).astype(jnp.float32)
  angles = places[..., None] * speeds  # [length, 2, head_dim / 4], perhaps with batch before.
  angles = angles.reshape(positions.shape + (1, head_dim // 2))  # The same for all heads.
  cosine, sine = jnp.cos(angles), jnp.sin(angles)
  if of_inputs:
    cosine, sine = (jnp.where(has_place[..., None, None], part, 0.0) for part in (cosine, sine))
  pairs = x.astype(jnp.float32).reshape(x.shape[:-1] + (head_dim // 2, 2))
  first, second = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([first * cosine - second * sine, first * sine + second * cosine], axis=-1)
  return turned.reshape(x.shape).astype(x.dtype)

"""Which image tokens a decoder position may look at: one definition for training and sampling."""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

PATTERNS = ('causal', 'conv')


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
  """A causal pattern over a grid of image tokens in raster order.

  Attributes:
    name: 'causal', a position sees itself and all earlier ones; 'conv', of those the ones within
      a square of kernel × kernel around it (Parti, section 2.2; DALL-E).
    grid: rows and columns of image tokens.
    kernel: side of the square of 'conv', odd.
  """

  name: str
  grid: tuple[int, int]
  kernel: int = 11

  @property
  def length(self) -> int:
    return self.grid[0] * self.grid[1]

  def visible(self, query, key):
    """Whether position `query` sees position `key`.

    Args:
      query: int32 array of positions.
      key: int32 array that broadcasts with it.

    Returns:
      bool, of the broadcast shape.
    """
    seen = key <= query
    if self.name == 'conv':
      columns, half = self.grid[1], self.kernel // 2
      seen &= query // columns - key // columns <= half
      seen &= abs(query % columns - key % columns) <= half
    return seen

  @functools.cached_property
  def mask(self) -> np.ndarray:
    """bool [length, length]: may a query (first axis) look at a key."""
    positions = np.arange(self.length)
    return self.visible(positions[:, None], positions[None])

  def row(self, position, length: int):
    """bool [length]: which of the first `length` keys the query at int32 [] `position` sees."""
    return self.visible(position, jnp.arange(length))

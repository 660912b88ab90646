"""Sparse attention patterns: which image tokens each decoder position may attend to.

Training and sampling share this definition. The layers of the decoder follow a schedule of
patterns. Parti's decoder uses conv-shaped attention in every layer (Parti, section 2.2); DALL-E
(arXiv 2102.12092, appendix B.1, figure 11) mixes row, column and conv-shaped attention.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Int

PATTERNS = ('conv', 'row', 'column', 'global')


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
  """A causal pattern over a grid of image tokens in raster order.

  Every position attends to itself, and also to:

  - 'global': all earlier positions.
  - 'conv': the earlier positions within a square of kernel × kernel around it. Unlike in DALL-E,
    the square does not wrap around the left and right edges of the grid.
  - 'row': the previous `columns` positions, back to the one directly above. This is DALL-E's row
    attention, and the first half of the Sparse Transformer's strided attention (arXiv 1904.10509,
    section 4.3). If it stopped at the beginning of the row, layers of row and column attention
    would never see what lies above and to the right.
  - 'column': the earlier positions of its column.

  Attributes:
    name: one of PATTERNS.
    grid: rows and columns of image tokens.
    kernel: side of the square of 'conv'; odd.
  """

  name: str
  grid: tuple[int, int]
  kernel: int = 11

  @property
  def length(self) -> int:
    return self.grid[0] * self.grid[1]

  def visible(
    self,
    query: int | Int[Array | np.ndarray, '*#places'],
    key: Int[Array | np.ndarray, '*#places'],
  ) -> Bool[Array | np.ndarray, '*places']:
    """Returns whether position `query` attends to position `key`."""
    columns, half = self.grid[1], self.kernel // 2
    seen = key <= query
    if self.name == 'conv':
      seen &= query // columns - key // columns <= half
      seen &= abs(query % columns - key % columns) <= half
    elif self.name == 'row':
      seen &= query - key <= columns
    elif self.name == 'column':
      seen &= query % columns == key % columns
    return seen

  @functools.cached_property
  def mask(self) -> Bool[np.ndarray, 'length length']:
    """Whether each query (first axis) attends to each key (second axis)."""
    positions = np.arange(self.length)
    return np.asarray(self.visible(positions[:, None], positions[None]))

  @property
  def num_keys(self) -> int:
    """Number of keys in a query's neighborhood, for counting FLOPs.

    Keys of the neighborhood that come after the query count too.
    """
    rows, columns = self.grid
    counts = {'conv': self.kernel**2, 'row': columns + 1, 'column': rows, 'global': self.length}
    return min(self.length, counts[self.name])

  @property
  def span(self) -> int:
    """Number of positions from a query's farthest key to the query, both included."""
    (rows, columns), half = self.grid, self.kernel // 2
    farthest = {
      'conv': min(half, rows - 1) * columns + min(half, columns - 1),
      'row': columns,
      'column': (rows - 1) * columns,
      'global': self.length - 1,
    }
    return min(self.length, farthest[self.name] + 1)

  # Layout of the sampling caches. Position p is stored in slot p modulo the number of slots: a ring
  # buffer, in which a new position overwrites one that no later position attends to. 'column' is
  # different: the last row attends to every position once more, so the cache keeps all of them,
  # column by column, and a step reads only the `rows` slots of its own column.

  def num_slots(self, positions: int) -> int:
    """Returns the number of cache slots needed to sample the first `positions` positions."""
    return self.length if self.name == 'column' else min(positions, self.span)

  def slot_of(self, position: Int[Array, '*places'], num_slots: int) -> Int[Array, '*places']:
    """Returns the slot of each position, in a cache of `num_slots` slots."""
    if self.name == 'column':
      rows, columns = self.grid
      return position % columns * rows + position // columns
    return position % num_slots

  def positions_in_slots(
    self, position: int | Int[Array, ''] | Int[Array, 'batch 1'], num_slots: int
  ) -> Int[Array, '{num_slots}'] | Int[Array, 'batch {num_slots}']:
    """Returns which of the positions before `position` each slot holds; negative for empty slots."""
    slot = jnp.arange(num_slots)
    if self.name == 'column':
      rows, columns = self.grid
      at = slot % rows * columns + slot // rows
      return jnp.where(at < position, at, -1)
    newest = position - 1
    return newest - (newest - slot) % num_slots

  def read(
    self, position: int | Int[Array, ''] | Int[Array, 'batch 1'], num_slots: int
  ) -> tuple[
    int | Int[Array, ''] | Int[Array, 'batch 1'],
    int,
    Bool[Array, 'count'] | Bool[Array, 'batch count'],
  ]:
    """Returns which slots a sampling step reads.

    Args:
      position: the position of the step, which the cache already holds, in all rows or in each.
      num_slots: number of slots of the cache.

    Returns:
      The first slot to read, the number of slots to read, and for each of these slots whether
      `position` attends to it.
    """
    if self.name == 'column':
      rows, columns = self.grid
      return position % columns * rows, rows, jnp.arange(rows) <= position // columns
    held = self.positions_in_slots(position + 1, num_slots)
    return 0, num_slots, (held >= 0) & self.visible(position, held)

  @functools.cached_property
  def order(self) -> Int[np.ndarray, 'length']:
    """The positions in an order that makes those that attend to each other neighbors.

    For 'column' this is column by column, which gives a kernel whole blocks to skip (DALL-E,
    figure 11). For the other patterns it is raster order.
    """
    positions = np.arange(self.length)
    return positions.reshape(self.grid).T.reshape(-1) if self.name == 'column' else positions

  @functools.cached_property
  def ordered_mask(self) -> Bool[np.ndarray, 'length length']:
    """`mask` with both axes in `order`."""
    return self.mask[np.ix_(self.order, self.order)]


def shortest_period(patterns: tuple[str, ...]) -> tuple[str, ...]:
  """Returns the shortest tuple that gives `patterns` when repeated."""
  for length in range(1, len(patterns) + 1):
    if patterns[:length] * (len(patterns) // length) == patterns:
      return patterns[:length]
  return patterns

"""Which image tokens a decoder position may look at: one definition for training and sampling.

The decoder's layers follow a schedule of patterns. Parti's own decoder is conv-shaped in all its
layers (Parti, section 2.2); DALL-E (arXiv 2102.12092, appendix B.1, figure 11) mixes row, column
and conv-shaped attention.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np

PATTERNS = ('conv', 'row', 'column', 'global')


@dataclasses.dataclass(frozen=True)
class AttentionPattern:
  """A causal pattern over a grid of image tokens in raster order.

  A position always sees itself. Besides it sees:

  - 'global': all earlier positions.
  - 'conv': the earlier ones within a square of kernel × kernel around it. Unlike in DALL-E the
    square does not wrap around the grid's left and right edges.
  - 'row': the `columns` positions before it, so that the farthest is the one above it: DALL-E's
    row attention, and the first half of the Sparse Transformer's strided one (arXiv 1904.10509,
    section 4.3). Were it to end at the row's beginning, layers of row and column attention would
    never see what lies above and to the right.
  - 'column': those above it, in its own column.

  Attributes:
    name: one of PATTERNS.
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
  def mask(self) -> np.ndarray:
    """bool [length, length]: may a query (first axis) look at a key."""
    positions = np.arange(self.length)
    return self.visible(positions[:, None], positions[None])

  @property
  def keys(self) -> int:
    """Keys that a query counts to look at, with those of its neighbourhood that come after it."""
    rows, columns = self.grid
    counts = {'conv': self.kernel**2, 'row': columns + 1, 'column': rows, 'global': self.length}
    return min(self.length, counts[self.name])

  @property
  def reach(self) -> int:
    """How many positions, the newest one among them, lie between a query and its farthest key."""
    (rows, columns), half = self.grid, self.kernel // 2
    farthest = {
      'conv': min(half, rows - 1) * columns + min(half, columns - 1),
      'row': columns,
      'column': (rows - 1) * columns,
      'global': self.length - 1,
    }
    return min(self.length, farthest[self.name] + 1)

  # Caches of sampling. Position p lies in slot p modulo the number of slots: a ring, in which a
  # new position takes the place of one that nothing sees any more. Of 'column' every position is
  # seen again in the last row, so that all are kept, column after column: a step reads only the
  # `rows` slots of its own column.

  def slots(self, positions: int) -> int:
    """Slots of a cache that serves the first `positions` positions."""
    return self.length if self.name == 'column' else min(positions, self.reach)

  def slot(self, position, slots: int):
    """int32 []: where in a cache of `slots` the position int32 [] lies."""
    if self.name == 'column':
      rows, columns = self.grid
      return position % columns * rows + position // columns
    return position % slots

  def held(self, position, slots: int):
    """int32 [slots]: which of the positions before int32 [] each slot holds; negative for none."""
    slot = jnp.arange(slots)
    if self.name == 'column':
      rows, columns = self.grid
      at = slot % rows * columns + slot // rows
      return jnp.where(at < position, at, -1)
    newest = position - 1
    return newest - (newest - slot) % slots

  def read(self, position, slots: int):
    """What a step looks at.

    Args:
      position: int32 [], the step's own, which is written already.
      slots: size of the cache.

    Returns:
      The first slot to read, int32 [] or the number 0; how many; and which of them the position
      sees, bool [that many].
    """
    if self.name == 'column':
      rows, columns = self.grid
      return position % columns * rows, rows, jnp.arange(rows) <= position // columns
    held = self.held(position + 1, slots)
    return 0, slots, (held >= 0) & self.visible(position, held)

  @functools.cached_property
  def order(self) -> np.ndarray:
    """int [length]: the positions in the order in which those that see each other are neighbours.

    Raster order but for 'column', whose columns then are blocks that a kernel can skip (DALL-E,
    figure 11).
    """
    positions = np.arange(self.length)
    return positions.reshape(self.grid).T.reshape(-1) if self.name == 'column' else positions

  @functools.cached_property
  def ordered_mask(self) -> np.ndarray:
    """`mask` with both axes in `order`."""
    return self.mask[np.ix_(self.order, self.order)]


def shortest_period(patterns: tuple[str, ...]) -> tuple[str, ...]:
  """The shortest tuple that, repeated, gives `patterns`."""
  for length in range(1, len(patterns) + 1):
    if patterns[:length] * (len(patterns) // length) == patterns:
      return patterns[:length]
  return patterns

"""Which of several pictures that are the same, or look alike, stays.

The better of two is the one with more pixels before resizing or, of as many, the one that comes
first in the source. It depends on nothing else, so that any grouping gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
  """What is compared of an example.

  Attributes:
    digest: of the picture's bytes, and of the caption where this counts.
    look: the perceptual hash; -1 for none.
    pixels: of the picture before resizing.
    shard: number of the example's shard.
    index: of the example in the shard.
  """

  digest: bytes
  look: int
  pixels: int
  shard: int
  index: int


def rank(row: Row) -> tuple[int, int, int]:
  """Orders rows, the best first."""
  return -row.pixels, row.shard, row.index


def ranked(rows: Iterable[Row]) -> Iterator[tuple[Row, bool]]:
  """Yields rows of the same picture in one pass, and whether each is the best of them."""
  best = None
  for row in rows:
    if best is None:
      best = row
      continue
    if rank(row) < rank(best):
      best, row = row, best
    yield row, False
  if best is not None:
    yield best, True


def near_losers(rows: Iterable[Row], distance: int) -> Iterator[Row]:
  """Yields the rows of which a better one looks alike.

  That better one may have a still better one itself: of a chain of pictures, each like the next,
  all may go but the best.

  Args:
    rows: with hashes, each different.
    distance: bits in which the hashes of pictures that look alike may differ.
  """
  rows = sorted(rows, key=rank)
  looks = np.array([row.look for row in rows], np.uint64)
  for place in range(1, len(rows)):
    if (np.bitwise_count(looks[:place] ^ looks[place]) <= distance).any():
      yield rows[place]

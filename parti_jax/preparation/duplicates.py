"""Decides which of several identical or similar pictures to keep.

The better of two pictures has more pixels before resizing, or, with equally many, comes first in
the source. This order depends on nothing else, so any grouping gives the same result.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np


class Row(NamedTuple):
  """The properties of an example that are compared.

  Attributes:
    digest: digest of the picture's bytes, and of the caption if it counts.
    look: the perceptual hash; -1 for none.
    pixels: pixels of the picture before resizing.
    shard: index of the example's shard.
    position: index of the example in the shard.
  """

  digest: bytes
  look: int
  pixels: int
  shard: int
  position: int


def rank(row: Row) -> tuple[int, int, int]:
  """Returns a sort key that puts the best row first."""
  return -row.pixels, row.shard, row.position


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
  """Yields the rows that look like a better one.

  That better one may lose against a still better one: in a chain of pictures, each similar to the
  next, all but the best may be dropped.

  Args:
    rows: rows with distinct hashes.
    distance: maximum number of bits in which the hashes of similar pictures differ.
  """
  rows = sorted(rows, key=rank)
  looks = np.array([row.look for row in rows], np.uint64)
  for index in range(1, len(rows)):
    if (np.bitwise_count(looks[:index] ^ looks[index]) <= distance).any():
      yield rows[index]

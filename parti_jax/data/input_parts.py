"""A split cut into parts that can be read one by one.

The cut depends on the source alone: a part is one of its files or, of what has an index, a range of
so many examples.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import xxhash

from parti_jax.data import token_cache
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import base


class InputParts:
  """The parts of an opened split.

  Args:
    opened: of `Source.open`.
    size: examples of a range.
  """

  def __init__(
    self, opened: base.Records | base.Shards, size: int = token_cache.EXAMPLES_PER_SHARD
  ):
    self._opened, self._size = opened, size

  def __len__(self) -> int:
    if isinstance(self._opened, base.Shards):
      return len(self._opened.files)
    return -(-len(self._opened) // self._size)

  def open(self, index: int) -> base.Records | base.Shards:
    """Opens a part, as a split of its own."""
    if isinstance(self._opened, base.Shards):
      return _OneFile(self._opened, self._opened.files[index])
    start = index * self._size
    return _Range(self._opened, range(start, min(start + self._size, len(self._opened))))

  def examples(self, indices: Sequence[int]) -> int | None:
    """How many examples some parts have; None for files, which have to be read to be counted."""
    if isinstance(self._opened, base.Shards):
      return None
    return sum(len(self.open(index)) for index in indices)

  def description(self) -> dict[str, Any]:
    """By which two processes see whether they read the same, JSON.

    Files are told apart by their sizes and by their names below the folder that they have in common,
    so that hosts may have the folder at different places.
    """
    if not isinstance(self._opened, base.Shards):
      return {
        'examples': len(self._opened),
        'examples_per_shard': self._size,
        'digest': self._opened.digest(),
      }
    files = [os.fspath(file) for file in self._opened.files]
    common = os.path.commonprefix(files)
    start = len(common) - len(os.path.basename(common))
    names = '\n'.join(file[start:] for file in files)
    return {
      'files': len(files),
      'names': xxhash.xxh3_64_hexdigest(os.fsencode(names)),
      'digest': self._opened.digest(),
    }


class _OneFile(base.Shards):
  """One of the files of a split."""

  def __init__(self, shards: base.Shards, file: str):
    self.files, self._shards = [file], shards

  def read(self, file: str) -> Iterator[base.Example | Damaged]:
    return self._shards.read(file)


class _Range(base.Records):
  """Successive records of a split."""

  def __init__(self, records: base.Records, indices: range):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    return self._records.read([self._indices[index] for index in indices])

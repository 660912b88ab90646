"""Cuts a split into parts that can be read independently.

The cut depends only on the source: a part is one of its files or, in a source with an index, a
range of examples of fixed length.
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
    opened: an opened split, from `Source.open`.
    size: examples per range.
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
    """Opens a part, as if it were a split."""
    if isinstance(self._opened, base.Shards):
      return _OneFile(self._opened, self._opened.files[index])
    return _Range(self._opened, self._range(self._opened, index))

  def _range(self, records: base.Records, index: int) -> range:
    """Returns the indices of the records in a part."""
    start = index * self._size
    return range(start, min(start + self._size, len(records)))

  def examples(self, indices: Sequence[int]) -> int | None:
    """Returns the number of examples in some parts; None for files, which have no count."""
    if isinstance(self._opened, base.Shards):
      return None
    records = self._opened
    return sum(len(self._range(records, index)) for index in indices)

  def description(self) -> dict[str, Any]:
    """Returns JSON that lets two processes check that they read the same data.

    Files are identified by their sizes and by their names below their common folder, so that hosts
    may mount the folder at different paths.
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
  """One file of a split."""

  def __init__(self, shards: base.Shards, file: str):
    self.files, self._shards = [file], shards

  def read(self, file: str) -> Iterator[base.Example | Damaged]:
    return self._shards.read(file)


class _Range(base.Records):
  """A range of records of a split."""

  def __init__(self, records: base.Records, indices: range):
    self._records, self._indices = records, indices

  def __len__(self) -> int:
    return len(self._indices)

  def read(self, indices: Sequence[int]) -> Sequence[base.Example | Damaged]:
    return self._records.read([self._indices[index] for index in indices])

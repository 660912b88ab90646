"""Reads the records of ArrayRecord shards, by their numbers or one after another."""

from __future__ import annotations

import collections
import contextlib
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import base

# Makes an example of a record; must be picklable.
Parse = Callable[[bytes], base.Example | Damaged]
# How examples may be shuffled: all of them, read in any order; or shards, and examples in a window.
SHUFFLES = ('global', 'window')
# Readers of shards that a process keeps open.
_MOST_OPEN = 256
# Records that are read at once.
_AT_ONCE = 256


class Reader:
  """The records of a shard on a disk.

  Args:
    path: of the shard.
    parse: makes examples of records.
  """

  def __init__(self, path: str, parse: Parse):
    from array_record.python import array_record_module

    self._path, self._parse = path, parse
    self._reader = array_record_module.ArrayRecordReader(
      path, options='readahead_buffer_size:0,max_parallelism:0'
    )

  def count(self) -> int:
    """How many records there are."""
    return self._reader.num_records()

  def read(self, numbers: Sequence[int]) -> list[base.Example | Damaged]:
    """Reads records by their numbers in the shard."""
    try:
      return [self._parsed(record) for record in self._reader.read(list(numbers))]
    except (RuntimeError, IndexError, ValueError):
      if len(numbers) == 1:
        return [Damaged('damaged record', file=self._path)]
      return [self.read([number])[0] for number in numbers]

  def _parsed(self, record: bytes) -> base.Example | Damaged:
    found = self._parse(record)
    return Damaged(found.reason, file=self._path) if isinstance(found, Damaged) else found

  def close(self) -> None:
    """Closes the file."""
    with contextlib.suppress(RuntimeError):  # Closing reports once more what is damaged.
      self._reader.close()


class ShardRecords(base.Records):
  """All records of some shards on a disk.

  Args:
    files: paths of the shards.
    counts: number of records of each.
    parse: makes examples of records.
    digest: see `Records.digest`.
  """

  def __init__(
    self, files: Sequence[str], counts: Sequence[int], parse: Parse, digest: str | None = None
  ):
    self._files, self._parse, self._digest = list(files), parse, digest
    self._ends = np.cumsum(counts)
    # Threads of grain's read at the same time.
    self._lock = threading.Lock()
    self._readers: collections.OrderedDict[int, Reader] = collections.OrderedDict()

  def __len__(self) -> int:
    return int(self._ends[-1])

  def digest(self) -> str | None:
    return self._digest

  def __getstate__(self) -> dict[str, Any]:
    return self.__dict__ | {'_readers': collections.OrderedDict(), '_lock': None}

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state, _lock=threading.Lock())

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    indices = np.asarray(indices)
    shards = np.searchsorted(self._ends, indices, side='right')
    found: list[base.Example | Damaged] = [None] * len(indices)
    order = np.argsort(shards, kind='stable')
    for places in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
      if len(places):
        shard = int(shards[places[0]])
        start = int(self._ends[shard - 1]) if shard else 0
        read = self._reader(shard).read([int(indices[place]) - start for place in places])
        for place, example in zip(places, read):
          found[place] = example
    return found

  def _reader(self, shard: int) -> Reader:
    # Readers that are left out of use are not closed here, since another thread may be reading: the
    # file closes with the last reference.
    with self._lock:
      reader = self._readers.pop(shard, None) or Reader(self._files[shard], self._parse)
      self._readers[shard] = reader
      if len(self._readers) > _MOST_OPEN:
        self._readers.popitem(last=False)
    return reader

  def close(self) -> None:
    with self._lock:
      self._readers.clear()


class ShardStreams(base.Shards):
  """Shards that are read from their beginning; one at a URL is copied to the disk first.

  Args:
    files: paths or URLs of the shards.
    parse: makes examples of records.
  """

  def __init__(self, files: Sequence[str], parse: Parse):
    self.files, self._parse = list(files), parse

  def read(self, file: str) -> Iterator[base.Example | Damaged]:
    with storage.local_copy(file) as local:
      reader = Reader(os.fspath(local), self._parse)
      try:
        for start in range(0, reader.count(), _AT_ONCE):
          yield from reader.read(range(start, min(start + _AT_ONCE, reader.count())))
      finally:
        reader.close()


def first_fits(file: str, count: int, parse: Parse) -> bool:
  """Whether a shard has so many records, and its first one is what it should be.

  Args:
    file: a path or URL; at a URL it is copied to the disk.
    count: the number of records.
    parse: makes an example of a record.
  """
  with storage.local_copy(file) as local:
    reader = Reader(os.fspath(local), parse)
    try:
      return reader.count() == count and (
        count == 0 or not isinstance(reader.read([0])[0], Damaged)
      )
    finally:
      reader.close()


def complete_files(
  folder: str,
  names: Sequence[str],
  shards: Sequence[Mapping[str, Any]],
  what: str,
  how_to_make: str,
) -> list[str]:
  """Returns shards' paths, after comparing their sizes: a file that was cut opens as an empty one.

  Args:
    folder: their folder, a path or URL.
    names: of the files.
    shards: 'bytes' of each, as `info.json` has them.
    what: the folder, for messages.
    how_to_make: the command that writes it, for messages.

  Raises:
    UserError: a file is missing or of another size.
  """
  sizes = storage.sizes(folder)
  files = []
  for name, shard in zip(names, shards, strict=True):
    file = storage.join(folder, name)
    if name not in sizes:
      raise UserError(f'{file} is missing from {what}; {how_to_make} again')
    if sizes[name] != shard['bytes']:
      raise UserError(
        f'{file} is damaged: it has {sizes[name]:,} bytes and had '
        f'{shard["bytes"]:,} when it was written; copy it again, or '
        f'{how_to_make} again'
      )
    files.append(file)
  return files

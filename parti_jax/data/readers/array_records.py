"""Reads the records of ArrayRecord shards, by index or sequentially."""

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

# Parses a record into an example; must be picklable.
Parse = Callable[[bytes], base.Example | Damaged]
# Shuffling modes: all examples, read in any order; or shards, and examples within a window.
SHUFFLES = ('global', 'window')
# Shard readers that a process keeps open.
_MOST_OPEN = 256
# Records read at once.
_AT_ONCE = 256


class Reader:
  """Reads the records of a shard on a disk.

  Args:
    path: path of the shard.
    parse: parses records into examples.
  """

  def __init__(self, path: str, parse: Parse):
    from array_record.python import array_record_module

    self._path, self._parse = path, parse
    self._reader = array_record_module.ArrayRecordReader(
      path, options='readahead_buffer_size:0,max_parallelism:0'
    )

  def count(self) -> int:
    """Returns the number of records."""
    return self._reader.num_records()

  def read(self, numbers: Sequence[int]) -> list[base.Example | Damaged]:
    """Returns the examples of records with the given numbers in the shard."""
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
    with contextlib.suppress(RuntimeError):  # Closing reports damage again.
      self._reader.close()


class ShardRecords(base.Records):
  """All records of some shards on a disk.

  Args:
    files: paths of the shards.
    counts: number of records of each.
    parse: parses records into examples.
    digest: returned by `digest`.
  """

  def __init__(
    self, files: Sequence[str], counts: Sequence[int], parse: Parse, digest: str | None = None
  ):
    self._files, self._parse, self._digest = list(files), parse, digest
    self._ends = np.cumsum(counts)
    # grain's threads read at the same time.
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
    wanted = np.asarray(indices)
    shards = np.searchsorted(self._ends, wanted, side='right')
    found: dict[int, base.Example | Damaged] = {}
    order = np.argsort(shards, kind='stable')
    for positions in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1):
      if len(positions):
        shard = int(shards[positions[0]])
        start = int(self._ends[shard - 1]) if shard else 0
        read = self._reader(shard).read([int(wanted[position]) - start for position in positions])
        found.update(zip(positions.tolist(), read))
    return [found[position] for position in range(len(wanted))]

  def _reader(self, shard: int) -> Reader:
    # Evicted readers aren't closed here, since another thread may be reading: the file closes with
    # the last reference.
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
  """Reads shards from their beginning; copies shards at URLs to the disk first.

  Args:
    files: paths or URLs of the shards.
    parse: parses records into examples.
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
  """Returns whether a shard has `count` records, and its first record can be parsed.

  Args:
    file: a path or URL; a file at a URL is copied to the disk.
    count: the expected number of records.
    parse: parses a record into an example.
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
  """Returns the paths of shards after checking their sizes: a truncated file would open as empty.

  Args:
    folder: their folder, a path or URL.
    names: names of the files.
    shards: the entries of `info.json`, with 'bytes' of each.
    what: description of the folder, for messages.
    how_to_make: the command that writes it, for messages.

  Raises:
    UserError: a file is missing or has another size.
  """
  sizes = storage.sizes(folder)
  files = []
  for name, shard in zip(names, shards, strict=True):
    file = storage.join(folder, name)
    if name not in sizes:
      raise UserError(f'{file} is missing from {what}; {how_to_make} again')
    if sizes[name] != shard['bytes']:
      raise UserError(
        f'{file} is damaged: it has {sizes[name]:,} bytes, but was written with '
        f'{shard["bytes"]:,}; copy it again, or '
        f'{how_to_make} again'
      )
    files.append(file)
  return files

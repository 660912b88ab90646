"""Reads captioned pictures from Parquet files, row group by row group.

A row group is what a Parquet file is read in: to read one row, the others of its group are read
too, and decompressed. Where a page is damaged, the rows from there to the end of the group are left
out.
"""

from __future__ import annotations

import bisect
import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import arrow_rows

# Rows that are decoded at once, and then, from where that failed, one by one as far as it goes.
_ROWS = 64, 1
# Bytes of a column that are read at once.
_BUFFER = 2**22
# Rows that a footer may tell of, for each byte of the file; a damaged one may say anything.
_ROWS_PER_BYTE = 1000
# What pyarrow raises for damage.
_ERRORS = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)

Example = Mapping[str, bytes]
Find = Callable[[pa.Schema, str], arrow_rows.Columns]


class Unreadable(UserError):
  """A file is gone, or no whole Parquet file."""


@dataclasses.dataclass(frozen=True)
class Footer:
  """What the footer of a file says.

  Attributes:
    columns: the columns to read.
    rows: of each row group, int64 [groups].
    sizes: bytes of these columns in each row group, unpacked, int64 [groups].
  """

  columns: arrow_rows.Columns
  rows: np.ndarray
  sizes: np.ndarray


def read_schema(path: str) -> pa.Schema:
  """Returns the schema of a file.

  Raises:
    Unreadable: it is no whole Parquet file.
  """
  with _opened(path) as file:
    return _checked(path, lambda: file.schema_arrow)


def read_footer(path: str, find: Find) -> Footer:
  """Reads the footer of a file, and none of its data.

  Args:
    path: the file, a path or URL.
    find: returns the columns to read, of a schema and the file's name; see `arrow_rows.find`.

  Raises:
    UserError: it is no whole Parquet file, or lacks the columns.
  """
  with _opened(path) as file:
    return _footer(path, file, find)


def read(path: str, groups: range | None, find: Find) -> Iterator[Example | Damaged]:
  """Yields the rows of some row groups in order.

  Args:
    path: the file, a path or URL.
    groups: which row groups; None for all.
    find: as in `read_footer`.

  Yields:
    The rows, or what is in the place of each that can't be read; of a file without a footer, or
    without the columns, one for all.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(_opened(path))
      footer = _footer(path, file, find)
    except Unreadable:
      yield Damaged('file that is gone or cannot be read', file=path)
      return
    except UserError as error:
      if not str(error).startswith('parquet: '):  # The store's.
        raise
      yield Damaged('Parquet file with other columns than the first', file=path)
      return
    for number in range(len(footer.rows)) if groups is None else groups:
      group = _Group(path, number, int(footer.rows[number]), footer.columns)
      for batch in group.batches(file):
        for row in range(len(batch)):
          yield batch.example(row)
      for _ in range(group.missing):
        yield group.rest


class _Group:
  """A row group that is being read.

  Attributes:
    missing: how many of its rows are not read.
    rest: what stands for each of them.
  """

  def __init__(self, path: str, number: int, rows: int, columns: arrow_rows.Columns):
    self.missing = self._rows = rows
    self._path, self._number, self._columns = path, number, columns
    self.rest = Damaged('unreadable row of a Parquet file', f'row group {number}', path)

  def batches(self, file: pq.ParquetFile) -> Iterator[arrow_rows.Batch]:
    """Yields its rows, as far as they can be read."""
    for size in _ROWS:
      yield from self._batches(file, size)

  def _batches(self, file: pq.ParquetFile, size: int) -> Iterator[arrow_rows.Batch]:
    """Yields those that are missing, so many at once."""
    skipped = self._rows - self.missing
    try:
      for batch in file.iter_batches(size, [self._number], self._columns.paths, use_threads=False):
        found = batch.slice(skipped, self.missing)
        skipped -= batch.num_rows - found.num_rows
        if found.num_rows:
          rows = arrow_rows.Batch(found, self._columns)
          self.missing -= len(rows)
          yield rows
        if not self.missing:
          return
    except _ERRORS as error:
      if _is_of_store(self._path, error):
        raise


class WholeGroup:
  """The rows of a row group in memory.

  Args:
    path: the file.
    metadata: of the file.
    number: of the row group.
    rows: in it.
    columns: what to read.

  Attributes:
    nbytes: bytes of memory.
  """

  def __init__(
    self, path: str, metadata: pq.FileMetaData, number: int, rows: int, columns: arrow_rows.Columns
  ):
    group = _Group(path, number, rows, columns)
    with _opened(path, metadata) as file:
      self._batches = list(group.batches(file))
    self._rest = group.rest
    self._ends = list(itertools.accumulate(map(len, self._batches)))
    self.nbytes = sum(batch.nbytes for batch in self._batches)

  def example(self, row: int) -> Example | Damaged:
    """Returns the example of a row, or why there is none."""
    batch = bisect.bisect_right(self._ends, row)
    if batch == len(self._batches):
      return self._rest
    return self._batches[batch].example(row - (self._ends[batch - 1] if batch else 0))


class Metadata:
  """The metadata of a file; they tell how it is read without reading its footer again.

  Attributes:
    value: pyarrow's.
    nbytes: about how many bytes of memory it takes.
  """

  def __init__(self, path: str):
    with _opened(path) as file:
      self.value = file.metadata
    self.nbytes = 10 * self.value.serialized_size


class Cache:
  """What was read last, for several threads; each thing is read by one of them.

  Args:
    limit: bytes to keep, over all; one thing is kept however large it is.
  """

  def __init__(self, limit: int):
    self._limit, self._bytes, self._lock = limit, 0, threading.Lock()
    self._held: collections.OrderedDict[Any, concurrent.futures.Future] = collections.OrderedDict()

  def get(self, key: Any, make: Callable[[], Any]) -> Any:
    """Returns what is kept under a key, or makes it; it has an attribute `nbytes`."""
    with self._lock:
      future = self._held.get(key)
      if makes := future is None:
        future = self._held[key] = concurrent.futures.Future()
      else:
        self._held.move_to_end(key)
    if makes:
      self._make(key, make, future)
    return future.result()

  def _make(self, key: Any, make: Callable[[], Any], future: concurrent.futures.Future) -> None:
    try:
      value = make()
    except BaseException as error:
      with self._lock:
        self._held.pop(key, None)
      future.set_exception(error)
      raise
    future.set_result(value)
    with self._lock:
      self._bytes += value.nbytes
      for oldest in list(self._held):
        if self._bytes <= self._limit or oldest == key:
          break
        if self._held[oldest].done():
          self._bytes -= self._held.pop(oldest).result().nbytes


def _footer(path: str, file: pq.ParquetFile, find: Find) -> Footer:
  columns = find(_checked(path, lambda: file.schema_arrow), path)

  def numbers() -> tuple[list[int], list[int]]:
    metadata = file.metadata
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    leaves = [
      leaf
      for leaf in range(metadata.num_columns)
      if _is_read(metadata.schema.column(leaf).path, columns)
    ]
    rows = [group.num_rows for group in groups]
    if min(rows, default=0) < 0 or sum(rows) != metadata.num_rows:
      raise ValueError('impossible numbers of rows')
    return rows, [
      sum(group.column(leaf).total_uncompressed_size for leaf in leaves) for group in groups
    ]

  rows, sizes = _checked(path, numbers)
  return Footer(columns, np.array(rows, np.int64), np.array(sizes, np.int64))


def _is_read(path: str, columns: arrow_rows.Columns) -> bool:
  return any(path == name or path.startswith(f'{name}.') for name in columns.paths)


@contextlib.contextmanager
def _opened(path: str, metadata: pq.FileMetaData | None = None) -> Iterator[pq.ParquetFile]:
  """Opens a file.

  Raises:
    Unreadable: it is no whole Parquet file.
  """
  with contextlib.ExitStack() as stack:
    try:
      opened = stack.enter_context(storage.open_file(path))
    except OSError as error:
      raise Unreadable(f'parquet: {path} cannot be read: {error.strerror or error}') from error

    def open_it() -> pq.ParquetFile:
      most = _ROWS_PER_BYTE * opened.seek(0, os.SEEK_END)
      file = stack.enter_context(
        pq.ParquetFile(
          opened, metadata=metadata, buffer_size=_BUFFER, page_checksum_verification=True
        )
      )
      if not 0 <= file.metadata.num_rows <= most:
        raise ValueError('impossible numbers of rows')
      return file

    yield _checked(path, open_it)


def _checked(path: str, read_it: Callable[[], Any]) -> Any:
  """Calls what reads a footer.

  Raises:
    Unreadable: it can't be read.
  """
  try:
    return read_it()
  except _ERRORS as error:
    if _is_of_store(path, error):
      raise
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise Unreadable(
      f'parquet: {path} is damaged, cut or not a Parquet file: {reason}; copy or '
      'write it again, or leave it out (gin: parquet.splits)'
    ) from error


def _is_of_store(path: str, error: Exception) -> bool:
  """Whether a store has failed; pyarrow's own errors are plain `OSError`s without a number."""
  return (
    storage.is_url(path)
    and isinstance(error, OSError)
    and (type(error) is not OSError or error.errno is not None)
  )

"""Reads captioned pictures from Parquet files, row group by row group.

A Parquet file is read by row groups: to read one row, the others of its group are read and
decompressed too. If a page is damaged, the rows from there to the end of the group are skipped.
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
from jaxtyping import Int64

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import arrow_rows

# Rows decoded at once; after a failure, decoding continues row by row as far as possible.
_ROWS = 64, 1
# Read buffer per column, in bytes.
_BUFFER = 2**22
# Maximum number of rows per byte of the file; a damaged footer may claim any number.
_ROWS_PER_BYTE = 1000
# Errors that pyarrow raises for damaged files.
_ERRORS = (pa.ArrowException, OSError, ValueError, IndexError, OverflowError, MemoryError)

Example = Mapping[str, bytes]
Find = Callable[[pa.Schema, str], arrow_rows.Columns]


class Unreadable(UserError):
  """A file is missing, or isn't a complete Parquet file."""


@dataclasses.dataclass(frozen=True)
class Footer:
  """Information from a file's footer.

  Attributes:
    columns: the columns to read.
    rows: rows of each row group.
    sizes: uncompressed bytes of these columns in each row group.
  """

  columns: arrow_rows.Columns
  rows: Int64[np.ndarray, 'groups']
  sizes: Int64[np.ndarray, 'groups']


def read_schema(path: str) -> pa.Schema:
  """Returns the schema of a file.

  Raises:
    Unreadable: it isn't a complete Parquet file.
  """
  with _opened(path) as file:
    return _checked(path, lambda: file.schema_arrow)


def read_footer(path: str, find: Find) -> Footer:
  """Reads the footer of a file without its data.

  Args:
    path: the file, a path or URL.
    find: returns the columns to read, given a schema and the file's name, like `arrow_rows.find`.

  Raises:
    UserError: it isn't a complete Parquet file, or has no such columns.
  """
  with _opened(path) as file:
    return _footer(path, file, find)


def read(path: str, groups: range | None, find: Find) -> Iterator[Example | Damaged]:
  """Yields the rows of some row groups in order.

  Args:
    path: the file, a path or URL.
    groups: indices of the row groups; None for all.
    find: as in `read_footer`.

  Yields:
    The rows, with `Damaged` in the place of each unreadable row; a single `Damaged` for a file
    without a readable footer or without the columns.
  """
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(_opened(path))
      footer = _footer(path, file, find)
    except Unreadable:
      yield Damaged('file that is gone or cannot be read', file=path)
      return
    except UserError as error:
      if not str(error).startswith('parquet: '):  # Raised by the store.
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
  """A row group during reading.

  Attributes:
    missing: number of its rows not read yet.
    rest: the `Damaged` that replaces each of them.
  """

  def __init__(self, path: str, number: int, rows: int, columns: arrow_rows.Columns):
    self.missing = self._rows = rows
    self._path, self._number, self._columns = path, number, columns
    self.rest = Damaged('unreadable row of a Parquet file', f'row group {number}', path)

  def batches(self, file: pq.ParquetFile) -> Iterator[arrow_rows.Batch]:
    """Yields its rows, as far as they are readable."""
    for size in _ROWS:
      yield from self._batches(file, size)

  def _batches(self, file: pq.ParquetFile, size: int) -> Iterator[arrow_rows.Batch]:
    """Yields the missing rows, `size` at a time."""
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
    metadata: metadata of the file.
    number: index of the row group.
    rows: rows in it.
    columns: the columns to read.

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
    """Returns the example of a row, or the reason why it is missing."""
    batch = bisect.bisect_right(self._ends, row)
    if batch == len(self._batches):
      return self._rest
    return self._batches[batch].example(row - (self._ends[batch - 1] if batch else 0))


class Metadata:
  """The metadata of a file, with which it is opened without reading its footer again.

  Attributes:
    value: pyarrow's metadata.
    nbytes: approximate bytes of memory.
  """

  def __init__(self, path: str):
    with _opened(path) as file:
      self.value = file.metadata
    self.nbytes = 10 * self.value.serialized_size


class Cache:
  """A thread-safe cache of recently used values; each value is made by one thread.

  Args:
    limit: total bytes to keep; one value is kept regardless of its size.
  """

  def __init__(self, limit: int):
    self._limit, self._bytes, self._lock = limit, 0, threading.Lock()
    self._held: collections.OrderedDict[Any, concurrent.futures.Future] = collections.OrderedDict()

  def get(self, key: Any, make: Callable[[], Any]) -> Any:
    """Returns the value of a key, or makes it; values have an attribute `nbytes`."""
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
    Unreadable: it isn't a complete Parquet file.
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
  """Calls a function that reads a footer.

  Raises:
    Unreadable: the footer can't be read.
  """
  try:
    return read_it()
  except _ERRORS as error:
    if _is_of_store(path, error):
      raise
    reason = ' '.join(str(error).split()) or type(error).__name__
    raise Unreadable(
      f'parquet: {path} is damaged, truncated or not a Parquet file: {reason}; copy or '
      'write it again, or leave it out (gin: parquet.splits)'
    ) from error


def _is_of_store(path: str, error: Exception) -> bool:
  """Returns whether a store failed; pyarrow's own errors are plain `OSError`s without an errno."""
  return (
    storage.is_url(path)
    and isinstance(error, OSError)
    and (type(error) is not OSError or error.errno is not None)
  )

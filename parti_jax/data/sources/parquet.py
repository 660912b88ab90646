"""Parquet files, as written by img2dataset and the Hugging Face hub."""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
import re
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import gin
import numpy as np
import xxhash
from absl import logging
from jaxtyping import Int64

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import file_patterns
from parti_jax.data.sources import base
from parti_jax.data.sources import paths

if TYPE_CHECKING:
  import pyarrow as pa

  from parti_jax.data.readers import arrow_rows
  from parti_jax.data.readers import parquet_files

SHUFFLES = ('global', 'window')
# Usual file names of splits, for example on the Hugging Face hub.
_SPLITS = {
  'train': ('train',),
  'validation': ('validation', 'valid', 'val', 'dev'),
  'test': ('test', 'eval'),
}
_PATTERNS = (
  '{}[-._0-9]*parquet',
  'data/{}[-._0-9]*parquet',
  '{}/*.parquet',
  'default/{}/*.parquet',
)
# Maximum bytes of a row group that is read for one row: by default, and if gin requests it. A core
# reads about 1 MB per millisecond, and decodes a picture of 256 pixels in about 4.
_SMALL, _LARGEST = 2**22, 2**28
# Bytes of row groups that a process caches, over all shares.
_KEPT = 2**28
# Minimum rows of a part of a file: consecutive row groups that are read from their beginning. A
# shard of the token cache has as many examples.
_PART = 16_384
# Footers read at once.
_AT_ONCE = 16


class ParquetSource(paths.FilesSource):
  """Parquet files; `configured` describes the arguments."""

  def __init__(
    self,
    path: str,
    splits: Mapping[str, str] | None,
    image_key: str | None,
    caption_key: str | None,
    shuffle: str | None,
  ):
    super().__init__('parquet', path, found_splits(path) if splits is None else splits)
    self._keys, self._shuffle = (image_key, caption_key), shuffle

  def open(self, split: str, pictures: bool = True) -> base.Records | base.Shards:
    from parti_jax.data.readers import parquet_files

    files = self.files(split)
    find = functools.partial(_find, keys=self._keys, pictures=pictures)
    if storage.is_url(files[0]):
      if self._shuffle == 'global':
        raise UserError(f"parquet.shuffle='global' needs files on a disk, but {files[0]} is a URL")
      parquet_files.read_footer(files[0], find)
      return _Parts({file: (file, None) for file in files}, find)
    with concurrent.futures.ThreadPoolExecutor(_AT_ONCE) as executor:
      footers = list(executor.map(functools.partial(parquet_files.read_footer, find=find), files))
    if self._is_global(np.concatenate([footer.sizes for footer in footers]), split):
      return _Rows(files, footers)
    return _Parts(_parts(files, footers), find)

  def _is_global(self, sizes: Int64[np.ndarray, 'groups'], split: str) -> bool:
    """Returns whether rows are read in any order, given the bytes of all row groups."""
    largest = int(sizes.max(initial=0))
    size = f'row groups of up to {largest / 2**20:,.0f} MiB'
    if self._shuffle == 'global' and largest > _LARGEST:
      raise UserError(
        f"parquet.shuffle='global' is not possible with {size}, each of which would "
        f"be read for one row; set parquet.shuffle='window', or write {self.place} "
        'with smaller ones'
      )
    if self._shuffle is None and largest > _SMALL and sizes.sum() > _KEPT:
      logging.info(
        "%s, %s: has %s, so it is shuffled within windows (parquet.shuffle='window')",
        self.place,
        split,
        size,
      )
      return False
    return self._shuffle != 'window'


def _find(
  schema: pa.Schema, file: str, keys: tuple[str | None, str | None], pictures: bool
) -> arrow_rows.Columns:
  from parti_jax.data.readers import arrow_rows

  return arrow_rows.find(schema, 'parquet', file, *keys, pictures)


def found_splits(path: str) -> dict[str, str]:
  """Returns the splits of a folder according to its file names, as patterns within the folder.

  The splits are 'train', 'validation' and 'test' if files have these names or their usual
  abbreviations, as on the Hugging Face hub. Otherwise all files form the split 'train'.
  """
  for pattern in _PATTERNS:
    found = {}
    for split, names in _SPLITS.items():
      named = [pattern.format(name) for name in names]
      found[split] = next(
        (one for one in named if storage.glob(file_patterns.join(path, one))), None
      )
    if found['train']:
      return {split: one for split, one in found.items() if one}
  others = '|'.join(name for names in _SPLITS.values() for name in names)
  for name in storage.names(path):
    if re.fullmatch(rf'({others})[-._0-9].*parquet', name):
      raise UserError(
        f'parquet: {path} has {name} but no file of the split train; set '
        "parquet.splits, such as {'train': 'FILES', 'validation': 'FILES'}"
      )
  return {'train': '*.parquet'}


def has_pictures(path: str) -> bool:
  """Returns whether a folder has captioned pictures, by the first file of its split 'train'."""
  from parti_jax.data.readers import arrow_rows
  from parti_jax.data.readers import parquet_files

  files = storage.glob(file_patterns.join(path, found_splits(path)['train']))
  return bool(files) and arrow_rows.has_pictures(parquet_files.read_schema(files[0]))


def _parts(
  files: Sequence[str], footers: Sequence[parquet_files.Footer]
) -> dict[str, tuple[str, range]]:
  """Returns {name: (file, row groups)} of the parts that are read from their beginning."""
  found = {}
  for file, footer in zip(files, footers):
    first, rows = 0, 0
    for group, count in enumerate(footer.rows):
      rows += int(count)
      if rows >= _PART or group == len(footer.rows) - 1:
        found[f'{file}, row groups {first} to {group}'] = file, range(first, group + 1)
        first, rows = group + 1, 0
  return found


class _Parts(base.Shards):
  """Files, or ranges of their row groups, that are read from their beginning.

  Args:
    parts: name -> file and row groups; None for the whole file.
    find: finds the columns, as in `parquet_files.read`.
  """

  def __init__(self, parts: Mapping[str, tuple[str, range | None]], find: parquet_files.Find):
    self.files, self._parts, self._find = list(parts), dict(parts), find

  def digest(self) -> str:
    return base.digest_of([self._parts[name][0] for name in self.files])

  def read(self, file: str) -> Iterator[base.Example | Damaged]:
    from parti_jax.data.readers import parquet_files

    yield from parquet_files.read(*self._parts[file], self._find)


class _Rows(base.Records):
  """The rows of files on a disk, with their footers."""

  _numbers = itertools.count()

  def __init__(self, files: Sequence[str], footers: Sequence[parquet_files.Footer]):
    self._files, self._columns = list(files), [footer.columns for footer in footers]
    groups = [len(footer.rows) for footer in footers]
    self._rows = np.concatenate([footer.rows for footer in footers])
    self._ends = np.cumsum(self._rows)
    # The file of each row group, and its index in the file.
    self._file_of = np.repeat(np.arange(len(files), dtype=np.int32), groups)
    self._number_of = np.concatenate([np.arange(count, dtype=np.int32) for count in groups])
    self._key = next(self._numbers)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def digest(self) -> str:
    rows = xxhash.xxh3_64_hexdigest(self._rows.tobytes())
    return f'{base.digest_of(self._files)} {rows}'

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._key = next(self._numbers)

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    wanted = np.asarray(indices)
    groups = np.searchsorted(self._ends, wanted, side='right')
    rows = wanted - (self._ends - self._rows)[groups]
    # Group by group, so that each is read once.
    found = {
      position: self._example(int(groups[position]), int(rows[position]))
      for position in np.argsort(groups, kind='stable').tolist()
    }
    return [found[position] for position in range(len(wanted))]

  def _example(self, group: int, row: int) -> base.Example | Damaged:
    from parti_jax.data.readers import parquet_files

    file = int(self._file_of[group])
    path = self._files[file]

    def read_group() -> parquet_files.WholeGroup:
      metadata = _cache().get((self._key, file), lambda: parquet_files.Metadata(path)).value
      return parquet_files.WholeGroup(
        path, metadata, int(self._number_of[group]), int(self._rows[group]), self._columns[file]
      )

    try:
      return _cache().get((self._key, file, group), read_group).example(row)
    except parquet_files.Unreadable:
      return Damaged('file that is gone or cannot be read', file=path)


@functools.cache
def _cache() -> parquet_files.Cache:
  from parti_jax.data.readers import parquet_files

  return parquet_files.Cache(_KEPT)


@gin.configurable('parquet')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] | None = None,
  image_key: str | None = None,
  caption_key: str | None = None,
  shuffle: str | None = None,
) -> ParquetSource:
  """Returns a source of Parquet files with a column of encoded pictures and one of captions.

  Args:
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder, in the syntax of `file_patterns`.
      None for the result of `found_splits`.
    image_key: column of the pictures; None for one of `arrow_rows.PICTURE_KEYS`.
    caption_key: column of the captions; None for one of `arrow_rows.CAPTION_KEYS`.
    shuffle: 'global' to shuffle all rows, which are read in any order; 'window' to shuffle files,
      in parts of about 16,000 rows, and their rows within a window. A whole row group is read for
      one row. So None means 'window' at URLs, and if a row group has more than 4 MiB and all rows
      together have more than 256 MiB; otherwise it means 'global'.

  Raises:
    UserError: the path isn't set, or `shuffle` is unknown.
  """
  if shuffle not in (None, *SHUFFLES):
    raise UserError(f'parquet.shuffle={shuffle!r} is not one of {", ".join(SHUFFLES)}')
  return ParquetSource(paths.required('parquet', path), splits, image_key, caption_key, shuffle)

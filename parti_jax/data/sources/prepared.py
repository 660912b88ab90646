"""Prepared pictures: ArrayRecord shards written by `parti-jax prepare`.

A folder with shards `SPLIT-00000.array_record` ... and `info.json`:

  {"kind": "prepared pictures", "version": 1,
   "splits": {"train": {"examples": 3588, "shards": [
       {"examples": 3588, "bytes": 7651234, "digest": "5d3c..."}]}}}

A record consists of the lengths of the caption and of the description, each a little-endian uint32;
then the caption in UTF-8, the description in JSON, and the encoded picture. The description holds
'key' and 'columns' of the source, and 'width' and 'height' of the picture before resizing. A split
appears in `info.json` only when all its shards are in place.
"""

from __future__ import annotations

import functools
import json
import struct
from collections.abc import Mapping
from typing import Any

import gin
import xxhash

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache_info
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import array_records
from parti_jax.data.sources import base
from parti_jax.data.sources import paths

KIND, VERSION = 'prepared pictures', 1
_LENGTHS = struct.Struct('<II')
_MAX_INFO = 2**28
_HOW_TO_MAKE = 'run `parti-jax prepare`'
_FOREIGN = Damaged('record that is not of a prepared picture')


def serialized(picture: bytes, caption: str, description: Mapping[str, Any]) -> bytes:
  """Returns the record of an example."""
  text, described = caption.encode(), json.dumps(description, sort_keys=True).encode()
  return _LENGTHS.pack(len(text), len(described)) + text + described + picture


def parsed(record: bytes, describe: bool = False) -> base.Example | Damaged:
  """Parses a record into an example.

  Args:
    record: a record from `serialized`.
    describe: whether to add 'key' and 'columns'.
  """
  start = _LENGTHS.size
  if len(record) < start:
    return _FOREIGN
  text, described = _LENGTHS.unpack_from(record)
  end = start + text + described
  if len(record) <= end:
    return _FOREIGN
  example = {'picture': record[end:], 'caption': record[start : start + text]}
  if describe:
    try:
      description = json.loads(record[start + text : end])
      example |= {'key': description['key'], 'columns': description['columns']}
    except (ValueError, LookupError, TypeError, RecursionError):
      return _FOREIGN
  return example


def read_info(folder: str) -> dict[str, Any]:
  """Reads the `info.json` of a folder.

  Raises:
    UserError: the folder is missing or doesn't hold prepared pictures.
  """
  path = storage.join(folder, 'info.json')
  if not storage.exists(path):
    what = 'is not finished' if storage.exists(folder) else 'does not exist'
    raise UserError(
      f'the folder of prepared pictures {folder} {what}; {_HOW_TO_MAKE} (gin: prepared.path)'
    )
  try:
    info = storage.read_json(path, _MAX_INFO)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} again') from error
  if not isinstance(info, dict) or info.get('kind') != KIND:
    raise UserError(
      f'{folder} does not hold prepared pictures: its info.json describes something '
      'else (gin: prepared.path)'
    )
  if info.get('version') != VERSION:
    raise UserError(f'{folder} was written by another version of parti_jax; {_HOW_TO_MAKE} again')
  if not token_cache_info.are_splits(info.get('splits')):
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} again')
  return info


class PreparedSource(base.Source):
  """Prepared pictures; `configured` describes the arguments.

  Attributes:
    path: the folder.

  Raises:
    UserError: `read_info` raises it.
  """

  def __init__(self, path: str, shuffle: str | None = None):
    self._splits = read_info(path)['splits']
    super().__init__('prepared', tuple(self._splits))
    self.place = f'prepared pictures {path}'
    self.path = path
    self._complete: dict[str, list[str]] = {}
    self._shuffle = shuffle or ('window' if storage.is_url(path) else 'global')

  def check_split(self, split: str) -> None:
    if split not in self.splits:
      raise UserError(
        f'{self.place}: no finished split {split!r}; finished: '
        f'{", ".join(self.splits) or "none"}; {_HOW_TO_MAKE}'
      )

  def open(self, split: str, pictures: bool = True) -> base.Records | base.Shards:
    del pictures  # Records are always read as a whole.
    return self._open(split, describe=False)

  def open_described(self, split: str) -> base.Records | base.Shards:
    return self._open(split, describe=True)

  def _open(self, split: str, describe: bool) -> base.Records | base.Shards:
    self.check_split(split)
    files = self._files(split)
    parse = functools.partial(parsed, describe=describe)
    if self._shuffle == 'window':
      return array_records.ShardStreams(files, parse)
    shards = self._splits[split]['shards']
    digests = ''.join(str(shard.get('digest')) for shard in shards)
    return array_records.ShardRecords(
      files,
      [shard['examples'] for shard in shards],
      parse,
      xxhash.xxh3_64_hexdigest(digests.encode()),
    )

  def _files(self, split: str) -> list[str]:
    """Returns the files of a split, after checking their sizes."""
    if split not in self._complete:
      self._complete[split] = self._complete_files(split)
    return self._complete[split]

  def _complete_files(self, split: str) -> list[str]:
    shards = self._splits[split]['shards']
    names = [token_cache_info.shard_name(split, index) for index in range(len(shards))]
    files = array_records.complete_files(self.path, names, shards, self.place, _HOW_TO_MAKE)
    first = next(number for number, shard in enumerate(shards) if shard['examples'])
    if not array_records.first_fits(files[first], shards[first]['examples'], parsed):
      raise UserError(
        f'{files[first]} is damaged: its first record is not a prepared picture; '
        f'{_HOW_TO_MAKE} again'
      )
    return files


@gin.configurable('prepared')
def configured(path: str | None = None, shuffle: str | None = None) -> PreparedSource:
  """Returns a source of pictures filtered, resized and encoded by `parti-jax prepare`.

  Args:
    path: the folder that it wrote.
    shuffle: 'global' to shuffle all examples, which are read in any order; 'window' to shuffle
      shards and, within a window, their examples; None for 'global' on disks and 'window' at URLs.

  Raises:
    UserError: the path isn't set, the pictures don't exist, or `shuffle` is unknown.
  """
  if shuffle not in (None, *array_records.SHUFFLES):
    raise UserError(
      f'prepared.shuffle={shuffle!r} is not one of {", ".join(array_records.SHUFFLES)}'
    )
  return PreparedSource(paths.required('prepared', path), shuffle)

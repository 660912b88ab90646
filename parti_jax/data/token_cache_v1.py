"""Reads token caches of version 1, TFRecords of tf.train.Example, to convert them.

A folder with shards `SPLIT-00000.tfrecord` ... and `info.json`:

  {"codebook_size": 8192, "image_tokens": 1024, "tokenizer": "9f8e...",
   "splits": {"train": {"examples": 3588, "shards": 1, "bytes": [3871234]}}}

`bytes`, the size of each shard, is missing from the oldest caches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import tally
from parti_jax.data import token_cache
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import tfrecords


class OldCache:
  """A token cache of version 1.

  Args:
    path: the cache's folder.

  Attributes:
    place: description of the cache, for messages.
    info: the content of its `info.json`, without the splits.
    splits: names of the splits.

  Raises:
    UserError: the folder holds no such cache.
  """

  def __init__(self, path: str):
    self._path, self.place = path, f'the token cache {path}'
    try:
      info = storage.read_json(storage.join(path, 'info.json'))
    except FileNotFoundError as error:
      raise UserError(f'--convert={path} is not a token cache: it has no info.json') from error
    except ValueError as error:
      raise UserError(f'--convert={path}: info.json is damaged') from error
    if isinstance(info, dict) and info.get('version', 1) != 1:
      raise UserError(f'--convert={path}: this token cache already has version {info["version"]}')
    if not _is_valid(info):
      raise UserError(f'--convert={path}: info.json is damaged, or not that of a token cache')
    self._splits = info.pop('splits')
    self.info, self.splits = info, tuple(self._splits)

  def check_split(self, split: str) -> None:
    """Raises UserError unless the cache has this split."""
    if split not in self._splits:
      raise UserError(f'{self.place} has no split {split!r}; it has {", ".join(self.splits)}')

  def files(self, split: str) -> list[str]:
    """Returns the shards of a split.

    Raises:
      UserError: a shard is missing or truncated.
    """
    entry, sizes, files = self._splits[split], storage.sizes(self._path), []
    for index in range(entry['shards']):
      name = f'{split}-{index:05d}.tfrecord'
      file = storage.join(self._path, name)
      if name not in sizes:
        raise UserError(f'{file} is missing; copy it again, or tokenize the pictures again')
      wanted = entry['bytes'][index] if entry.get('bytes') else sizes[name]
      if sizes[name] != wanted:
        raise UserError(
          f'{file} is damaged: it has {sizes[name]:,} bytes, but was written with {wanted:,}; '
          'copy it again, or tokenize the pictures again'
        )
      files.append(file)
    return files

  def records(self, file: str, skipped: Counter[str]) -> Iterator[bytes]:
    """Yields the examples of a shard as records of the current format; counts damaged ones."""
    for record in tfrecords.raw(file):
      found = record if isinstance(record, Damaged) else self._converted(record['record'])
      if isinstance(found, Damaged):
        skipped[found.reason] += 1
        tally.warn_once(found.reason, file)
      else:
        yield found

  def _converted(self, record: bytes) -> bytes | Damaged:
    features = tfrecords.features_of(record)
    if features is None or not {'caption', 'targets'} <= set(features):
      return Damaged('record of something else')
    captions, tokens = features['caption'].bytes_list.value, features['targets'].int64_list.value
    try:
      (caption,) = captions
      return token_cache.serialized(
        caption.decode(), np.array(tokens, np.int64), {**self.info, 'views': 1}
      )
    except ValueError:
      return Damaged('record of another token cache')


def _is_valid(info: Any) -> bool:
  whole = lambda value: type(value) is int and 1 <= value < 2**40  # Excludes bool.
  if not (
    isinstance(info, Mapping)
    and isinstance(info.get('splits'), dict)
    and all(whole(info.get(name)) for name in ('codebook_size', 'image_tokens'))
    and isinstance(info.get('tokenizer'), str)
  ):
    return False
  for split in info['splits'].values():
    if not isinstance(split, dict) or not whole(split.get('shards')):
      return False
    sizes = split.get('bytes')
    if sizes is not None and not (
      isinstance(sizes, list)
      and len(sizes) == split['shards']
      and all(type(size) is int for size in sizes)
    ):
      return False
  return True

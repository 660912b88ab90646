"""The token cache: captions with the image tokens that a frozen tokenizer assigned.

A folder with ArrayRecord shards `SPLIT-00000.array_record` ... and `info.json`:

  {"version": 2, "codebook_size": 8192, "image_tokens": 1024, "tokenizer": "9f8e...", "views": 1,
   "splits": {"train": {"examples": 3588, "shards": [
       {"examples": 3588, "bytes": 7651234, "digest": "5d3c..."}]}}}

A record consists of the tokens of each view of a picture, in little-endian uint16, or uint32 for
codebooks with more than 65,536 codes, and then the caption in UTF-8. A split appears in `info.json`
only when all its shards are in place. Opening a split checks the shards' sizes, since a truncated
shard would open as empty. `damaged_shards` checks the digests (XXH3) of their content.
"""

from __future__ import annotations

import functools
import itertools
import os
import tempfile
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np
from jaxtyping import Int

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache_info
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import array_records
from parti_jax.data.sources import base

EXAMPLES_PER_SHARD = 16_384
SHUFFLES = array_records.SHUFFLES
# The image tokens of a picture, or of several views of it.
Tokens = Int[np.ndarray, 'image_tokens'] | Int[np.ndarray, 'views image_tokens']


def dtype_of(info: Mapping[str, Any]) -> np.dtype:
  """Returns the dtype in which a cache stores its tokens."""
  return np.dtype('<u2' if info['codebook_size'] <= 2**16 else '<u4')


def serialized(caption: str, tokens: Tokens, info: Mapping[str, Any]) -> bytes:
  """Returns the record of an example.

  Args:
    caption: the caption.
    tokens: the image tokens, with an axis of views if `info` has several.
    info: info of the cache.

  Raises:
    ValueError: the tokens don't fit `info`.
  """
  views, count, codes = info.get('views', 1), info['image_tokens'], info['codebook_size']
  tokens = np.asarray(tokens)
  if tokens.shape not in ((count,), (views, count)) or (views > 1 and tokens.ndim == 1):
    wanted = (count,) if views == 1 else (views, count)
    raise ValueError(f'tokens have the shape {tokens.shape}, expected {wanted}')
  if tokens.min() < 0 or tokens.max() >= codes:
    raise ValueError(
      f'tokens range from {tokens.min()} to {tokens.max()}, beyond a codebook of {codes}'
    )
  return tokens.astype(dtype_of(info)).tobytes() + caption.encode()


def write_shard(path: str, records: Iterable[bytes]) -> dict[str, Any]:
  """Writes a shard atomically.

  Args:
    path: path of the shard, on a disk or a URL.
    records: records from `serialized`.

  Returns:
    'examples', 'bytes' and 'digest' of the shard, for `info.json`.
  """
  from array_record.python import array_record_module

  folder = tempfile.gettempdir() if storage.is_url(path) else os.path.dirname(path) or '.'
  os.makedirs(folder, exist_ok=True)
  handle, unfinished = tempfile.mkstemp('.unfinished', f'.{storage.name(path)}.', folder)
  os.close(handle)
  try:
    # One record per group, since records are read one by one, in any order.
    writer = array_record_module.ArrayRecordWriter(unfinished, 'group_size:1')
    count = 0
    for record in records:
      writer.write(record)
      count += 1
    writer.close()
    found = {
      'examples': count,
      'bytes': os.path.getsize(unfinished),
      'digest': token_cache_info.digest(unfinished),
    }
    if storage.is_url(path):
      storage.upload(unfinished, path)
    else:
      with open(unfinished, 'rb') as file:
        os.fsync(file.fileno())
      os.chmod(unfinished, 0o644)
      os.replace(unfinished, path)
    return found
  finally:
    if os.path.exists(unfinished):
      os.remove(unfinished)


def write_token_cache(
  folder: str, examples: Iterable[tuple[str, Tokens]], info: dict, split: str = 'train'
) -> int:
  """Writes a split of a token cache; the split appears when it is complete.

  Args:
    folder: the cache's folder; created if it doesn't exist. Its other splits stay unchanged.
    examples: captions and their image tokens, as in `serialized`, each in [0, codebook_size).
    info: 'codebook_size' (int), 'image_tokens' (int) and 'tokenizer' (str, a fingerprint of the
      tokenizer's weights); additional entries are stored too.
    split: the split's name.

  Returns:
    The number of examples.

  Raises:
    UserError: the folder holds tokens of another tokenizer, or can't be written; or the split's
      name can't be part of a file name.
    ValueError: tokens don't fit `info`, or an entry of `info` is missing.
  """
  token_cache_info.check_split_name(split)
  missing = [key for key in token_cache_info.KEYS if key not in info]
  if missing:
    raise ValueError(f'info has no {", ".join(missing)}')
  unfinished = storage.join(folder, f'.{token_cache_info.file_part(split)}.unfinished')
  try:
    token_cache_info.other_splits(folder, info, (split,))
    token_cache_info.remove_folder(unfinished)
    try:
      entry = token_cache_info.split_info(_write_shards(unfinished, examples, info))
      token_cache_info.put_in_place(
        folder,
        info,
        split,
        entry,
        [
          storage.join(unfinished, token_cache_info.shard_name('shard', index))
          for index in range(len(entry['shards']))
        ],
      )
    finally:
      token_cache_info.remove_folder(unfinished)
  except OSError as error:
    raise token_cache_info.cannot_write(folder, error) from error
  return entry['examples']


def _write_shards(
  folder: str, examples: Iterable[tuple[str, Tokens]], info: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Writes examples to shards in `folder` and returns the entry of each for `info.json`."""
  found: list[dict[str, Any]] = []
  examples = iter(examples)
  first = next(examples, None)
  if first is None:
    raise UserError('no examples to write to the token cache')
  while first is not None:
    shard = itertools.chain([first], itertools.islice(examples, EXAMPLES_PER_SHARD - 1))
    records = (serialized(caption, tokens, info) for caption, tokens in shard)
    name = token_cache_info.shard_name('shard', len(found))
    found.append(write_shard(storage.join(folder, name), records))
    first = next(examples, None)
  return found


class TokenCacheSource(base.Source):
  """The token cache as a source of {'caption': bytes, 'tokens': int32 [image_tokens]}.

  Records damaged on disk are skipped and counted like any unreadable example. Truncated shards
  raise an error when a split is opened.

  Args:
    path: the cache's folder.
    shuffle: 'global' to read records in any order; 'window' to read shards from their beginning,
      each by one share; None for 'global' on disks and 'window' at URLs.

  Attributes:
    info: the result of `token_cache_info.read_info`.

  Raises:
    UserError: `token_cache_info.read_info` raises it.
  """

  def __init__(self, path: str, shuffle: str | None = None):
    self.info = token_cache_info.read_info(path)
    super().__init__(f'the token cache {path}', tuple(self.info['splits']))
    self._path = path
    self._complete: dict[str, list[str]] = {}
    self._parse = functools.partial(_parsed, info=self.info)
    self._shuffle = shuffle or ('window' if storage.is_url(path) else 'global')

  def check_split(self, split: str) -> None:
    if split not in self.splits:
      finished = ', '.join(self.splits) or 'none'
      raise UserError(
        f'{self.name} has no finished split {split!r}; it has {finished}; '
        f'{token_cache_info.HOW_TO_MAKE}'
      )

  def open(self, split: str, pictures: bool = True) -> base.Records | base.Shards:
    del pictures  # A token cache has none.
    self.check_split(split)
    files = self._files(split)
    if self._shuffle == 'window':
      return array_records.ShardStreams(files, self._parse)
    counts = [shard['examples'] for shard in self.info['splits'][split]['shards']]
    return array_records.ShardRecords(files, counts, self._parse)

  def _files(self, split: str) -> list[str]:
    """Returns the files of a split, after checking their sizes."""
    if split not in self._complete:
      self._complete[split] = self._complete_files(split)
    return self._complete[split]

  def _complete_files(self, split: str) -> list[str]:
    shards = self.info['splits'][split]['shards']
    names = [token_cache_info.shard_name(split, index) for index in range(len(shards))]
    files = array_records.complete_files(
      self._path, names, shards, self.name, token_cache_info.HOW_TO_MAKE
    )
    # Records of another cache would fail in the middle of a run.
    if not array_records.first_fits(files[0], shards[0]['examples'], self._parse):
      raise UserError(
        f'{files[0]} is damaged: its first record is not one of {self.name}; '
        f'{token_cache_info.HOW_TO_MAKE} again'
      )
    return files

  def damaged_shards(self, split: str) -> Iterator[str]:
    """Yields the shards of a split whose content has changed; reads all of them."""
    for file, shard in zip(self._files(split), self.info['splits'][split]['shards']):
      if shard.get('digest') not in (None, token_cache_info.digest(file)):
        yield file


def _parsed(record: bytes, info: Mapping[str, Any]) -> base.Example | Damaged:
  """Parses a record of a cache with this `info` into an example."""
  dtype, shape = dtype_of(info), (info['views'], info['image_tokens'])
  size = dtype.itemsize * shape[0] * shape[1]
  if len(record) < size:
    return Damaged('record of another token cache')
  tokens = np.frombuffer(record, dtype, shape[0] * shape[1])
  if tokens.max() >= info['codebook_size']:
    return Damaged('record of another token cache')
  tokens = tokens.astype(np.int32)
  return {'caption': record[size:], 'tokens': tokens if shape[0] == 1 else tokens.reshape(shape)}


@gin.configurable('token_cache')
def configured(path: str | None = None, shuffle: str | None = None) -> TokenCacheSource:
  """Returns the token cache as a source.

  Args:
    path: the cache's folder.
    shuffle: 'global' to shuffle all examples, which are read in any order; 'window' to shuffle
      shards and, within a window, their examples; None for 'global' on disks and 'window' at URLs.

  Raises:
    UserError: the path isn't set, the cache doesn't exist, or `shuffle` is unknown.
  """
  if path is None:
    scope = ''.join(f'{part}/' for part in gin.current_scope())
    raise UserError(
      f'{scope}token_cache.path is not set; give --gin.{scope}token_cache.path='
      f'"\'FOLDER\'"; {token_cache_info.HOW_TO_MAKE}'
    )
  if shuffle not in (None, *SHUFFLES):
    raise UserError(f'token_cache.shuffle={shuffle!r} is not one of {", ".join(SHUFFLES)}')
  return TokenCacheSource(path, shuffle)

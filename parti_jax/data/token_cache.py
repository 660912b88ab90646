"""The token cache: captions with the image tokens that a frozen tokenizer assigned.

A folder with ArrayRecord shards `SPLIT-00000.array_record` ... and `info.json`:

  {"version": 2, "codebook_size": 8192, "image_tokens": 1024, "grid": [32, 32],
   "tokenizer": "9f8e...", "views": 1,
   "splits": {"train": {"examples": 3588, "shards": [
       {"examples": 3588, "bytes": 7651234, "digest": "5d3c..."}]}}}

`grid`, rows and columns, is missing in caches of earlier releases, whose pictures are square.

A record consists of the tokens of each view of a picture, in little-endian uint16, or uint32 for
codebooks with more than 65,536 codes, and then the caption in UTF-8. With text features
(`text_features`), which make the version 3, the number of the caption's bytes in uint32 precedes the
caption, and the features of each of its texts follow. A split appears in `info.json` only when all
its shards are in place. Opening a split checks the shards' sizes, since a truncated
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
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
from jaxtyping import Int

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import text_features as text_features_lib
from parti_jax.data import token_cache_info
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import array_records
from parti_jax.data.sources import base

EXAMPLES_PER_SHARD = 16_384
# Text features are a hundred times as large as image tokens.
EXAMPLES_PER_SHARD_WITH_TEXT_FEATURES = 1024
SHUFFLES = array_records.SHUFFLES
# The image tokens of a picture, or of several views of it.
Tokens = Int[np.ndarray, 'image_tokens'] | Int[np.ndarray, 'views image_tokens']
# Bytes of a caption before text features.
_CAPTION_SIZE = np.dtype('<u4')


def dtype_of(info: Mapping[str, Any]) -> np.dtype:
  """Returns the dtype in which a cache stores its tokens."""
  return np.dtype('<u2' if info['codebook_size'] <= 2**16 else '<u4')


def serialized(
  caption: str,
  tokens: Tokens,
  info: Mapping[str, Any],
  features: Sequence[text_features_lib.Rows] | None = None,
) -> bytes:
  """Returns the record of an example.

  Args:
    caption: the caption.
    tokens: the image tokens, with an axis of views if `info` has several.
    info: info of the cache.
    features: the text features of each of the caption's texts, if `info` has text features.

  Raises:
    ValueError: the tokens or the features don't fit `info`.
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
  start, text = tokens.astype(dtype_of(info)).tobytes(), caption.encode()
  described = text_features_lib.of_info(info)
  if described is None and features is None:
    return start + text
  texts = len(captions.alternatives(text))
  if described is None or features is None or len(features) != texts:
    raise ValueError(f'text features of {len(features or ())} texts, expected those of {texts}')
  size = np.array(len(text), _CAPTION_SIZE).tobytes()
  return b''.join([start, size, text, *map(described.to_bytes, features)])


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
  folder: str, examples: Iterable[tuple], info: dict, split: str = 'train'
) -> int:
  """Writes a split of a token cache; the split appears when it is complete.

  Args:
    folder: the cache's folder; created if it doesn't exist. Its other splits stay unchanged.
    examples: captions and their image tokens, as in `serialized`, each in [0, codebook_size); and
      text features if `info` has them.
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
  folder: str, examples: Iterable[tuple], info: Mapping[str, Any]
) -> list[dict[str, Any]]:
  """Writes examples to shards in `folder` and returns the entry of each for `info.json`."""
  found: list[dict[str, Any]] = []
  examples = iter(examples)
  first = next(examples, None)
  if first is None:
    raise UserError('no examples to write to the token cache')
  while first is not None:
    shard = itertools.chain([first], itertools.islice(examples, EXAMPLES_PER_SHARD - 1))
    records = (serialized(caption, tokens, info, *features) for caption, tokens, *features in shard)
    name = token_cache_info.shard_name('shard', len(found))
    found.append(write_shard(storage.join(folder, name), records))
    first = next(examples, None)
  return found


class TokenCacheSource(base.Source):
  """The token cache as a source of {'caption': bytes, 'tokens': int32 [image_tokens]}.

  With text features, examples also have 'text_features', a list with those of each text of the
  caption, [tokens, width].

  Records damaged on disk are skipped and counted like any unreadable example. Truncated shards
  raise an error when a split is opened.

  Args:
    path: the cache's folder.
    shuffle: 'global' to read records in any order; 'window' to read shards from their beginning,
      each by one share; None for 'global' on disks and 'window' at URLs.
    text_features: whether examples have text features, if the cache does.

  Attributes:
    info: the result of `token_cache_info.read_info`.
    text_features: what the cache says about the text features of the examples; None if they have
      none.

  Raises:
    UserError: `token_cache_info.read_info` raises it.
  """

  def __init__(self, path: str, shuffle: str | None = None, text_features: bool = True):
    self.info = token_cache_info.read_info(path)
    super().__init__(f'the token cache {path}', tuple(self.info['splits']))
    stored = text_features_lib.of_info(self.info, self.name)
    self.text_features = stored if text_features else None
    self._path = path
    self._complete: dict[str, list[str]] = {}
    self._parse = functools.partial(
      _parsed, info=self.info, stored=stored, keep=self.text_features is not None
    )
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


def _parsed(
  record: bytes,
  info: Mapping[str, Any],
  stored: text_features_lib.TextFeatures | None = None,
  keep: bool = False,
) -> base.Example | Damaged:
  """Parses a record of a cache with this `info` into an example.

  Args:
    record: the record.
    info: the content of `info.json`.
    stored: its text features.
    keep: whether to return them.
  """
  dtype, shape = dtype_of(info), (info['views'], info['image_tokens'])
  size = dtype.itemsize * shape[0] * shape[1]
  if len(record) < size:
    return Damaged('record of another token cache')
  tokens = np.frombuffer(record, dtype, shape[0] * shape[1])
  if tokens.max() >= info['codebook_size']:
    return Damaged('record of another token cache')
  tokens = tokens.astype(np.int32)
  found: dict[str, Any] = {
    'caption': record[size:],
    'tokens': tokens if shape[0] == 1 else tokens.reshape(shape),
  }
  if stored is None:
    return found
  if len(record) < size + _CAPTION_SIZE.itemsize:
    return Damaged('record of another token cache')
  start = size + _CAPTION_SIZE.itemsize
  end = start + int(np.frombuffer(record, _CAPTION_SIZE, 1, size)[0])
  caption = record[start:end]
  features = stored.from_bytes(record[end:], len(captions.alternatives(caption)))
  if features is None:
    return Damaged('record of another token cache')
  found['caption'] = caption
  return found | {'text_features': features} if keep else found


@gin.configurable('token_cache')
def configured(
  path: str | None = None, shuffle: str | None = None, text_features: bool = True
) -> TokenCacheSource:
  """Returns the token cache as a source.

  Args:
    path: the cache's folder.
    shuffle: 'global' to shuffle all examples, which are read in any order; 'window' to shuffle
      shards and, within a window, their examples; None for 'global' on disks and 'window' at URLs.
    text_features: whether to use the cache's text features, if it has them, in place of running the
      text encoder.

  Raises:
    UserError: the path isn't set, the cache doesn't exist, or another value is invalid.
  """
  if path is None:
    scope = ''.join(f'{part}/' for part in gin.current_scope())
    raise UserError(
      f'{scope}token_cache.path is not set; give --gin.{scope}token_cache.path='
      f'"\'FOLDER\'"; {token_cache_info.HOW_TO_MAKE}'
    )
  if shuffle not in (None, *SHUFFLES):
    raise UserError(f'token_cache.shuffle={shuffle!r} is not one of {", ".join(SHUFFLES)}')
  if type(text_features) is not bool:
    raise UserError(f'token_cache.text_features={text_features!r} must be True or False')
  return TokenCacheSource(path, shuffle, text_features)

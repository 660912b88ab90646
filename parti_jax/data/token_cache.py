"""The token cache: captions with the image tokens that a frozen tokenizer gave their pictures.

A folder with ArrayRecord shards `SPLIT-00000.array_record` ... and `info.json`:

  {"version": 2, "codebook_size": 8192, "image_tokens": 1024, "tokenizer": "9f8e...", "views": 1,
   "splits": {"train": {"examples": 3588, "shards": [
       {"examples": 3588, "bytes": 7651234, "digest": "5d3c..."}]}}}

A record is the tokens of each view of a picture, little-endian uint16, or uint32 for codebooks of
more than 65,536 codes, and then the caption in UTF-8. A split is in `info.json` only when all its
shards are in place. Sizes are compared when a split is opened, since a shard that was cut opens as
an empty one; digests (XXH3) tell whether shards are still what was written, see `damaged_shards`.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import gin
import numpy as np
import xxhash

from parti_jax import storage
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import array_records
from parti_jax.data.sources import base
from parti_jax.errors import UserError

VERSION = 2
EXAMPLES_PER_SHARD = 16_384
SHUFFLES = array_records.SHUFFLES
shard_name = array_records.shard_name
_INFO_KEYS = ('codebook_size', 'image_tokens', 'tokenizer')
_MAX_INFO = 2**28
# What every file system takes in the middle of a name.
_REFUSED = r'\x00-\x1f\x7f/\\<>:"|?*\ud800-\udfff'
_SPLIT = re.compile(rf'[^{_REFUSED}\s.-][^{_REFUSED}]*')
_LONGEST_SPLIT = 200
_HOW_TO_MAKE = '`parti-jax tokenize` makes it'
_PIECE = 2**24


def dtype_of(info: Mapping[str, Any]) -> np.dtype:
  """The dtype in which a cache keeps its tokens."""
  return np.dtype('<u2' if info['codebook_size'] <= 2**16 else '<u4')


def serialized(caption: str, tokens: np.ndarray, info: Mapping[str, Any]) -> bytes:
  """Returns the record of an example.

  Args:
    caption: its text.
    tokens: int32 [image_tokens], or [views, image_tokens] with several views of the picture.
    info: of the cache.

  Raises:
    ValueError: the tokens do not fit `info`.
  """
  views, count, codes = info.get('views', 1), info['image_tokens'], info['codebook_size']
  tokens = np.asarray(tokens)
  if tokens.shape not in ((count,), (views, count)) or (views > 1 and tokens.ndim == 1):
    wanted = (count,) if views == 1 else (views, count)
    raise ValueError(f'tokens have the shape {tokens.shape}, not {wanted}')
  if tokens.min() < 0 or tokens.max() >= codes:
    raise ValueError(
        f'tokens lie in {tokens.min()} to {tokens.max()}, not in a codebook of {codes}')
  return tokens.astype(dtype_of(info)).tobytes() + caption.encode()


def write_shard(path: str, records: Iterable[bytes]) -> dict[str, Any]:
  """Writes a shard, whole or not at all.

  Args:
    path: of the shard, on a disk or a URL.
    records: of `serialized`.

  Returns:
    'examples', 'bytes' and 'digest' of the shard, as `info.json` has them.
  """
  from array_record.python import array_record_module  # pylint: disable=g-import-not-at-top

  folder = tempfile.gettempdir() if storage.is_url(path) else os.path.dirname(path) or '.'
  os.makedirs(folder, exist_ok=True)
  handle, unfinished = tempfile.mkstemp('.unfinished', f'.{storage.name(path)}.', folder)
  os.close(handle)
  try:
    # Records are read one by one, in any order.
    writer = array_record_module.ArrayRecordWriter(unfinished, 'group_size:1')
    count = 0
    for record in records:
      writer.write(record)
      count += 1
    writer.close()
    found = {'examples': count, 'bytes': os.path.getsize(unfinished), 'digest': digest(unfinished)}
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


def digest(path: str) -> str:
  """The XXH3 digest of a file, 32 hexadecimal digits."""
  found = xxhash.xxh3_128()
  with storage.open_file(path) as file:
    while piece := file.read(_PIECE):
      found.update(piece)
  return found.hexdigest()


def write_token_cache(
    folder: str, examples: Iterable[tuple[str, np.ndarray]], info: dict, split: str = 'train'
) -> int:
  """Writes a split of a token cache; the split is there when all of it is.

  Args:
    folder: the cache's folder; made if need be. Other splits in it stay as they are.
    examples: captions and their image tokens, int32 [image_tokens] (see `serialized`), each in
      [0, codebook_size).
    info: 'codebook_size' (int), 'image_tokens' (int) and 'tokenizer' (str, a fingerprint of the
      tokenizer's weights); more entries are kept with them.
    split: the split's name.

  Returns:
    The number of examples.

  Raises:
    UserError: the folder holds tokens of another tokenizer, or can't be written; or the split's
      name can't be part of a file's.
    ValueError: tokens do not fit `info`, or an entry of `info` is missing.
  """
  check_split_name(split)
  missing = [key for key in _INFO_KEYS if key not in info]
  if missing:
    raise ValueError(f'info lacks {", ".join(missing)}')
  unfinished = storage.join(folder, f'.{split}.unfinished')
  try:
    others = other_splits(folder, info, split)
    _remove(unfinished)
    try:
      shards = _write_shards(unfinished, examples, info)
      write_info(folder, {**info, 'splits': others})
      for name in storage.names(folder):
        if is_shard(name, split):
          storage.remove(storage.join(folder, name))
      for index in range(len(shards)):
        storage.move(storage.join(unfinished, shard_name('shard', index)),
                     storage.join(folder, shard_name(split, index)))
      write_info(folder, {**info, 'splits': {**others, split: split_info(shards)}})
    finally:
      _remove(unfinished)
  except OSError as error:
    raise UserError(
        f'the token cache {folder} cannot be written: {error.strerror or error}') from error
  return split_info(shards)['examples']


def check_split_name(split: str) -> None:
  """Raises UserError unless the name of a split can be part of a file's."""
  if not _SPLIT.fullmatch(split) or len(split.encode('utf-8', 'replace')) > _LONGEST_SPLIT:
    raise UserError(f'the split {split[:80]!r} cannot be part of a file name; rename it in the '
                    'source, with letters, digits, spaces and -_.+=, 200 bytes at most')


def split_info(shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """What `info.json` has of a split, of what it has of its shards."""
  return {'examples': sum(shard['examples'] for shard in shards), 'shards': list(shards)}


def is_shard(name: str, split: str) -> bool:
  """Whether a file name is of a shard of a split, of this version or of version 1."""
  stem, _, ending = name.rpartition('.')
  number = stem.removeprefix(f'{split}-')
  return ending in ('array_record', 'tfrecord') and number != stem and number.isdecimal()


def write_info(folder: str, info: Mapping[str, Any]) -> None:
  """Writes `info.json`."""
  storage.write(storage.join(folder, 'info.json'),
                json.dumps({'version': VERSION, 'views': 1, **info}, indent=2))


def _same_name(split: str) -> str:
  """What file systems that fold case and normal forms make of a split's name."""
  return unicodedata.normalize('NFKC', split).casefold()


def other_splits(folder: str, info: Mapping[str, Any], split: str) -> dict[str, Any]:
  """Returns the finished splits that stay, after checking that they are of the same tokenizer.

  Raises:
    UserError: they are not.
  """
  if not storage.exists(storage.join(folder, 'info.json')):
    return {}
  present = read_info(folder)
  splits = {name: value for name, value in present['splits'].items() if name != split}
  for name in splits:
    if _same_name(name) == _same_name(split):
      raise UserError(f'the token cache {folder} holds a split {name!r}, whose files have the same '
                      f'names as those of {split!r} on some file systems; choose another folder')
  for key in (*_INFO_KEYS, 'views'):
    ours = info.get(key, 1) if key == 'views' else info[key]
    if splits and present[key] != ours:
      raise UserError(f'the token cache {folder} holds {", ".join(splits)} with {key} '
                      f'{present[key]}, not {ours}; choose another folder or remove it')
  return splits


def _write_shards(folder: str, examples, info) -> list[dict[str, Any]]:
  """Writes examples to shards in `folder` and returns what each has."""
  found: list[dict[str, Any]] = []
  examples = iter(examples)
  first = next(examples, None)
  if first is None:
    raise UserError('there is no example to write to the token cache')
  while first is not None:
    count = iter(range(EXAMPLES_PER_SHARD - 1))

    def records(first=first, count=count):
      yield serialized(*first, info)
      for _, example in zip(count, examples):
        yield serialized(*example, info)

    found.append(write_shard(storage.join(folder, shard_name('shard', len(found))), records()))
    first = next(examples, None)
  return found


def _remove(folder: str) -> None:
  if storage.is_url(folder):
    for name in storage.names(folder):
      storage.remove(storage.join(folder, name))
  else:
    shutil.rmtree(folder, ignore_errors=True)


def read_info(folder: str) -> dict[str, Any]:
  """Reads the `info.json` of a token cache.

  Args:
    folder: the cache's folder.

  Returns:
    Its entries, see the module's docstring, and what else the writer added.

  Raises:
    UserError: the folder is missing, holds no finished cache, or one of an earlier version.
  """
  path = storage.join(folder, 'info.json')
  if not storage.exists(path):
    what = 'is not finished' if storage.exists(folder) else 'does not exist'
    raise UserError(f'the token cache {folder} {what}; {_HOW_TO_MAKE} (gin: token_cache.path)')
  try:
    info = storage.read_json(path, _MAX_INFO)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} again') from error
  present = info if isinstance(info, dict) else {}
  missing = [key for key in (*_INFO_KEYS, 'splits') if key not in present]
  if missing:
    raise UserError(f'{path} lacks {", ".join(missing)}; {_HOW_TO_MAKE} again')
  if info.get('version', 1) == 1:
    raise UserError(f'the token cache {folder} is of version 1; turn it into one of version '
                    f'{VERSION} with: parti-jax tokenize --convert={folder} --output_dir=FOLDER')
  if not _makes_sense(info):
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} again')
  return info


def _makes_sense(info: Mapping[str, Any]) -> bool:
  """Returns whether the entries that are read are of the right kinds."""
  whole = lambda value: type(value) is int and 1 <= value < 2**40  # No bool.
  return (whole(info['codebook_size']) and whole(info['image_tokens']) and whole(info['views'])
          and info['version'] == VERSION and isinstance(info['tokenizer'], str)
          and array_records.are_splits(info['splits']))


class TokenCacheSource(base.Source):
  """The token cache as a source of {'caption': bytes, 'tokens': int32 [image_tokens]}.

  A record that was damaged on the disk is left out like an example that can't be read anywhere
  else; a shard that was cut is refused when a split is opened.

  Args:
    path: its folder.
    shuffle: 'global' for records that are read in any order; 'window' for shards that are read from
      their beginning, each by one share; None for 'global' on disks and 'window' at URLs.

  Attributes:
    info: of `read_info`.

  Raises:
    UserError: see `read_info`.
  """

  def __init__(self, path: str, shuffle: str | None = None):
    self.info = read_info(path)
    super().__init__(f'the token cache {path}', tuple(self.info['splits']))
    self._path = path
    self._parse = functools.partial(_parsed, info=self.info)
    self._shuffle = shuffle or ('window' if storage.is_url(path) else 'global')

  def check_split(self, split: str) -> None:
    if split not in self.splits:
      finished = ', '.join(self.splits) or 'none'
      raise UserError(f'{self.name} has no finished split {split!r}; it has {finished}; '
                      f'{_HOW_TO_MAKE}')

  def open(self, split: str, pictures: bool = True) -> base.Records | base.Shards:
    del pictures  # There are none.
    self.check_split(split)
    files = self._files(split)
    if self._shuffle == 'window':
      return array_records.ShardStreams(files, self._parse)
    counts = [shard['examples'] for shard in self.info['splits'][split]['shards']]
    return array_records.ShardRecords(files, counts, self._parse)

  @functools.cache
  def _files(self, split: str) -> list[str]:
    """The files of a split, each of the size that it was written with."""
    shards = self.info['splits'][split]['shards']
    files = array_records.complete_files(self._path, split, shards, self.name, _HOW_TO_MAKE)
    self._check_first(files[0], shards[0]['examples'])
    return files

  def _check_first(self, file: str, count: int) -> None:
    """Looks at one record, since those of another cache would fail in the middle of a run."""
    with storage.local_copy(file) as local:
      reader = array_records.Reader(os.fspath(local), self._parse)
      fits = reader.count() == count and (count == 0 or not isinstance(reader.read([0])[0], Damaged))
      reader.close()
    if not fits:
      raise UserError(f'{file} is damaged: its first record is not one of {self.name}; '
                      f'{_HOW_TO_MAKE} again')

  def damaged_shards(self, split: str) -> Iterator[str]:
    """Yields the shards of a split whose bytes are not those that were written; reads all of them."""
    for file, shard in zip(self._files(split), self.info['splits'][split]['shards']):
      if shard.get('digest') not in (None, digest(file)):
        yield file


def _parsed(record: bytes, info: Mapping[str, Any]) -> base.Example | Damaged:
  """Makes an example of a record of a cache with this `info`."""
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
  """The token cache.

  Args:
    path: its folder.
    shuffle: 'global' to shuffle all examples, which are read in any order; 'window' to shuffle
      shards and, within a window, their examples; None for 'global' on disks and 'window' at URLs.

  Raises:
    UserError: the path is not set, or there is no such cache or shuffle.
  """
  if path is None:
    raise UserError(
        "token_cache.path is not set; give --gin.token_cache.path=\"'FOLDER'\"; " + _HOW_TO_MAKE)
  if shuffle not in (None, *SHUFFLES):
    raise UserError(f'token_cache.shuffle={shuffle!r} is not one of {", ".join(SHUFFLES)}')
  return TokenCacheSource(path, shuffle)

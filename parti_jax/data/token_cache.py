"""The token cache: captions with the image tokens that a frozen tokenizer gave their pictures.

A folder with TFRecord shards `SPLIT-00000.tfrecord` ... and `info.json`:

  {"codebook_size": 8192, "image_tokens": 1024, "tokenizer": "9f8e...",
   "splits": {"train": {"examples": 3588, "shards": 1, "bytes": [3871234]}}}

A split is in `info.json` only when all its shards are in place. `bytes`, the size of each shard,
tells when a source is opened that one has been cut; caches of before have none.
"""

import functools
import json
import os
import re
import shutil
import unicodedata
from collections.abc import Iterable

import gin
import numpy as np

from parti_jax import storage
from parti_jax.data import example_files, tfrecords
from parti_jax.data.quiet_tensorflow import seqio, tf
from parti_jax.data.sources import shuffled
from parti_jax.errors import UserError

EXAMPLES_PER_SHARD = 16_384
_INFO_KEYS = ('codebook_size', 'image_tokens', 'tokenizer')
_MAX_INFO = 2**24
# What some file system does not take in the middle of a name, but for colons, see `_file_part`.
_REFUSED = r'\x00-\x1f\x7f/\\<>"|?*\ud800-\udfff'
_SPLIT = re.compile(rf'[^{_REFUSED}\s.-][^{_REFUSED}]*')
_LONGEST_SPLIT = 200
_HOW_TO_MAKE = '`parti-jax tokenize` makes it'


def write_token_cache(
    folder: str, examples: Iterable[tuple[str, np.ndarray]], info: dict, split: str = 'train'
) -> int:
  """Writes a split of a token cache; the split is there when all of it is.

  Args:
    folder: the cache's folder; made if need be. Other splits in it stay as they are.
    examples: captions and their image tokens, int32 [image_tokens], each in [0, codebook_size).
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
  storage.check_local(folder)
  if not _SPLIT.fullmatch(split) or len(split.encode('utf-8', 'replace')) > _LONGEST_SPLIT:
    raise UserError(f'the split {split[:80]!r} cannot be part of a file name; rename it in the '
                    'source, with letters, digits, spaces and -_.+=, 200 bytes at most')
  missing = [key for key in _INFO_KEYS if key not in info]
  if missing:
    raise ValueError(f'info lacks {", ".join(missing)}')
  unfinished = os.path.join(folder, f'.{_file_part(split)}.unfinished')
  try:
    splits = _other_splits(folder, info, split)
    shutil.rmtree(unfinished, ignore_errors=True)
    os.makedirs(unfinished)
    try:
      count = _write_shards(unfinished, examples, info)
      _put_in_place(folder, unfinished, split, info, splits, count)
    finally:
      shutil.rmtree(unfinished, ignore_errors=True)
  except OSError as error:
    raise UserError(f'the token cache {folder} cannot be written: {error.strerror}') from error
  return count


def read_info(folder: str) -> dict:
  """Reads the `info.json` of a token cache.

  Args:
    folder: the cache's folder.

  Returns:
    Its entries: 'codebook_size', 'image_tokens', 'tokenizer', 'splits' (split -> {'examples',
    'shards'}) and what else the writer added.

  Raises:
    UserError: the folder is missing, or holds no finished cache.
  """
  path = storage.join(folder, 'info.json')
  if not storage.exists(path):
    what = 'is not finished' if storage.exists(folder) else 'does not exist'
    raise UserError(f'the token cache {folder} {what}; {_HOW_TO_MAKE} (gin: token_cache.path)')
  try:
    info = storage.read_json(path, _MAX_INFO)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} anew') from error
  present = info if isinstance(info, dict) else {}
  missing = [key for key in (*_INFO_KEYS, 'splits') if key not in present]
  if missing:
    raise UserError(f'{path} lacks {", ".join(missing)}; {_HOW_TO_MAKE} anew')
  if not _makes_sense(info):
    raise UserError(f'{path} is damaged; {_HOW_TO_MAKE} anew')
  return info


def _makes_sense(info: dict) -> bool:
  """Returns whether the entries that are read are of the right kinds."""
  whole = lambda value, least=1: type(value) is int and least <= value < 2**31  # No bool.
  if not (whole(info['codebook_size']) and whole(info['image_tokens'])
          and isinstance(info['tokenizer'], str) and isinstance(info['splits'], dict)):
    return False
  for split in info['splits'].values():
    if not (isinstance(split, dict) and whole(split.get('examples'))
            and whole(split.get('shards'))):
      return False
    sizes = split.get('bytes')
    if sizes is not None and not (isinstance(sizes, list) and len(sizes) == split['shards']
                                  and all(type(size) is int for size in sizes)):
      return False
  return True


class TokenCacheSource(seqio.DataSource):
  """The token cache as a seqio source.

  Its examples are {'caption': tf.string [], 'targets': int32 [tokens], 'problem': tf.string []}, as
  those of `parti_jax.data.sources`. A record that was damaged on the disk is left out like an
  example that can't be read anywhere else; a shard that was cut is refused when a split is opened.
  """

  supports_arbitrary_sharding = True

  def __init__(self, path: str):
    """Opens a token cache.

    Args:
      path: its folder.

    Raises:
      UserError: see `read_info`.
    """
    self.info = read_info(path)
    self.name = f'the token cache {path}'
    self._path = path
    super().__init__(
        splits=tuple(self.info['splits']),
        num_input_examples={k: v['examples'] for k, v in self.info['splits'].items()},
        caching_permitted=False,
        performs_internal_shuffling=True,
    )

  def list_shards(self, split):
    """Returns the files of a split."""
    if split not in self.splits:
      finished = ', '.join(self.splits) or 'none'
      raise UserError(
          f'{self.name} has no finished split {split!r}; it has {finished}; {_HOW_TO_MAKE}'
      )
    return self._files(split)

  @functools.cache
  def _files(self, split: str) -> list[str]:
    info = self.info['splits'][split]
    files = [storage.join(self._path, _shard_name(split, index))
             for index in range(info['shards'])]
    for file, size in zip(files, info.get('bytes') or [None] * len(files)):
      try:
        found = storage.size(file)
      except OSError as error:
        raise UserError(f'{file} is missing from {self.name}; {_HOW_TO_MAKE} anew') from error
      if size not in (None, found):
        raise UserError(f'{file} is damaged: it has {found:,} bytes and had {size:,} when it was '
                        f'written; copy it again, or {_HOW_TO_MAKE} anew')
    self._check_first(files[0])
    return files

  def _check_first(self, file: str) -> None:
    """Looks at one record, since those of another cache would fail in the middle of a run."""
    with storage.open_file(file) as opened:
      record = next(tfrecords.records(opened), None)
    try:
      features = tf.train.Example.FromString(record).features.feature
      fits = len(features['targets'].int64_list.value) == self.info['image_tokens']
      fits = fits and len(features['caption'].bytes_list.value) == 1
    except Exception:  # The protocol buffers' own, or that of what is no record at all.
      fits = False
    if not fits:
      raise UserError(f'{file} is damaged: its first record is none of {self.name}; '
                      f'{_HOW_TO_MAKE} anew')

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None, **unused_seqio_arguments
  ):
    """Reads a split; see `parti_jax.data.sources.PictureSource.get_dataset`."""
    tokens = self.info['image_tokens']
    # What stands for a damaged record is empty.
    features = {
        'caption': tf.io.FixedLenFeature([], tf.string, default_value=''),
        'targets': tf.io.FixedLenFeature([tokens], tf.int64, default_value=[0] * tokens),
    }

    def parse(element):
      example = tf.io.parse_single_example(element['record'], features)
      return {**example, 'targets': tf.cast(example['targets'], tf.int32),
              'problem': element['problem']}

    files = tf.data.Dataset.from_tensor_slices(self.list_shards(split))
    dataset = files.flat_map(
        lambda file: example_files.dataset(tfrecords.raw, file, ['record'])).prefetch(1024)
    if shard_info:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    if shuffle:
      dataset = shuffled(dataset, seed)
    return dataset.map(parse, num_parallel_calls=tf.data.AUTOTUNE)


@gin.configurable('token_cache')
def configured_source(path: str | None = None) -> TokenCacheSource:
  """Returns the token cache in the folder `token_cache.path`."""
  if path is None:
    raise UserError(
        "token_cache.path is not set; give --gin.token_cache.path=\"'FOLDER'\"; " + _HOW_TO_MAKE
    )
  return TokenCacheSource(path)


def _shard_name(split: str, index: int) -> str:
  return f'{_file_part(split)}-{index:05d}.tfrecord'


def _file_part(split: str) -> str:
  """What the names of a split's files begin with; slices such as 'train[:10%]' have colons."""
  return split.replace('%', '%25').replace(':', '%3A')


def _same_name(split: str) -> str:
  """What file systems that fold case and normal forms make of a split's name."""
  return unicodedata.normalize('NFKC', split).casefold()


def _other_splits(folder: str, info: dict, split: str) -> dict:
  """Returns the finished splits that stay, after checking that they are of the same tokenizer."""
  if not os.path.exists(os.path.join(folder, 'info.json')):
    return {}
  present = read_info(folder)
  splits = {name: value for name, value in present['splits'].items() if name != split}
  for name in splits:
    if _same_name(name) == _same_name(split):
      raise UserError(f'the token cache {folder} holds a split {name!r}, whose files have the same '
                      f'names as those of {split!r} on some file systems; choose another folder')
  for key in _INFO_KEYS:
    if splits and present[key] != info[key]:
      raise UserError(
          f'the token cache {folder} holds {", ".join(splits)} with {key} {present[key]}, not '
          f'{info[key]}; choose another folder or remove it'
      )
  return splits


def _write_shards(folder: str, examples, info: dict) -> int:
  """Writes examples to shards in `folder` and returns how many there are."""
  count, writer = 0, None
  try:
    for caption, tokens in examples:
      if count % EXAMPLES_PER_SHARD == 0:
        if writer:
          writer.close()
        name = _shard_name('shard', count // EXAMPLES_PER_SHARD)
        writer = tf.io.TFRecordWriter(os.path.join(folder, name))
      writer.write(_serialize(caption, np.asarray(tokens), info))
      count += 1
  finally:
    if writer:
      writer.close()
  if not count:
    raise UserError('there is no example to write to the token cache')
  return count


def _serialize(caption: str, tokens: np.ndarray, info: dict) -> bytes:
  """Returns an example as a serialised tf.train.Example, after checking its tokens."""
  if tokens.shape != (info['image_tokens'],):
    raise ValueError(f'tokens have the shape {tokens.shape}, not ({info["image_tokens"]},)')
  if tokens.min() < 0 or tokens.max() >= info['codebook_size']:
    raise ValueError(
        f'tokens lie in {tokens.min()} to {tokens.max()}, not in a codebook of '
        f'{info["codebook_size"]}'
    )
  feature = {
      'caption': tf.train.Feature(bytes_list=tf.train.BytesList(value=[caption.encode()])),
      'targets': tf.train.Feature(int64_list=tf.train.Int64List(value=tokens.tolist())),
  }
  return tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()


def _put_in_place(folder, unfinished, split, info, splits, count) -> None:
  """Moves complete shards into the cache; the split is out of `info.json` meanwhile."""
  shards = -(-count // EXAMPLES_PER_SHARD)
  _write_info(folder, {**info, 'splits': splits})
  shard = re.compile(re.escape(_file_part(split)) + r'-\d{5,}\.tfrecord')
  for name in os.listdir(folder):
    if shard.fullmatch(name):
      os.remove(os.path.join(folder, name))
  sizes = []
  for index in range(shards):
    source = os.path.join(unfinished, _shard_name('shard', index))
    sizes.append(os.path.getsize(source))
    os.replace(source, os.path.join(folder, _shard_name(split, index)))
  added = {split: {'examples': count, 'shards': shards, 'bytes': sizes}}
  _write_info(folder, {**info, 'splits': {**splits, **added}})


def _write_info(folder: str, info: dict) -> None:
  path = os.path.join(folder, 'info.json')
  with open(f'{path}.unfinished', 'w', encoding='utf-8') as file:
    json.dump(info, file, indent=2)
  os.replace(f'{path}.unfinished', path)

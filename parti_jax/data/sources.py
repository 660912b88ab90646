"""Where captioned pictures come from: OpenMoji, or one's own folder, TFRecords or tar shards.

Every source is a seqio data source of examples {'picture': the encoded picture, 'caption': text,
'problem': why there is no example, or ''}, all tf.string scalars; `texts` gives the captions alone,
and the source `text` has no more than these. What can't be read stays in its place among the
examples until `preprocessors.leave_out` counts it. `configured(name)` returns one as gin configures
it:

  data.source = 'folder'
  folder.path = 'photos'
  folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}
"""

import abc
import functools
import os
from collections.abc import Iterator, Mapping, Sequence

import gin
import numpy as np
from absl import logging

from parti_jax import checks, storage
from parti_jax.data import captions as captions_lib
from parti_jax.data import (
    decoding, example_files, file_patterns, folder_index, openmoji, streams, tally, tar_shards,
    tfrecords)
from parti_jax.data.quiet_tensorflow import seqio, tf, tfds
from parti_jax.errors import UserError


class PictureSource(seqio.DataSource):
  """Base class: a named source of encoded pictures and captions."""

  supports_arbitrary_sharding = False

  def __init__(self, name: str, splits):
    """Makes a source.

    Args:
      name: the source's name in gin and in messages.
      splits: names of its splits.
    """
    super().__init__(splits=splits, caching_permitted=False, performs_internal_shuffling=True)
    self.name = name
    # For messages: what was read.
    self.place = name

  def list_shards(self, split: str) -> list[str]:
    """Returns the names of the parts in which a split lies."""
    return [split]

  def get_dataset(
      self, split='train', shuffle=True, seed=None, shard_info=None, **unused_seqio_arguments
  ) -> tf.data.Dataset:
    """Reads a split.

    Args:
      split: one of `splits`.
      shuffle: whether to shuffle, still encoded, which takes less memory than decoded.
      seed: makes the order reproducible.
      shard_info: the part of the split to read; None for all of it.

    Returns:
      A dataset of {'picture', 'caption', 'problem'}, all tf.string [].

    Raises:
      UserError: the data can't be found or read.
    """
    self.check_split(split)
    dataset = self._read(split, shuffle, seed, shard_info)
    return shuffled(dataset, seed) if shuffle else dataset

  def texts(self, split='train', shuffle=True, seed=None, shard_info=None) -> tf.data.Dataset:
    """Reads the captions of a split, without pictures where the source can do without them.

    Args:
      split: as in `get_dataset`, like all others.
      shuffle: whether to shuffle.
      seed: makes the order reproducible.
      shard_info: the part of the split to read.

    Returns:
      A dataset of {'caption', 'problem'}, both tf.string [].

    Raises:
      UserError: the data can't be found or read.
    """
    self.check_split(split)
    dataset = self._read_texts(split, shuffle, seed, shard_info)
    return shuffled(dataset, seed) if shuffle else dataset

  def num_texts(self, split: str) -> int | None:
    """Returns the number of captions in a split, None where it takes reading them all."""
    return self.num_input_examples(split)

  def captions(self, split: str) -> Iterator[str]:
    """Yields the captions of a split that can be used in order, without decoding pictures.

    A warning at the end counts the others.
    """
    skipped = tally.Tally()
    with streams.Stream(self.texts(split, shuffle=False)) as examples:
      for example in examples:
        try:
          if example['problem']:
            reason, place = example_files.parts(example['problem'])
            skipped.add(reason, place=place)
          else:
            yield captions_lib.clean(example['caption'])[0]
        except captions_lib.UnusableCaption as error:
          skipped.add(str(error))
    if skipped.counts():
      logging.warning('%s, %s: skipped %s', self.place, split, skipped)

  def check_split(self, split: str) -> None:
    """Raises UserError unless the source has a split."""
    # OpenMoji also takes slices such as 'train[:10%]', as tensorflow-datasets does.
    openmoji_slice = self.name == 'openmoji' and split.split('[')[0] in self.splits
    if split not in self.splits and not openmoji_slice:
      setting = '' if self.name == 'openmoji' else f' (gin: {self.name}.splits)'
      raise UserError(
          f'{self.name} has no split {split!r}; it has {", ".join(self.splits)}{setting}')

  @abc.abstractmethod
  def _read(self, split, shuffle, seed, shard_info) -> tf.data.Dataset:
    """Reads a split; may use `shuffle` to put files in a random order."""

  def _read_texts(self, split, shuffle, seed, shard_info) -> tf.data.Dataset:
    """Reads the captions of a split, as `_read`."""
    return self._read(split, shuffle, seed, shard_info).map(
        lambda example: {name: example[name] for name in ('caption', 'problem')})


@gin.configurable('shuffle')
@checks.bounded(buffer_size=(1, None))
def shuffled(dataset: tf.data.Dataset, seed, buffer_size: int = 10_000) -> tf.data.Dataset:
  """Shuffles in a buffer of `buffer_size` encoded pictures."""
  return dataset.shuffle(buffer_size, seed=seed)


class OpenMojiSource(PictureSource):
  """OpenMoji through its tensorflow-datasets builder, which is run on first use."""

  supports_arbitrary_sharding = True

  def __init__(self, size: int, data_dir: str | None = None):
    """Makes the source.

    Args:
      size: height and width in pixels at which the pictures are drawn.
      data_dir: the folder to build in; None for that of tensorflow-datasets.
    """
    super().__init__('openmoji', openmoji.SPLITS)
    self._size = size
    self._data_dir = data_dir

  @functools.cached_property
  def _builder(self):
    # Imported here for those who have data of their own and no package of pictures.
    from parti_jax.data import openmoji_builder  # pylint: disable=g-import-not-at-top

    return openmoji_builder.prepared(self._size, self._data_dir)

  def _read(self, split, shuffle, seed, shard_info):
    builder = self._builder
    try:
      dataset = builder.as_dataset(
          split=split,
          shuffle_files=False,
          decoders={'image': tfds.decode.SkipDecoding()},
          read_config=tfds.ReadConfig(try_autocache=False),
      )
    except (ValueError, AssertionError) as error:
      raise UserError(f'openmoji has no split {split!r}: {error}') from error
    if shard_info:
      dataset = dataset.shard(shard_info.num_shards, shard_info.index)
    return dataset.map(lambda example: {
        'picture': example['image'], 'caption': example['caption'], 'problem': ''})

  def num_input_examples(self, split):
    """Returns the number of pictures in a split."""
    self.check_split(split)
    return self._builder.info.splits[split].num_examples

  def _read_texts(self, split, shuffle, seed, shard_info):
    # The pictures need not be drawn for this.
    if split not in openmoji.SPLITS:
      return super()._read_texts(split, shuffle, seed, shard_info)
    dataset = _captions_alone(self._captions(split))
    return dataset.shard(shard_info.num_shards, shard_info.index) if shard_info else dataset

  def num_texts(self, split):
    """Returns the number of captions in a split."""
    return (len(self._captions(split)) if split in openmoji.SPLITS
            else self.num_input_examples(split))

  def _captions(self, split: str) -> list[str]:
    return [picture.caption for picture in openmoji.pictures() if picture.split == split]


class FolderSource(PictureSource):
  """A folder of pictures with a captions file for each split."""

  supports_arbitrary_sharding = True

  def __init__(self, path: str, splits: Mapping[str, str], file_key: str, caption_key: str):
    """Makes the source; the arguments are those of `folder`."""
    super().__init__('folder', splits)
    self._path = path
    self.place = f'folder {path}'
    self._captions_files = dict(splits)
    self._keys = (file_key, caption_key)

  @functools.cache
  def _index(self, split: str, pictures: bool = True) -> tuple[np.ndarray, np.ndarray]:
    file = self._captions_files[split]
    if file.endswith('.txt'):
      return folder_index.read_beside(self._path, file)
    return folder_index.read(self._path, file, *self._keys, pictures)

  def _order(self, count: int, shuffle, seed, shard_info) -> np.ndarray:
    """Returns which examples to read; to shuffle the list is cheap and complete."""
    order = np.arange(count)
    if shuffle:
      np.random.default_rng(seed).shuffle(order)
    return order[shard_info.index :: shard_info.num_shards] if shard_info else order

  def _read(self, split, shuffle, seed, shard_info):
    files, captions = self._index(split)
    order = self._order(len(files), shuffle, seed, shard_info)
    dataset = tf.data.Dataset.from_tensor_slices(
        (files[order].tolist(), captions[order].tolist()))

    def read(file, caption):
      picture, problem = tf.numpy_function(
          _picture_file, [file], [tf.string, tf.string], stateful=False)
      return {'picture': tf.ensure_shape(picture, []), 'caption': caption,
              'problem': tf.ensure_shape(problem, [])}

    return dataset.map(read, num_parallel_calls=tf.data.AUTOTUNE)

  def _read_texts(self, split, shuffle, seed, shard_info):
    _, captions = self._index(split, pictures=False)
    order = self._order(len(captions), shuffle, seed, shard_info)
    return _captions_alone(captions[order].tolist())

  def num_texts(self, split):
    """Returns the number of captions in a split."""
    self.check_split(split)
    return len(self._index(split, pictures=False)[1])


class _Files(seqio.FileDataSource):
  """Files by path or by URL, each of many examples."""

  def __init__(self, patterns: Mapping[str, str], read: example_files.Reader, names: Sequence[str]):
    """Makes a source; see `example_files.dataset` for the reader and the names."""
    super().__init__(lambda file: example_files.dataset(read, file, names), patterns)
    self._patterns = patterns

  def list_shards(self, split):
    """Returns the files of a split."""
    return file_patterns.files(self._patterns[split])


class _FilesSource(PictureSource):
  """Several files a split, each of which holds many examples."""

  def __init__(self, name: str, path: str, splits: Mapping[str, str],
               read: example_files.Reader | None, read_texts: example_files.Reader | None = None):
    """Makes a source.

    Args:
      name: as in the base class.
      path: the folder of the files.
      splits: file pattern of each split, relative to the folder.
      read: yields {'picture', 'caption'} of a file; None where there are no pictures.
      read_texts: the same for {'caption'} alone; None where that is no less work.
    """
    super().__init__(name, splits)
    self.place = f'{name} {path}'
    self._patterns = {
        split: file_patterns.join(path, pattern) for split, pattern in splits.items()}
    self._files = _Files(self._patterns, read, ('picture', 'caption'))
    self._text_files = read_texts and _Files(self._patterns, read_texts, ('caption',))

  def list_shards(self, split):
    """Returns the files of a split."""
    settings = f'(gin: {self.name}.path, {self.name}.splits)'
    try:
      files = self._files.list_shards(split)
    except UserError as error:
      raise UserError(f'{self.name}: {error} {settings}') from error
    if not files:
      raise UserError(f'{self.name}: no file matches {self._patterns[split]!r} {settings}')
    return files

  def _read(self, split, shuffle, seed, shard_info):
    self.list_shards(split)
    return self._files.get_dataset(split, shuffle=shuffle, seed=seed, shard_info=shard_info)

  def _read_texts(self, split, shuffle, seed, shard_info):
    if self._text_files is None:
      return super()._read_texts(split, shuffle, seed, shard_info)
    self.list_shards(split)
    return self._text_files.get_dataset(split, shuffle=shuffle, seed=seed, shard_info=shard_info)


class TextSource(_FilesSource):
  """Files of text, one text a line; no pictures."""

  def __init__(self, path: str, splits: Mapping[str, str]):
    """Makes the source; the arguments are those of `text`."""
    super().__init__('text', path, splits, None, example_files.lines)

  def _read(self, split, shuffle, seed, shard_info):
    raise UserError("data.source='text' holds texts without pictures; only the task 'texts' reads "
                    'it; for pictures choose another source')


class TFRecordSource(_FilesSource):
  """TFRecords of tf.train.Example with an encoded picture and a caption."""

  def __init__(self, path: str, splits: Mapping[str, str], image_key: str, caption_key: str):
    """Makes the source; the arguments are those of `tfrecord`."""
    self._keys = {'image_key': image_key, 'caption_key': caption_key}

    def reader(keys):
      return lambda file: tfrecords.examples(file, keys)

    super().__init__(
        'tfrecord', path, splits, reader({'picture': image_key, 'caption': caption_key}),
        reader({'caption': caption_key}))

  def _read(self, split, shuffle, seed, shard_info):
    tfrecords.check_keys(self.list_shards(split), self._keys)
    return super()._read(split, shuffle, seed, shard_info)

  def _read_texts(self, split, shuffle, seed, shard_info):
    tfrecords.check_keys(
        self.list_shards(split), {'caption_key': self._keys['caption_key']})
    return super()._read_texts(split, shuffle, seed, shard_info)


class WebDatasetSource(_FilesSource):
  """Tar shards as img2dataset and webdataset write them."""

  def __init__(self, path: str, splits: Mapping[str, str], caption_key: str | None):
    """Makes the source; the arguments are those of `webdataset`."""
    super().__init__(
        'webdataset', path, splits, lambda file: tar_shards.samples(file, caption_key))


@gin.configurable('openmoji')
@checks.bounded(size=(1, 8192))
def openmoji_source(size: int | None = None, data_dir: str | None = None, image_size: int = 64):
  """OpenMoji.

  Args:
    size: height and width in pixels at which the pictures are drawn; None for that of the run,
      so that nothing is resized.
    data_dir: folder of the drawn pictures; None for that of tensorflow-datasets.
    image_size: the run's picture size, given by the caller.

  Returns:
    The source.
  """
  return OpenMojiSource(size or image_size, data_dir)


@gin.configurable('folder')
def folder_source(
    path: str | None = None,
    splits: Mapping[str, str] = {'train': 'captions.jsonl'},
    file_key: str = 'file',
    caption_key: str = 'caption',
):
  """A folder of pictures with captions in JSON lines.

  Args:
    path: the folder.
    splits: captions file of each split, relative to the folder. Each line is an object with the
      picture's file, relative to the captions file, and its caption. A pattern of text files such
      as '**/*.txt' means that each has the caption of the picture of the same name beside it.
    file_key: the column of the file.
    caption_key: the column of the caption.

  Returns:
    The source.
  """
  return FolderSource(_required('folder', path), splits, file_key, caption_key)


@gin.configurable('tfrecord')
def tfrecord_source(
    path: str | None = None,
    splits: Mapping[str, str] = {'train': 'train*.tfrecord*'},
    image_key: str = 'image',
    caption_key: str = 'caption',
):
  """TFRecords of tf.train.Example, plain or packed.

  Args:
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder; see `file_patterns`.
    image_key: the feature that holds the encoded picture.
    caption_key: the feature that holds the caption.

  Returns:
    The source.
  """
  return TFRecordSource(_required('tfrecord', path), splits, image_key, caption_key)


@gin.configurable('webdataset')
def webdataset_source(
    path: str | None = None,
    splits: Mapping[str, str] = {'train': '*.tar'},
    caption_key: str | None = None,
):
  """Tar shards of pictures and captions, as img2dataset writes them, plain or packed.

  Args:
    path: the folder of the shards.
    splits: file pattern of each split, relative to the folder; see `file_patterns`.
    caption_key: the key of the caption in a sample's .json file, whether it has a .txt file or not.
      None for the .txt file or, where a sample has none, the key 'caption'.

  Returns:
    The source.
  """
  return WebDatasetSource(_required('webdataset', path), splits, caption_key)


@gin.configurable('text')
def text_source(path: str | None = None, splits: Mapping[str, str] = {'train': '*.txt'}):
  """Files of text, one text a line, plain or packed.

  Args:
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder; see `file_patterns`.

  Returns:
    The source.
  """
  return TextSource(_required('text', path), splits)


_SOURCES = {
    'openmoji': openmoji_source,
    'folder': folder_source,
    'tfrecord': tfrecord_source,
    'webdataset': webdataset_source,
    'text': text_source,
}
NAMES = tuple(_SOURCES)


@gin.configurable('data')
def chosen(source: str = 'openmoji') -> str:
  """Returns the name of the source that gin chooses by `data.source`."""
  if source not in _SOURCES:
    raise UserError(f'data.source = {source!r} is unknown; there are {", ".join(_SOURCES)}')
  return source


def configured(name: str, image_size: int = 64) -> PictureSource:
  """Returns the source of this name as gin configures it now.

  Args:
    name: one of `NAMES`.
    image_size: the size at which OpenMoji draws its pictures unless `openmoji.size` says another.

  Returns:
    The source.

  Raises:
    UserError: its path is not set.
  """
  if name == 'openmoji':
    return openmoji_source(image_size=image_size)
  return _SOURCES[name]()


def _captions_alone(captions: Sequence[str | bytes]) -> tf.data.Dataset:
  return tf.data.Dataset.from_tensor_slices(captions).map(
      lambda caption: {'caption': caption, 'problem': ''})


def _picture_file(path: bytes) -> tuple[bytes, bytes]:
  """Reads a picture, and says why it can't be read."""
  path = os.fsdecode(path)
  try:
    with storage.open_file(path) as file:
      # One byte more tells the decoder that it is too much.
      return file.read(decoding.MAX_BYTES + 1), b''
  except OSError:
    return b'', example_files.described('picture file that is gone or cannot be read', path)


def _required(name: str, path: str | None) -> str:
  if path is None:
    raise UserError(f"{name}.path is not set; give --gin.{name}.path=\"'FOLDER'\"")
  return path

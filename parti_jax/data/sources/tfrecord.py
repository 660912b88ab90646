"""TFRecords of tf.train.Example with an encoded picture and a caption."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import gin

from parti_jax.data.readers import tfrecords
from parti_jax.data.sources import base
from parti_jax.data.sources import paths


class TFRecordSource(paths.FilesSource):
  """TFRecords; `configured` describes the arguments."""

  def __init__(self, path: str, splits: Mapping[str, str], image_key: str, caption_key: str):
    super().__init__('tfrecord', path, splits)
    self._keys = {'image_key': image_key, 'caption_key': caption_key}

  def open(self, split: str, pictures: bool = True) -> base.Shards:
    return self._open(split, pictures, describe=False)

  def open_described(self, split: str) -> base.Shards:
    return self._open(split, pictures=True, describe=True)

  def _open(self, split: str, pictures: bool, describe: bool) -> base.Shards:
    files = self.files(split)
    keys = {'picture': 'image_key', 'caption': 'caption_key'}
    if not pictures:
      del keys['picture']
    tfrecords.check_keys(files, {parameter: self._keys[parameter] for parameter in keys.values()})
    found = {name: self._keys[parameter] for name, parameter in keys.items()}
    return paths.Files(files, functools.partial(tfrecords.examples, keys=found, describe=describe))


@gin.configurable('tfrecord')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] = {'train': 'train*.tfrecord*'},
  image_key: str = 'image',
  caption_key: str = 'caption',
) -> TFRecordSource:
  """Returns a source of TFRecords of tf.train.Example, plain or packed.

  Args:
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder, in the syntax of `file_patterns`.
    image_key: the feature with the encoded picture.
    caption_key: the feature with the caption.
  """
  return TFRecordSource(paths.required('tfrecord', path), splits, image_key, caption_key)

"""OpenMoji from its tensorflow-datasets builder, which runs on first use."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import gin

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data.sources import base


class OpenMojiSource(base.Source):
  """OpenMoji's pictures, rendered at a size.

  Args:
    size: height and width in pixels.
    data_dir: the folder to build in; None for the default of tensorflow-datasets.
  """

  def __init__(self, size: int, data_dir: str | None = None):
    super().__init__('openmoji', openmoji.SPLITS)
    self._size, self._data_dir = size, data_dir

  def open(self, split: str, pictures: bool = True) -> base.Records:
    self.check_split(split)
    if not pictures and split in openmoji.SPLITS:  # Captions need no rendering.
      return _Captions(
        [picture.caption for picture in openmoji.pictures() if picture.split == split]
      )
    return _Rendered(self._size, self._data_dir, split)

  def check_split(self, split: str) -> None:
    # Also accepts slices such as 'train[:10%]', which tensorflow-datasets supports.
    if split.split('[')[0] not in self.splits:
      raise UserError(f'openmoji has no split {split!r}; it has {", ".join(self.splits)}')


class _Captions(base.Records):
  """Only captions."""

  def __init__(self, captions: list[str]):
    self._captions = captions

  def __len__(self) -> int:
    return len(self._captions)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    return [{'caption': self._captions[index].encode()} for index in indices]


class _Rendered(base.Records):
  """Pictures stored by tensorflow-datasets."""

  def __init__(self, size: int, data_dir: str | None, split: str):
    self._arguments = size, data_dir, split
    _ = self._source  # Renders the pictures now.

  @functools.cached_property
  def _source(self):
    # Imported here, since users with their own data may not have the package of pictures.
    from parti_jax.data import openmoji_builder

    size, data_dir, split = self._arguments
    return read_split(openmoji_builder.prepared(size, data_dir), 'openmoji', split)

  def __getstate__(self) -> dict[str, Any]:
    return {'_arguments': self._arguments}

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    found = self._source.__getitems__(list(map(int, indices)))
    return [{'picture': example['image'], 'caption': example['caption']} for example in found]


def read_split(builder, name: str, split: str):
  """Opens a split of a tensorflow-datasets builder, with pictures left encoded.

  Args:
    builder: the builder, with its data prepared.
    name: name of the source, for messages.
    split: the split, or a slice of it.

  Raises:
    UserError: the split doesn't exist.
  """
  import tensorflow_datasets as tfds

  try:
    return builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
  except (ValueError, AssertionError) as error:
    raise UserError(f'{name} has no split {split!r}: {re.sub(chr(10), " ", str(error))}') from error


@gin.configurable('openmoji')
@checks.bounded(size=(1, 8192))
def configured(
  size: int | None = None, data_dir: str | None = None, image_size: int = 64
) -> OpenMojiSource:
  """Returns OpenMoji as a source.

  Args:
    size: height and width in pixels at which the pictures are rendered; None for the run's size,
      which avoids resizing.
    data_dir: folder of the rendered pictures; None for the default of tensorflow-datasets.
    image_size: the run's picture size, given by the caller.
  """
  return OpenMojiSource(size or image_size, data_dir)

"""Scenes made of OpenMoji from their tensorflow-datasets builder, which runs on first use."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import gin

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.data import captions
from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.data.sources import base
from parti_jax.data.sources import openmoji


class OpenMojiScenesSource(base.Source):
  """Scenes made of OpenMoji, each with several captions.

  Args:
    settings: which scenes.
    size: height and width in pixels.
    data_dir: the folder to build in; None for the default of tensorflow-datasets.
  """

  def __init__(self, settings: openmoji_scenes.Settings, size: int, data_dir: str | None = None):
    super().__init__('openmoji_scenes', openmoji_scenes.SPLITS)
    self._settings, self._size, self._data_dir = settings, size, data_dir

  def open(self, split: str, pictures: bool = True) -> base.Records:
    self.check_split(split)
    if not pictures and split in openmoji_scenes.SPLITS:  # Captions need no rendering.
      return _Captions(self._settings, split)
    return _Rendered(self._settings, self._size, self._data_dir, split)

  def check_split(self, split: str) -> None:
    # Also accepts slices such as 'train[:10%]', which tensorflow-datasets supports.
    openmoji_scenes.check_split(split.split('[')[0])


class _Captions(base.Records):
  """Only captions."""

  def __init__(self, settings: openmoji_scenes.Settings, split: str):
    self._settings, self._split = settings, split

  def __len__(self) -> int:
    return self._settings.count(self._split)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    return [
      {
        'caption': captions.several(
          openmoji_grammar.captions_of(self._settings, self._split, int(index))
        )
      }
      for index in indices
    ]


class _Rendered(base.Records):
  """Pictures stored by tensorflow-datasets."""

  def __init__(
    self, settings: openmoji_scenes.Settings, size: int, data_dir: str | None, split: str
  ):
    self._arguments = settings, size, data_dir, split
    _ = self._source  # Renders the pictures now.

  @functools.cached_property
  def _source(self):
    # Imported here, since users with their own data may not have the package of pictures.
    from parti_jax.data import openmoji_scenes_builder

    settings, size, data_dir, split = self._arguments
    return openmoji.read_split(
      openmoji_scenes_builder.prepared(settings, size, data_dir), 'openmoji_scenes', split
    )

  def __getstate__(self) -> dict[str, Any]:
    return {'_arguments': self._arguments}

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    return [
      {
        'picture': example['image'],
        'caption': captions.several([text.decode() for text in example['captions']]),
      }
      for example in self._source.__getitems__(list(map(int, indices)))
    ]


@gin.configurable('openmoji_scenes')
@checks.bounded(size=(1, 1024), train_size=(1, 10_000_000), captions=(1, 20), seed=(0, 2**32 - 1))
def configured(
  size: int | None = None,
  train_size: int = openmoji_scenes.TRAIN_SIZE,
  captions: int = openmoji_scenes.CAPTIONS,
  seed: int = 0,
  of_seen_names: bool = False,
  data_dir: str | None = None,
  image_size: image_sizes.ImageSize = 64,
) -> OpenMojiScenesSource:
  """Returns the scenes as a source.

  Args:
    size: height and width in pixels at which the scenes are rendered; None for the run's size,
      which avoids resizing. With a run's size that is not square, it must be given, and the pictures
      are cropped.
    train_size: number of training scenes.
    captions: captions of each scene, of which an epoch uses one.
    seed: seed of the scenes.
    of_seen_names: whether no scene shows a thing whose drawing OpenMoji's split `validation` holds
      out, for models that also train on OpenMoji's names.
    data_dir: folder of the rendered scenes; None for the default of tensorflow-datasets.
    image_size: the run's picture size, given by the caller.
  """
  settings = openmoji_scenes.Settings(train_size, captions, seed, of_seen_names)
  way_out = 'set openmoji_scenes.size to render squares and crop them, or choose another source'
  rendered = size or image_sizes.square(image_size, 'openmoji_scenes has', way_out)
  return OpenMojiScenesSource(settings, rendered, data_dir)

"""OpenMoji from its tensorflow-datasets builder, which runs on first use."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import gin

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import captions as captions_lib
from parti_jax.data import openmoji
from parti_jax.data import openmoji_names
from parti_jax.data.sources import base


class OpenMojiSource(base.Source):
  """OpenMoji's pictures, rendered at a size.

  Args:
    size: height and width in pixels.
    data_dir: the folder to build in; None for the default of tensorflow-datasets.
    captions: maximum number of captions of a picture, from `openmoji_names` if there are several.
    languages: languages of several captions.
    requests: share of the phrasings that are plain requests.
  """

  def __init__(
    self,
    size: int,
    data_dir: str | None = None,
    captions: int = 1,
    languages: Sequence[str] = (openmoji_names.ENGLISH,),
    requests: float = 0.0,
  ):
    super().__init__('openmoji', openmoji.SPLITS)
    self._size, self._data_dir = size, data_dir
    self._phrasings = _Phrasings(captions, tuple(languages), requests)

  def open(self, split: str, pictures: bool = True) -> base.Records:
    self.check_split(split)
    if not pictures and split in openmoji.SPLITS:  # Captions need no stored pictures.
      return _Captions(
        [picture for picture in openmoji.pictures() if picture.split == split], self._phrasings
      )
    return _Rendered(self._size, self._data_dir, split, self._phrasings)

  def check_split(self, split: str) -> None:
    # Also accepts slices such as 'train[:10%]', which tensorflow-datasets supports.
    if split.split('[')[0] not in self.splits:
      raise UserError(f'openmoji has no split {split!r}; it has {", ".join(self.splits)}')


@dataclasses.dataclass(frozen=True)
class _Phrasings:
  """Which captions a picture has; the arguments are those of `OpenMojiSource`."""

  count: int
  languages: tuple[str, ...]
  requests: float

  def of(self, picture: openmoji.Picture) -> bytes:
    """Returns the 'caption' of a picture's example."""
    if self.count == 1:
      return picture.caption.encode()
    return _several(picture, self)


@functools.lru_cache(4096)  # Every epoch asks again.
def _several(picture: openmoji.Picture, phrasings: _Phrasings) -> bytes:
  return captions_lib.several(
    openmoji_names.captions(picture, phrasings.count, phrasings.languages, phrasings.requests)
  )


class _Captions(base.Records):
  """Only captions."""

  def __init__(self, pictures: list[openmoji.Picture], phrasings: _Phrasings):
    self._pictures, self._phrasings = pictures, phrasings

  def __len__(self) -> int:
    return len(self._pictures)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    return [{'caption': self._phrasings.of(self._pictures[index])} for index in indices]


class _Rendered(base.Records):
  """Pictures stored by tensorflow-datasets."""

  def __init__(self, size: int, data_dir: str | None, split: str, phrasings: _Phrasings):
    self._arguments = size, data_dir, split, phrasings
    _ = self._source  # Renders the pictures now.

  @functools.cached_property
  def _source(self):
    # Imported here, since users with their own data may not have the package of pictures.
    from parti_jax.data import openmoji_builder

    size, data_dir, split, _ = self._arguments
    return read_split(openmoji_builder.prepared(size, data_dir), 'openmoji', split)

  def __getstate__(self) -> dict[str, Any]:
    return {'_arguments': self._arguments}

  def __len__(self) -> int:
    return len(self._source)

  def read(self, indices: Sequence[int]) -> list[base.Example]:
    found = self._source.__getitems__(list(map(int, indices)))
    phrasings = self._arguments[-1]
    if phrasings.count == 1:
      return [{'picture': example['image'], 'caption': example['caption']} for example in found]
    return [
      {'picture': example['image'], 'caption': phrasings.of(_pictures()[example['code'].decode()])}
      for example in found
    ]


@functools.cache
def _pictures() -> dict[str, openmoji.Picture]:
  return {picture.code: picture for picture in openmoji.pictures()}


def read_split(builder, name: str, split: str):
  """Opens a split of a tensorflow-datasets builder, with pictures left encoded.

  Args:
    builder: the builder, with its data prepared.
    name: name of the source, for messages.
    split: the split, or a slice of it.

  Raises:
    UserError: the split doesn't exist.
  """
  from parti_jax.data.quiet_tfds import tfds

  try:
    return builder.as_data_source(split=split, decoders={'image': tfds.decode.SkipDecoding()})
  except (ValueError, AssertionError) as error:
    raise UserError(f'{name} has no split {split!r}: {re.sub(chr(10), " ", str(error))}') from error


@gin.configurable('openmoji')
@checks.bounded(size=(1, 8192), captions=(1, 100), requests=(0, 1))
def configured(
  size: int | None = None,
  data_dir: str | None = None,
  captions: int = 1,
  languages: tuple[str, ...] = (openmoji_names.ENGLISH,),
  requests: float = 0.0,
  image_size: image_sizes.ImageSize = 64,
) -> OpenMojiSource:
  """Returns OpenMoji as a source.

  Args:
    size: height and width in pixels at which the pictures are rendered; None for the run's size,
      which avoids resizing. With a run's size that is not square, it must be given, and the pictures
      are cropped.
    data_dir: folder of the rendered pictures; None for the default of tensorflow-datasets.
    captions: captions of each picture, of which an epoch uses one. 1 gives only its name and skin
      tones; more add phrasings, other names and `languages`.
    languages: languages of several captions, such as ('en', 'de').
    requests: share of the phrasings that are plain requests, with other words around the name
      (`openmoji_requests`).
    image_size: the run's picture size, given by the caller.

  Raises:
    UserError: a language is unknown, or a setting has no effect.
  """
  if captions == 1 and requests:
    raise UserError('openmoji.requests has no effect with openmoji.captions = 1; set more captions')
  if captions == 1 and tuple(languages) != (openmoji_names.ENGLISH,):
    raise UserError(
      'openmoji.languages has no effect with openmoji.captions = 1; set more captions'
    )
  if captions > 1:
    openmoji_names.check_languages(languages)
  way_out = 'set openmoji.size to render squares and crop them, or choose another source'
  rendered = size or image_sizes.square(image_size, 'openmoji has', way_out)
  return OpenMojiSource(rendered, data_dir, captions, languages, requests)

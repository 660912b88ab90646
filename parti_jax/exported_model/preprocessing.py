"""Resizes and crops pictures on the host as the authors of imported networks did.

Such a network was trained with one resizing function. Another function gives slightly different
features, and then scores can't be compared with published ones.

| networks | preprocessing |
|---|---|
| CLIP, as in transformers | `Preprocessing()` |
| CLIP, as in open_clip | `Preprocessing(crop_rounding='even')` |
| HPSv2 | `Preprocessing(fit='pad')` |
| SigLIP 2 | `Preprocessing(fit='stretch', resampling='bilinear')` |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import PIL.Image

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.models import config_checks

_CHOICES = {
  'fit': ('crop', 'stretch', 'pad'),
  'resampling': ('bicubic', 'bilinear'),
  'crop_rounding': ('down', 'even'),
}
_FILTERS = {
  'bicubic': PIL.Image.Resampling.BICUBIC,
  'bilinear': PIL.Image.Resampling.BILINEAR,
}


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """How a picture of any size becomes a square.

  Attributes:
    fit: how the picture is fitted into the square: 'crop' resizes the shorter side and cuts out the
      center; 'stretch' resizes both sides and changes the aspect ratio; 'pad' resizes the longer
      side and adds black.
    resampling: name of the filter: 'bicubic' or 'bilinear', both with antialiasing.
    crop_rounding: rounding of the crop's offset if an odd number of pixels is cut off: 'down', as
      in transformers, or 'even', to the nearest even number, as in torchvision and open_clip.

  Raises:
    UserError: if a value is none of these.
  """

  fit: str = 'crop'
  resampling: str = 'bicubic'
  crop_rounding: str = 'down'

  def __post_init__(self):
    config_checks.check_fields(self)
    for name, known in _CHOICES.items():
      if (value := getattr(self, name)) not in known:
        raise UserError(
          f'Preprocessing.{name}={checks.shown(value)} is not one of {", ".join(known)}'
        )


def preprocess(pictures: Iterable[np.ndarray], size: int, how: Preprocessing) -> np.ndarray:
  """Resizes and crops pictures to squares.

  Args:
    pictures: uint8 [height, width, 3] each, of any sizes.
    size: height and width of the squares.
    how: the preprocessing of the network.

  Returns:
    float32 [pictures, size, size, 3] in [0, 1]. With 'pad' and 'bicubic' some values lie a little
    outside, as in HPSv2, which resizes floating-point numbers and does not clip them.

  Raises:
    UserError: if a picture has another shape or dtype.
  """
  squares = [
    _square(_checked(picture, number), size, how) for number, picture in enumerate(pictures)
  ]
  return np.stack(squares) if squares else np.zeros((0, size, size, 3), np.float32)


def _checked(picture, number: int) -> np.ndarray:
  picture = np.asarray(picture)
  if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or not picture.size:
    raise UserError(
      f'picture {number + 1} is {picture.dtype} {list(picture.shape)} instead of uint8 '
      '[height, width, 3]'
    )
  return picture


def _square(picture: np.ndarray, size: int, how: Preprocessing) -> np.ndarray:
  height, width = picture.shape[:2]
  if how.fit == 'stretch':
    return _resized(picture, size, size, how.resampling)
  if how.fit == 'pad':
    return _padded(picture, size, how.resampling)
  shorter = min(height, width)
  height, width = size * height // shorter, size * width // shorter
  picture = _resized(picture, height, width, how.resampling)
  place = (lambda cut: cut // 2) if how.crop_rounding == 'down' else (lambda cut: round(cut / 2))
  top, left = place(height - size), place(width - size)
  return picture[top : top + size, left : left + size]


def _resized(picture: np.ndarray, height: int, width: int, resampling: str) -> np.ndarray:
  """Resizes a uint8 picture, rounded to bytes; returns float32 in [0, 1]."""
  image = PIL.Image.fromarray(picture).resize((width, height), _FILTERS[resampling])
  return np.asarray(image, np.float32) / 255


def _padded(picture: np.ndarray, size: int, resampling: str) -> np.ndarray:
  """Resizes in floating point, and pads with black."""
  scale = size / max(picture.shape[:2])
  height, width = (max(1, round(side * scale)) for side in picture.shape[:2])
  square = np.zeros((size, size, 3), np.float32)
  top, left = (size - height) // 2, (size - width) // 2
  for channel in range(3):
    image = PIL.Image.fromarray(picture[..., channel].astype(np.float32) / 255)
    resized = image.resize((width, height), _FILTERS[resampling])
    square[top : top + height, left : left + width, channel] = np.asarray(resized)
  return square

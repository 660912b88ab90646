"""Larger pictures by a model's super-resolution network, within bounded memory."""

from __future__ import annotations

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import super_resolution
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import placement

# Larger pictures are cut into overlapping squares of about this side, in pixels.
_LARGEST_SIDE = 256
# What the widest activations of a batch may take, and the most pictures in one.
_MOST_BYTES = 1 << 28
_MOST_AT_ONCE = 32


class Upscaler:
  """A super-resolution network that is ready to enlarge pictures.

  Attributes:
    factor: how many times higher and wider pictures become.
  """

  def __init__(
    self, config: super_resolution.SuperResolutionConfig, params, place: placement.Placement
  ):
    """Puts the network on the devices.

    Args:
      config: its sizes.
      params: its parameters, a tree of numpy arrays.
      place: where it computes.
    """
    self._config, self._place = config, place
    self._params = place.put(params, model_folder.abstract('super_resolution', config))
    self.factor = config.factor

  def __call__(self, images) -> np.ndarray:
    """Enlarges pictures of any size.

    A picture that is too large to be enlarged at once is cut into parts that overlap as far as the
    network sees, so that no seam is left: the result is that of the whole picture, but for
    rounding.

    Args:
      images: uint8 [n, height, width, 3].

    Returns:
      uint8 [n, factor · height, factor · width, 3].

    Raises:
      UserError: if the pictures are of another shape or dtype.
    """
    images = self._checked(images)
    count, height, width, _ = images.shape
    factor, size = self.factor, (self._window(height), self._window(width))
    results = np.empty([count, factor * height, factor * width, 3], np.uint8)
    places = list(
      itertools.product(range(count), self._starts(height, size[0]), self._starts(width, size[1]))
    )
    batch = self._batch_size(size, len(places))
    for start, chosen in placement.pieces(len(places), batch):
      windows = np.stack(
        [
          images[image, top : top + size[0], left : left + size[1]]
          for image, top, left in (places[index] for index in chosen)
        ]
      )
      enlarged = self._place.run(_enlarge, (self._params,), (windows,), config=self._config)
      for (image, top, left), window in zip(places[start : start + batch], enlarged):
        kept = [self._kept(*axis) for axis in zip((top, left), size, (height, width))]
        inside = tuple(
          slice(factor * (low - first), factor * (high - first))
          for (low, high), first in zip(kept, (top, left))
        )
        outside = tuple(slice(factor * low, factor * high) for low, high in kept)
        results[(image, *outside)] = window[inside]
    return results

  def _checked(self, images) -> np.ndarray:
    images, unit = images_lib.checked(images), self._config.unshuffle
    if not images.size:
      raise UserError(f'images are {images.dtype} {list(images.shape)}: no picture to enlarge')
    if images.shape[1] % unit or images.shape[2] % unit:
      raise UserError(
        f'images are {images.shape[1]}×{images.shape[2]} pixels; this model enlarges '
        f'pictures whose sides are multiples of {unit}'
      )
    return images

  @property
  def _margin(self) -> int:
    """Pixels at a cut that are not those of the whole picture; a multiple of the squares' side."""
    unit = self._config.unshuffle
    return -(-self._config.reach // unit) * unit

  def _window(self, length: int) -> int:
    """Side of the parts that a side of `length` pixels is cut into."""
    unit = self._config.unshuffle
    return min(length, max(_LARGEST_SIDE // unit * unit, 4 * self._margin))

  def _starts(self, length: int, window: int) -> list[int]:
    """Where the parts begin; the last one ends with the picture."""
    step = window - 2 * self._margin
    last = length - window
    return [*range(0, last, step), last] if last else [0]

  def _kept(self, start: int, window: int, length: int) -> tuple[int, int]:
    """What a part gives to the result, from where to where in the picture."""
    end = start + window
    return (start + self._margin if start else 0, end - self._margin if end < length else length)

  def _batch_size(self, size: tuple[int, int], count: int) -> int:
    config, pixels = self._config, size[0] * size[1]
    wide = config.expansion * config.width // config.unshuffle**2
    most = pixels * 4 * max(wide, 3 * config.factor**2)
    batch = max(1, min(_MOST_AT_ONCE, _MOST_BYTES // most, count))
    return self._place.divisible(batch)


@functools.partial(jax.jit, static_argnames='config')
def _enlarge(params, images, *, config):
  """uint8 [batch, height, width, 3] to uint8 [batch, factor · height, factor · width, 3]."""
  module: nn.Module = super_resolution.SuperResolution(config)
  pixels = module.apply({'params': params}, images.astype(jnp.float32) / 255.0)
  return jnp.round(jnp.clip(pixels, 0.0, 1.0) * 255.0).astype(jnp.uint8)

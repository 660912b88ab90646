"""Enlarges pictures with a model's super-resolution network, within bounded memory."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import PyTree
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.models import pixels
from parti_jax.models import upscalers
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import kept_programs
from parti_jax.sampling import placement

# Larger pictures are cut into overlapping windows of about this height and width, in pixels.
_LARGEST_SIDE = 256
# Maximum size of the widest activations of a batch, and maximum number of windows in a batch.
_MOST_BYTES = 1 << 28
_MOST_AT_ONCE = 32


class Upscaler:
  """A super-resolution network that enlarges pictures.

  Attributes:
    factor: factor by which height and width grow.
  """

  def __init__(
    self,
    config: upscalers.Config,
    params: PyTree,
    place: placement.Placement,
  ):
    """Puts the network on the devices.

    Args:
      config: sizes of the network, of a kind in `upscalers.KINDS`.
      params: its parameters.
      place: the devices.
    """
    self._config, self._place = config, place
    self._params = place.put(
      params, functools.partial(model_folder.abstract, 'super_resolution', config)
    )
    self.factor = config.factor

  def __call__(self, images) -> UInt8[np.ndarray, 'images height width 3']:
    """Enlarges pictures of any size.

    Large pictures are cut into windows that overlap by `Config.reach`, so that no seam is visible:
    the result is that for the whole picture, up to rounding. Sides that `Config.multiple` doesn't
    divide are first extended by reflection, as Real-ESRGAN does, and what was added is cut off.

    Args:
      images: uint8 [images, height, width, 3].

    Returns:
      The pictures, `factor` times as high and wide.

    Raises:
      UserError: if the shape or the dtype is wrong.
    """
    images, unit = images_lib.checked(images), self._config.multiple
    if not images.size:
      raise UserError(
        f'images are {images.dtype} {list(images.shape)}, so there is nothing to enlarge'
      )
    height, width = images.shape[1:3]
    added = ((0, 0), (0, -height % unit), (0, -width % unit), (0, 0))
    enlarged = self._enlarged(np.pad(images, added, 'reflect') if np.any(added) else images)
    return enlarged[:, : self.factor * height, : self.factor * width]

  def _enlarged(
    self, images: UInt8[np.ndarray, 'images height width 3']
  ) -> UInt8[np.ndarray, 'images large_height large_width 3']:
    """Enlarges pictures whose sides `Config.multiple` divides."""
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
        rows, columns = (slice(factor * low, factor * high) for low, high in kept)
        results[image, rows, columns] = window[inside]
    return results

  @property
  def _margin(self) -> int:
    """Width of a window's wrong pixels at a cut, rounded up to `Config.multiple`."""
    unit, reach = self._config.multiple, self._config.reach
    return 0 if reach is None else -(-reach // unit) * unit

  def _window(self, length: int) -> int:
    """Returns the length of the windows along an axis of `length` pixels."""
    if self._config.reach is None:
      return length
    unit = self._config.multiple
    return min(length, max(_LARGEST_SIDE // unit * unit, 4 * self._margin))

  def _starts(self, length: int, window: int) -> list[int]:
    """Returns the starts of the windows along an axis; the last window ends with the picture."""
    step = window - 2 * self._margin
    last = length - window
    return [*range(0, last, step), last] if last else [0]

  def _kept(self, start: int, window: int, length: int) -> tuple[int, int]:
    """Returns the start and end, in the picture, of the pixels that a window contributes."""
    end = start + window
    return (start + self._margin if start else 0, end - self._margin if end < length else length)

  def _batch_size(self, size: tuple[int, int], count: int) -> int:
    """Returns the number of windows of this size to enlarge at once."""
    window_bytes = 4 * size[0] * size[1] * self._config.features_per_pixel
    batch = max(1, min(_MOST_AT_ONCE, _MOST_BYTES // window_bytes, count))
    return self._place.divisible(batch)


def load(folder: str | os.PathLike[str], place: placement.Placement | None = None) -> Upscaler:
  """Loads a super-resolution network alone.

  Args:
    folder: a path or a URL: a folder that `parti-jax import super_resolution` wrote, or a model
      folder.
    place: the devices; by default a single one.

  Raises:
    UserError: if the folder is missing, unfinished or damaged, or has no such network.
  """
  part = model_folder.load_part('super_resolution', checks.text('upscaler', folder))
  return Upscaler(part.config, part.params, place or placement.Placement())


@kept_programs.keep
@functools.partial(jax.jit, static_argnames='config')
def _enlarge(
  params: PyTree,
  images: UInt8[Array, 'batch height width 3'],
  *,
  config: upscalers.Config,
) -> UInt8[Array, 'batch {config.factor}*height {config.factor}*width 3']:
  apply: Callable[..., Any] = upscalers.module(config).apply
  enlarged = apply({'params': params}, pixels.from_bytes(images))
  return pixels.to_bytes(jnp.clip(enlarged, 0.0, 1.0))

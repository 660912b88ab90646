"""Digests of pictures, and perceptual hashes, which are similar for similar pictures."""

from __future__ import annotations

import numpy as np
import xxhash
from PIL import Image

BITS = 63
# Height and width in pixels of the gray picture to hash, and the number of frequencies per axis.
_SIDE, _FREQUENCIES = 32, 8
# The orthonormal cosine transform of the lowest frequencies, float64 [_FREQUENCIES, _SIDE].
_COSINES = np.sqrt(2 / _SIDE) * np.cos(
  np.pi / _SIDE * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE) + 0.5)
)
_COSINES[0] /= np.sqrt(2)
# Below this root mean square of its gray values' variation, a picture has nothing to compare.
_FLAT = 1.0
_POWERS = 1 << np.arange(BITS, dtype=np.uint64)


def digest(picture: bytes, caption: str = '') -> bytes:
  """Returns the XXH3 digest of a picture's bytes and a caption, 16 bytes."""
  found = xxhash.xxh3_128(len(picture).to_bytes(8, 'little'))
  found.update(picture)
  found.update(caption.encode('utf-8', 'surrogatepass'))
  return found.digest()


def perceptual(image: Image.Image) -> int | None:
  """Returns a hash of a picture's look, from the lowest frequencies of its gray values.

  Resizing and encoding change few bits; cropping and rotation change many. Colors are ignored.

  Args:
    image: the picture.

  Returns:
    A number of `BITS` bits, half of which are set; None for a nearly uniform picture.
  """
  grey = np.asarray(image.convert('L').resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float64)
  # Rounded, so that floating point differences between processors don't matter. Drops the mean.
  values = (_COSINES @ grey @ _COSINES.T).round(3).reshape(-1)[1:]
  if np.sqrt(np.sum(values**2)) < _FLAT * _SIDE:
    return None
  return int(_POWERS[values > np.median(values)].sum())


def bands(value: int, distance: int) -> list[tuple[int, int]]:
  """Splits a hash into pieces, so that hashes that differ in few bits have a piece in common.

  Args:
    value: a hash from `perceptual`.
    distance: maximum number of bits that differ.

  Returns:
    The index of each piece and its bits.
  """
  count = distance + 1
  edges = [BITS * number // count for number in range(count + 1)]
  return [
    (number, (value >> low) & ((1 << (high - low)) - 1))
    for number, (low, high) in enumerate(zip(edges, edges[1:]))
  ]

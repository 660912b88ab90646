"""Digests of pictures, and hashes that are alike where pictures look alike."""

from __future__ import annotations

import numpy as np
import xxhash
from PIL import Image

BITS = 63
# Height and width in pixels of the grey picture that is hashed, and the frequencies in a row.
_SIDE, _FREQUENCIES = 32, 8
# The orthonormal cosine transform of the lowest frequencies, float64 [_FREQUENCIES, _SIDE].
_COSINES = np.sqrt(2 / _SIDE) * np.cos(
  np.pi / _SIDE * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE) + 0.5)
)
_COSINES[0] /= np.sqrt(2)
# Pictures whose grey values differ by less, as a root mean square, have nothing to compare.
_FLAT = 1.0
_POWERS = 1 << np.arange(BITS, dtype=np.uint64)


def digest(picture: bytes, caption: str = '') -> bytes:
  """The XXH3 digest of a picture's bytes, and of a caption, 16 bytes."""
  found = xxhash.xxh3_128(len(picture).to_bytes(8, 'little'))
  found.update(picture)
  found.update(caption.encode('utf-8', 'surrogatepass'))
  return found.digest()


def perceptual(image: Image.Image) -> int | None:
  """Hashes how a picture looks, from the lowest frequencies of its grey values.

  Resizing and encoding change few bits; cropping and turning change many. Colours don't count.

  Args:
    image: the picture.

  Returns:
    A number of `BITS` bits, half of which are set; None for a picture of nearly one shade.
  """
  grey = np.asarray(image.convert('L').resize((_SIDE, _SIDE), Image.Resampling.BICUBIC), np.float64)
  # Rounded, so that no processor's rounding decides a comparison. The first is the mean.
  values = (_COSINES @ grey @ _COSINES.T).round(3).reshape(-1)[1:]
  if np.sqrt(np.sum(values**2)) < _FLAT * _SIDE:
    return None
  return int(_POWERS[values > np.median(values)].sum())


def bands(value: int, distance: int) -> list[tuple[int, int]]:
  """Cuts a hash into pieces, of which hashes that differ in few bits have at least one in common.

  Args:
    value: of `perceptual`.
    distance: bits that may differ.

  Returns:
    The number of each piece and its bits.
  """
  count = distance + 1
  edges = [BITS * number // count for number in range(count + 1)]
  return [
    (number, (value >> low) & ((1 << (high - low)) - 1))
    for number, (low, high) in enumerate(zip(edges, edges[1:]))
  ]

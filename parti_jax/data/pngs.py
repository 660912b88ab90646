"""Decodes PNGs and rejects incomplete or damaged ones, which Pillow doesn't always notice."""

import contextlib
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL import ImageFile

from parti_jax.data.undecodable import UndecodablePicture

_GRAY, _COLOR = 0, 2
_SIGNATURE = b'\x89PNG\r\n\x1a\n'
# Chunks that determine how the pixels look; and the color profile, which may be damaged.
_NEEDED = (b'IHDR', b'PLTE', b'tRNS', b'eXIf', b'IDAT', b'IEND')
_PROFILE = b'iCCP'


def open_leniently(data: bytes) -> ImageFile.ImageFile | None:
  """Opens a PNG that Pillow can't open, without its metadata; returns None if that fails too.

  A damaged color profile becomes None in the picture's `info`.
  """
  if not data.startswith(_SIGNATURE):
    return None
  for kinds in ((*_NEEDED, _PROFILE), _NEEDED):
    pieces = [data[start - 8 : end + 4] for kind, start, end in _chunks(data) if kind in kinds]
    with contextlib.suppress(Exception):  # Damaged files make Pillow raise almost any error.
      image = Image.open(io.BytesIO(_SIGNATURE + b''.join(pieces)), formats=('PNG',))
      if _PROFILE not in kinds:
        image.info['icc_profile'] = None
      return image
  return None


def decode(image: ImageFile.ImageFile, data: bytes) -> Image.Image:
  """Decodes a PNG.

  Args:
    image: the file as Pillow opened it.
    data: the file.

  Returns:
    The picture in any of Pillow's modes. A color that the file declares transparent is applied to
    the alpha channel; only transparency in a palette stays in `info`.

  Raises:
    UndecodablePicture: the file is damaged. Pillow's decoder raises other errors.
  """
  _check_checksums(data)
  interlaced = image.info.get('interlace')
  image.load()
  # Missing rows stay black.
  last = image.crop((0, image.height - 1, *image.size))
  if interlaced or last.getbbox(alpha_only=False) is None:
    _check_pixels(data)
  if 'transparency' in image.info and data[25] in (_GRAY, _COLOR):
    return _with_alpha(image, data)
  return image


def _with_alpha(image: Image.Image, data: bytes) -> Image.Image:
  """Returns a gray or colored picture in RGBA, with the transparent color applied.

  Pillow compares that color, which has the file's bit depth, with 8-bit pixels.
  """
  depth = data[24]
  transparent = np.bitwise_and(image.info['transparency'], 2**depth - 1)
  if data[25] == _GRAY and depth == 16:
    values = np.asarray(image)
    equal, image = values == transparent, gray_of_16_bits(image)
  elif data[25] == _GRAY:
    equal = np.asarray(image.convert('L')) == transparent * 255 // (2**depth - 1)
  else:
    values = np.asarray(image.convert('RGB'))
    equal = (values == transparent >> max(depth - 8, 0)).all(-1)
    if depth == 16 and equal.any():
      equal &= (_lower_bytes(data) == transparent & 255).all(-1)
  image = image.convert('RGB')
  image.putalpha(Image.fromarray(np.where(equal, 0, 255).astype(np.uint8)))
  return image


def gray_of_16_bits(image: Image.Image) -> Image.Image:
  """Returns the upper 8 bits of a 16-bit gray picture; Pillow would clip values at 255."""
  return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _lower_bytes(data: bytes) -> UInt8[np.ndarray, 'height width 3']:
  """Returns the lower bytes of a PNG of 16-bit colors."""
  image = Image.open(io.BytesIO(data), formats=('PNG',))
  # Pillow keeps only the upper bytes, so they are swapped for reading.
  image.tile = [image.tile[0]._replace(args='RGB;16L')]
  return np.asarray(image)


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
  """Yields kind, start and end of each chunk's content in a PNG."""
  position = 8
  while position + 12 <= len(data):
    length, kind = struct.unpack_from('>I4s', data, position)
    yield kind, position + 8, position + 8 + length
    position += 12 + length


def _check_checksums(data: bytes) -> None:
  kind = b''
  for kind, start, end in _chunks(data):
    if zlib.crc32(memoryview(data)[start - 4 : end]) != int.from_bytes(data[end : end + 4]):
      raise UndecodablePicture('damaged picture')
    if kind == b'IEND':
      return
  raise UndecodablePicture('damaged picture')


def _check_pixels(data: bytes) -> None:
  """Checks that the pixel data is as long as the header's size requires."""
  width, height, depth, color, _, _, interlaced = struct.unpack_from('>IIBBBBB', data, 16)
  bits = depth * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
  # Adam7: first column and row of each pass, and the steps between its columns and rows.
  passes = (
    (
      (0, 0, 8, 8),
      (4, 0, 8, 8),
      (0, 4, 4, 8),
      (2, 0, 4, 4),
      (0, 2, 2, 4),
      (1, 0, 2, 2),
      (0, 1, 1, 2),
    )
    if interlaced
    else ((0, 0, 1, 1),)
  )
  missing = 0
  for left, top, across, down in passes:
    columns, rows = -(-(width - left) // across), -(-(height - top) // down)
    if columns > 0:
      missing += max(rows, 0) * (1 + (columns * bits + 7) // 8)
  unpacking = zlib.decompressobj()
  for kind, start, end in _chunks(data):
    if kind == b'IDAT':
      packed = data[start:end]
      while packed and missing > 0:
        missing -= len(unpacking.decompress(packed, 2**20))
        packed = unpacking.unconsumed_tail
  if missing > 0:
    raise UndecodablePicture('damaged picture')

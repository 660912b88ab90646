"""Decodes pictures (jpeg, png, webp, gif) to RGB arrays of one size, on white."""

import contextlib
import dataclasses
import functools
import io
from collections.abc import Callable
from collections.abc import Iterator

import gin
import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags
from PIL import Image
from PIL import ImageFile
from PIL import UnidentifiedImageError

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import color_profiles
from parti_jax.data import jpegs
from parti_jax.data import pngs
from parti_jax.data.undecodable import UndecodablePicture

# Formats that Pillow may try. It supports many more, some of which start other programs.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF')
# File name extensions of these formats.
ENDINGS = ('jpg', 'jpeg', 'jpe', 'jfif', 'png', 'webp', 'gif')
# 8192 × 8192. Pillow only warns up to 179 million pixels, which take 700 MB.
MAX_PIXELS = 2**26
MAX_BYTES = 2**26
_ORIENTATIONS = {
  2: Image.Transpose.FLIP_LEFT_RIGHT,
  3: Image.Transpose.ROTATE_180,
  4: Image.Transpose.FLIP_TOP_BOTTOM,
  5: Image.Transpose.TRANSPOSE,
  6: Image.Transpose.ROTATE_270,
  7: Image.Transpose.TRANSVERSE,
  8: Image.Transpose.ROTATE_90,
}


def decode(
  data: bytes, size: image_sizes.ImageSize, to_srgb: bool = True
) -> UInt8[np.ndarray, 'height width 3']:
  """Decodes a picture, crops its central square and resizes it with antialiasing.

  For a size that is not square, the crop is the largest area in the middle that has its shape.

  Transparent areas become white. The first frame of an animation is used. A readable EXIF
  orientation is applied. Only the upper 8 of 16 bits are used.

  Args:
    data: the encoded picture.
    size: height and width of the result in pixels; one number for squares.
    to_srgb: whether colors are converted to sRGB if the file has a color profile, by
      `color_profiles`. An unusable profile is ignored.

  Returns:
    The picture in RGB.

  Raises:
    UndecodablePicture: the data is empty, damaged (even in part), or of an unknown format; or the
      picture is one pixel high or wide, or has more than `MAX_BYTES` bytes or `MAX_PIXELS` pixels.
  """
  return decode_and_note(data, size, to_srgb)[0]


def decode_and_note(
  data: bytes, size: image_sizes.ImageSize, to_srgb: bool = True
) -> tuple[UInt8[np.ndarray, 'height width 3'], list[str]]:
  """Decodes a picture like `decode`, and notes what it ignored.

  Returns:
    The picture, and a short note for each thing in the file that was ignored.
  """
  with _undecodable(data):
    height, width = image_sizes.sides(size)
    # Each side of the crop then has at least as many pixels as it needs.
    sufficient = max(height, width)
    image, notes = _image(data, sufficient, to_srgb, lambda whole: _central(whole, size))
    if image.size != (width, height):
      image = image.resize((width, height), Image.Resampling.BICUBIC)
    return np.asarray(image), notes


def decode_whole(
  data: bytes, shorter_side: int | None = None, to_srgb: bool = True
) -> tuple[Image.Image, list[str]]:
  """Decodes a picture like `decode`, but neither crops nor resizes it.

  Args:
    data: the encoded picture.
    shorter_side: the shorter side in pixels that the caller will resize to. A JPEG more than twice
      as large may be decoded at a fraction of its size, which is faster. None for the full size.
    to_srgb: as in `decode`.

  Returns:
    The picture in RGB, and a short note for each thing in the file that was ignored.
  """
  with _undecodable(data):
    return _image(data, shorter_side or 0, to_srgb, lambda image: image)


@dataclasses.dataclass(frozen=True)
class Header:
  """The header of an encoded picture.

  Attributes:
    width: width in pixels, before the orientation is applied.
    height: height in pixels, before the orientation is applied.
    format: 'JPEG', 'PNG', 'WEBP', 'GIF' or 'MPO'.
    plain: whether decoding changes only the mode: the picture is RGB or gray, upright, has one
      frame, and has neither a color profile nor transparent areas.
  """

  width: int
  height: int
  format: str
  plain: bool


def header(data: bytes) -> Header:
  """Reads a picture's header.

  Raises:
    UndecodablePicture: as in `decode`, as far as the header shows it.
  """
  with _undecodable(data):
    opened = _opened(data)
    _check_size(opened)
    assert opened.format is not None  # Pillow has opened the file.
    plain = (
      opened.mode in ('RGB', 'L')
      and not getattr(opened, 'is_animated', False)
      and _orientation(opened) == 1
      and not {'icc_profile', 'transparency'} & opened.info.keys()
    )
    return Header(opened.width, opened.height, opened.format, plain)


@contextlib.contextmanager
def _undecodable(data: bytes) -> Iterator[None]:
  """Turns errors of decoders into UndecodablePicture."""
  try:
    if not data:
      raise UndecodablePicture('no picture')
    if len(data) > MAX_BYTES:
      raise UndecodablePicture('picture of too many bytes')
    yield
  except UndecodablePicture:
    raise
  except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
    raise UndecodablePicture('picture of too many pixels') from error
  except UnidentifiedImageError as error:
    raise UndecodablePicture('unknown picture format') from error
  except Exception as error:
    # Damaged files make decoders raise almost any error.
    raise UndecodablePicture('damaged picture') from error


def _image(
  data: bytes, size: int, to_srgb: bool, crop: Callable[[Image.Image], Image.Image]
) -> tuple[Image.Image, list[str]]:
  """Returns a picture in RGB on white, and notes on what was ignored.

  Args:
    data: the encoded picture.
    size: sufficient shorter side in pixels; 0 for the full size.
    to_srgb: whether to convert colors to sRGB.
    crop: applied before the colors are converted.
  """
  opened = _opened(data)
  _check_size(opened)
  space, profile = _color_space(opened.mode), opened.info.get('icc_profile', b'')
  image = _plain(crop(_loaded(opened, data, size)))
  notes = []
  # None means that there is a profile that can't be unpacked.
  if to_srgb and profile != b'':
    try:
      image = color_profiles.to_srgb(image, profile or b'', space)
    except color_profiles.UnusableProfile:
      notes = ['unusable color profile ignored']
  return _on_white(image), notes


@gin.configurable('decode_images')
def configured(
  to_srgb: bool = True,
) -> Callable[
  [bytes, image_sizes.ImageSize], tuple[UInt8[np.ndarray, 'height width 3'], list[str]]
]:
  """Returns `decode_and_note` with gin's configuration.

  Args:
    to_srgb: as in `decode`.

  Raises:
    UserError: `to_srgb` isn't a boolean.
  """
  if not isinstance(to_srgb, bool):
    raise UserError(f'decode_images.to_srgb = {to_srgb!r} must be True or False')
  return functools.partial(decode_and_note, to_srgb=to_srgb)


def _opened(data: bytes) -> ImageFile.ImageFile:
  try:
    return Image.open(io.BytesIO(data), formats=FORMATS)
  except (Image.DecompressionBombError, Image.DecompressionBombWarning):
    raise
  except Exception:  # As above.
    opened = pngs.open_leniently(data)
    if opened is None:
      raise
    return opened


def _check_size(image: Image.Image) -> None:
  """Checks the size in the header, before anything is decoded."""
  if image.width * image.height > MAX_PIXELS:
    raise UndecodablePicture('picture of too many pixels')
  if min(image.size) < 1:
    raise UndecodablePicture('damaged picture')
  if min(image.size) == 1:
    raise UndecodablePicture('picture one pixel high or wide')


def _loaded(opened: ImageFile.ImageFile, data: bytes, size: int) -> Image.Image:
  """Returns the picture decoded and upright."""
  if opened.format == 'GIF' or opened.format == 'WEBP':
    opened.load()
    image: Image.Image = opened
  elif opened.format == 'PNG':
    image = pngs.decode(opened, data)
  else:  # A file with several JPEGs has the format MPO.
    # If a side has few pixels, simplejpeg would keep it and shrink only the other one.
    least = 2 * size if size and min(opened.size) > 2 * size else 0
    image = jpegs.decode(data, 'CMYK' if opened.mode == 'CMYK' else 'RGB', least)
  return upright(image, opened)


def upright(image: Image.Image, opened: Image.Image) -> Image.Image:
  """Applies the EXIF orientation of a file, if it is readable, to the picture that it holds."""
  turn = _ORIENTATIONS.get(_orientation(opened))
  return image.transpose(turn) if turn is not None else image


def _orientation(image: Image.Image) -> int:
  """Returns the EXIF orientation; 1 if it is missing or unreadable."""
  try:
    orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if isinstance(orientation, int) else 1
  except Exception:  # As above, for EXIF.
    return 1


def _color_space(mode: str) -> str:
  """Returns the color space of one of Pillow's modes, named as in a profile."""
  if mode == 'CMYK':
    return 'CMYK'
  return 'GRAY' if mode in ('1', 'L', 'LA', 'La') or mode.startswith('I') else 'RGB'


def _central(image: Image.Image, size: image_sizes.ImageSize) -> Image.Image:
  area = image_sizes.central(image.width, image.height, size)
  if area == (0, 0, *image.size):
    return image
  # `resize` can crop too, but lets pixels outside of the crop bleed in.
  return image.crop(area)


def _plain(image: Image.Image) -> Image.Image:
  """Converts a picture of any mode to RGB, CMYK or, if it may be transparent, RGBA."""
  if image.mode in ('RGB', 'RGBA', 'CMYK') and 'transparency' not in image.info:
    return image
  if image.mode.startswith('I'):
    return pngs.gray_of_16_bits(image).convert('RGB')
  transparent = image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info
  return image.convert('RGBA' if transparent else 'RGB')


def _on_white(image: Image.Image) -> Image.Image:
  """Returns a picture in RGB with transparent areas white."""
  if image.mode == 'RGBA':
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image if image.mode == 'RGB' else image.convert('RGB')

"""Resizes and encodes a picture."""

from __future__ import annotations

import io

from PIL import Image

from parti_jax.data import image_decoding
from parti_jax.data.damage import Unusable
from parti_jax.preparation.settings import FORMATS
from parti_jax.preparation.settings import Settings


def size_after(header: image_decoding.Header, settings: Settings) -> tuple[int, int]:
  """Returns the shorter and the longer side of a picture after resizing, in pixels.

  Raises:
    Unusable: the result would have too many pixels.
  """
  shorter, longer = sorted((header.width, header.height))
  size = settings.size
  if size is None or shorter == size or (shorter < size and not settings.enlarge):
    return shorter, longer
  longer = max(size, round(longer * size / shorter))
  if size * longer > image_decoding.MAX_PIXELS:
    raise Unusable('picture of too many pixels after resizing')
  return size, longer


def decode(
  data: bytes, header: image_decoding.Header, settings: Settings, to_srgb: bool
) -> tuple[Image.Image, list[str]]:
  """Decodes and resizes a picture.

  Args:
    data: the encoded picture.
    header: header of the picture.
    settings: the size.
    to_srgb: whether colors are converted to sRGB if the file has a color profile.

  Returns:
    The picture in RGB, and a short note for each thing in the file that was ignored.

  Raises:
    Unusable: the picture can't be decoded, or would have too many pixels.
  """
  shorter, longer = size_after(header, settings)
  image, notes = image_decoding.decode_whole(data, shorter, to_srgb)
  size = (longer, shorter) if image.width >= image.height else (shorter, longer)
  if image.size != size:
    image = image.resize(size, Image.Resampling.BICUBIC)
  return image, notes


def encode(
  image: Image.Image, data: bytes, header: image_decoding.Header, settings: Settings
) -> bytes:
  """Encodes a picture.

  Args:
    image: a picture from `decode`.
    data: its original bytes, which are returned if nothing has to change.
    header: header of these bytes.
    settings: the format.

  Raises:
    Unusable: the format can't hold a picture of this size.
  """
  name = FORMATS[settings.image_format]
  if (
    settings.pass_through
    and header.plain
    and header.format == name
    and sorted(image.size) == sorted((header.width, header.height))
  ):
    return data
  encoded = io.BytesIO()
  options = {} if name == 'PNG' else {'quality': settings.quality}
  try:
    image.save(encoded, name, **options)
  except (OSError, ValueError) as error:
    raise Unusable(f'picture that {settings.image_format} cannot hold') from error
  return encoded.getvalue()

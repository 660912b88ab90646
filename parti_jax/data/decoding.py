"""Encoded pictures (jpeg, png, webp, gif) to square RGB arrays on white."""

import io

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class UndecodablePicture(Exception):
  """The bytes are no picture that can be used; the message is the reason in a few words."""


def decode(data: bytes, size: int) -> np.ndarray:
  """Decodes a picture, crops its central square and resizes it with antialiasing.

  Transparent parts become white; of an animation the first frame is taken; a photograph is turned
  as its EXIF orientation says.

  Args:
    data: the encoded picture.
    size: height and width of the result in pixels.

  Returns:
    uint8 [size, size, 3], RGB.

  Raises:
    UndecodablePicture: there is no picture, it is damaged, or it is so large that decoding it may
      exhaust the memory.
  """
  if not data:
    raise UndecodablePicture('no picture')
  try:
    image = Image.open(io.BytesIO(data))
    # A JPEG can be decoded at a fraction of its size, which is several times faster.
    image.draft('RGB', (2 * size, 2 * size))
    image = _on_white(ImageOps.exif_transpose(image))
  except Image.DecompressionBombError as error:
    raise UndecodablePicture('picture of too many pixels') from error
  except UnidentifiedImageError as error:
    raise UndecodablePicture('unknown picture format') from error
  except Exception as error:
    # Damaged files make the decoders raise nearly anything.
    raise UndecodablePicture('damaged picture') from error
  return np.asarray(_square(image, size))


def _on_white(image: Image.Image) -> Image.Image:
  """Returns the picture in RGB, its transparent parts white."""
  if image.mode.startswith('I;16'):
    # Pillow would clip 16-bit greys at 255 instead of scaling them.
    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
  if image.mode in ('RGBA', 'LA', 'PA', 'La', 'RGBa') or 'transparency' in image.info:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('RGB')


def _square(image: Image.Image, size: int) -> Image.Image:
  """Crops the central square and resizes it."""
  side = min(image.size)
  left = (image.width - side) // 2
  top = (image.height - side) // 2
  if image.size == (size, size):
    return image
  # `resize` has a crop of its own, but lets pixels outside of it bleed in.
  image = image.crop((left, top, left + side, top + side))
  return image.resize((size, size), Image.Resampling.BICUBIC)

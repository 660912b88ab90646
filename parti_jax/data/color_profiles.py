"""Converts pictures to sRGB by the colour profiles in their files, with LittleCMS."""

import functools
import io

import numpy as np
from PIL import Image
from PIL import ImageCms

# The largest profile that is used; those of printing processes have one or two million bytes.
MAX_BYTES = 2**22
# Profiles of different bytes whose transforms are kept.
_KEPT = 32
# The colour space of a profile -> Pillow's mode of the pictures that it describes.
_MODES = {'GRAY': 'L', 'RGB': 'RGB', 'CMYK': 'CMYK'}
# A profile whose colours differ from sRGB's by no more, of 255, is one of sRGB.
_ROUNDING = 2


class UnusableProfile(Exception):
  """A profile is damaged, too large, or not of the picture's colour space."""


def to_srgb(image: Image.Image, profile: bytes, space: str) -> Image.Image:
  """Converts a picture to sRGB, with the rendering intent 'perceptual'.

  Args:
    image: in L, RGB, RGBA or CMYK.
    profile: the ICC profile in the picture's file.
    space: 'GRAY', 'RGB' or 'CMYK', the colour space of the picture in its file. Greys may have been
      turned to RGB.

  Returns:
    The picture itself where the profile is one of sRGB. Otherwise it in RGB, or RGBA if it was.

  Raises:
    UnusableProfile: the profile can't be used for this picture.
  """
  if len(profile) > MAX_BYTES:
    raise UnusableProfile
  found, transform = _transform(profile)
  if found != space:
    raise UnusableProfile
  if transform is None:
    return image
  alpha = image.getchannel('A') if image.mode == 'RGBA' else None
  image = image.getchannel(0) if space == 'GRAY' else image.convert(_MODES[space])
  image = ImageCms.applyTransform(image, transform)
  if alpha is not None:
    image.putalpha(alpha)
  return image


@functools.lru_cache(maxsize=_KEPT)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
  """Returns a profile's colour space, and its transform to sRGB; '' and None if it is unusable.

  The transform is None where it would change nothing. Several threads may use one at once.
  """
  try:
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    transform = ImageCms.buildTransform(
      opened, ImageCms.createProfile('sRGB'), _MODES[space], 'RGB'
    )
  except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
    return '', None
  return space, None if _changes_nothing(transform, space) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, space: str) -> bool:
  """Whether a transform of greys or RGB leaves all colours as they are."""
  if space == 'CMYK':
    return False
  levels = np.arange(256) if space == 'GRAY' else np.linspace(0, 255, 18).round()
  axes = [levels.astype(np.uint8)] * (1 if space == 'GRAY' else 3)
  colors = np.stack(np.meshgrid(*axes, indexing='ij'), -1).reshape(1, -1, len(axes))
  converted = ImageCms.applyTransform(
    Image.fromarray(colors[..., 0] if space == 'GRAY' else colors), transform
  )
  return np.abs(np.asarray(converted).astype(int) - colors).max() <= _ROUNDING

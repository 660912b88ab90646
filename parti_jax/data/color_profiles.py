"""Converts pictures to sRGB using the color profiles in their files, with LittleCMS."""

import functools
import io

import numpy as np
from PIL import Image
from PIL import ImageCms

# The largest profile that is used; profiles for printing have one or two million bytes.
MAX_BYTES = 2**22
# Number of distinct profiles whose transforms are cached.
_KEPT = 32
# Color space of a profile -> Pillow's mode of the pictures that it describes.
_MODES = {'GRAY': 'L', 'RGB': 'RGB', 'CMYK': 'CMYK'}
# A profile counts as sRGB if its colors differ from sRGB's by at most this, of 255.
_ROUNDING = 2


class UnusableProfile(Exception):
  """A profile is damaged, too large, or for another color space than the picture's."""


def to_srgb(image: Image.Image, profile: bytes, space: str) -> Image.Image:
  """Converts a picture to sRGB, with the rendering intent 'perceptual'.

  Args:
    image: in L, RGB, RGBA or CMYK.
    profile: the ICC profile in the picture's file.
    space: 'GRAY', 'RGB' or 'CMYK', the picture's color space in its file. Gray pictures may have
      been converted to RGB.

  Returns:
    The picture itself if the profile is sRGB; otherwise a picture in RGB, or RGBA if it was RGBA.

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
  converted = ImageCms.applyTransform(image, transform)
  assert converted is not None  # It returns None only if it works in place.
  if alpha is not None:
    converted.putalpha(alpha)
  return converted


@functools.lru_cache(maxsize=_KEPT)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform | None]:
  """Returns a profile's color space, and its transform to sRGB; '' and None if it is unusable.

  The transform is None if it would change nothing. Threads may share a transform.
  """
  try:
    opened = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    transform = ImageCms.buildTransform(
      opened, ImageCms.createProfile('sRGB'), _MODES[space], 'RGB'
    )
  except (ImageCms.PyCMSError, OSError, ValueError, KeyError):
    return '', None
  return space, None if _is_identity(transform, space) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, space: str) -> bool:
  """Returns whether a transform of gray or RGB colors is the identity."""
  if space == 'CMYK':
    return False
  levels = np.arange(256) if space == 'GRAY' else np.linspace(0, 255, 18).round()
  axes = [levels.astype(np.uint8)] * (1 if space == 'GRAY' else 3)
  colors = np.stack(np.meshgrid(*axes, indexing='ij'), -1).reshape(1, -1, len(axes))
  converted = ImageCms.applyTransform(
    Image.fromarray(colors[..., 0] if space == 'GRAY' else colors), transform
  )
  return np.abs(np.asarray(converted).astype(int) - colors).max() <= _ROUNDING

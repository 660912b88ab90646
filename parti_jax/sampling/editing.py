"""Edits of a picture: which of its image tokens are kept while the others are redrawn.

Completion, outpainting, inpainting and variations are one thing for a model of image tokens. The
tokenizer encodes the picture, and the decoding loop takes the kept tokens over instead of sampling
them. A token is drawn with everything before it in raster order known, and nothing after it, so what
follows a hole does not shape what fills it. `TextToImage.generate` makes up for that with `best_of`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from jaxtyping import Int32
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import decoding

SIDES = ('top', 'bottom', 'left', 'right')
# Least level of gray, or of transparency, at which a mask asks for a new token.
_IN_MASK = 128
# Number that the noise of `vary` folds into a picture's key; positions are smaller.
_VARY_NOISE = 2**31 - 1
_DIGITS = 12


@dataclasses.dataclass(frozen=True)
class Edit:
  """A picture, and which of its image tokens to keep.

  Attributes:
    image: the picture, of the model's size.
    how: what was asked for, such as 'keep=top:0.5'.
    name: name of the picture's file; None if it was no file.
    kept: which tokens every picture keeps; None with `vary`.
    vary: share of tokens that are redrawn, at other places in each picture; None for `kept`.
  """

  image: UInt8[np.ndarray, 'height width 3']
  how: str
  name: str | None
  kept: Bool[np.ndarray, 'rows columns'] | None
  vary: float | None

  def kept_tokens(
    self, seed: int, image_index: Int32[np.ndarray, '*pictures'], length: int
  ) -> Bool[np.ndarray, '*pictures length']:
    """Returns which tokens each picture keeps.

    Args:
      seed: the seed of the pictures.
      image_index: index of each picture. With `vary`, the seed and the index decide.
      length: number of tokens of a picture.
    """
    if self.kept is not None:
      return np.broadcast_to(self.kept.reshape(-1), (*image_index.shape, length))
    assert self.vary is not None
    with numerics.fixed():
      keys = decoding.image_keys(jnp.uint32(seed), jnp.asarray(image_index.reshape(-1)))
      draw = lambda key: jax.random.uniform(jax.random.fold_in(key, _VARY_NOISE), (length,))
      noise = np.asarray(jax.vmap(draw)(keys))
    rank = np.argsort(np.argsort(noise, axis=1, kind='stable'), axis=1)
    return (rank >= round(self.vary * length)).reshape(*image_index.shape, length)

  def prefix(self, columns: int) -> int:
    """Returns how many tokens, of whole rows but not the last, come before the first drawn one.

    They are the same in all pictures. There are few such numbers, since a program is compiled for each.
    """
    if self.kept is None:
      return 0
    rows = int(np.cumprod(self.kept.all(axis=1)).sum())
    return columns * min(rows, len(self.kept) - 1)

  def metadata(self) -> dict[str, str]:
    """Returns what a picture's file says of its edit."""
    digest = hashlib.sha256(self.image.tobytes()).hexdigest()[:_DIGITS]
    named = {} if self.name is None else {'edited_image': self.name}
    return {'edit': self.how, **named, 'edited_pixels': f'sha256:{digest}'}


def kept_text(kept: Bool[np.ndarray, 'length']) -> str:
  """Returns kept tokens as hexadecimal digits, four tokens each, for metadata; kept ones are 1."""
  return np.packbits(kept).tobytes().hex()


def after_hole(kept: Bool[np.ndarray, '*pictures length']) -> Bool[np.ndarray, '*pictures length']:
  """Returns which kept tokens come after the first one that is drawn."""
  return kept & (np.cumsum(~kept, axis=-1) > 0)


def edit(
  image: Any,
  mask: Any,
  keep: Any,
  vary: Any,
  size: image_sizes.ImageSize,
  grid: tuple[int, int],
) -> Edit | None:
  """Reads and checks the arguments of an edit.

  Args:
    image: an argument of `TextToImage.generate`, as are the next three.
    mask: the mask.
    keep: the side and the share to keep.
    vary: the share to redraw.
    size: height and width of the model's pictures, in pixels; one number for squares.
    grid: rows and columns of image tokens.

  Returns:
    The edit; None if none is asked for.

  Raises:
    UserError: if a value is invalid, a file can't be read, or not exactly one of `mask`, `keep` and
      `vary` goes with `image`.
  """
  ways = {'mask': mask, 'keep': keep, 'vary': vary}
  given = [name for name, value in ways.items() if value is not None]
  if image is None:
    if given:
      raise UserError(f'{given[0]} needs a picture to edit; give `image` as well')
    return None
  if len(given) != 1:
    raise UserError(
      'image needs one of mask (redraws what it marks), keep (such as top:0.5) and vary (such as '
      f'0.3); {", ".join(given) if given else "none"} given'
    )
  if keep is not None:
    how, kept = _kept_side(keep, grid)
  elif vary is not None:
    vary = checks.number('vary', vary, 0, 1)
    how, kept = f'vary={checks.number_text(vary)}', None
  picture, full_size, name = _picture(image, size)
  if mask is not None:
    how, kept = 'mask', _outside(mask, full_size, size, grid)
  return Edit(picture, how, name, kept, vary)


def check_settings(settings: sampling_settings.SamplingSettings, what: str) -> None:
  """Checks that the decoding loop for steered sampling supports settings.

  Args:
    settings: the settings.
    what: the argument that steers, for the message.

  Raises:
    UserError: if they skip layers or passes or are speculative.
  """
  if settings.skipping is not None:
    name, off = settings.skipping
    raise UserError(
      f'{what} is not possible with {name}={getattr(settings, name):g}, since it samples one token '
      f'after the other with all layers and passes; set it to {off}'
    )


def pictures(
  images: Any, size: image_sizes.ImageSize
) -> UInt8[np.ndarray, 'images height width 3']:
  """Returns one picture or several, in the forms of `image` of `TextToImage.generate`.

  Args:
    images: a picture; a list of them; or uint8 [images, height, width, 3].
    size: height and width of the result, in pixels; one number for squares.

  Raises:
    UserError: if there is none, or one can't be read.
  """
  if isinstance(images, (str, os.PathLike, Image.Image)) or getattr(images, 'ndim', 0) == 3:
    images = [images]
  try:
    found = [_picture(image, size)[0] for image in images]
  except TypeError:
    raise UserError(
      f'image={checks.shown(images)} is neither a picture nor a list of them'
    ) from None
  if not found:
    raise UserError('no image given')
  return np.stack(found)


def _kept_side(keep: Any, grid: tuple[int, int]) -> tuple[str, Bool[np.ndarray, 'rows columns']]:
  """Reads `keep`, such as 'top:0.5'; tokens are kept that lie in this share entirely."""
  found = re.fullmatch(r'(\w+):(.+)', checks.text('keep', keep))
  share = None
  if found and found[1] in SIDES:
    try:
      share = float(found[2])
    except ValueError:
      pass
  if found is None or share is None or not 0 <= share <= 1:
    raise UserError(
      f'keep={checks.shown(keep)} must be a side and a share from 0 to 1, such as top:0.5; the sides '
      f'are {", ".join(SIDES)}'
    )
  along = 0 if found[1] in ('top', 'bottom') else 1
  count = int(grid[along] * share + 1e-6)
  place = np.arange(grid[along])
  line = place < count if found[1] in ('top', 'left') else place >= grid[along] - count
  kept = np.broadcast_to(line[:, None] if along == 0 else line, grid)
  return f'keep={found[1]}:{checks.number_text(share)}', kept


def _picture(
  image: Any, size: image_sizes.ImageSize
) -> tuple[UInt8[np.ndarray, 'height width 3'], tuple[int, int], str | None]:
  """Returns a picture's central area in a size, the whole picture's size, and its file's name.

  Args:
    image: a path, a PIL image, or uint8 [height, width, 3].
    size: height and width of the result, in pixels; one number for squares.
  """
  name = None
  if isinstance(image, (str, os.PathLike)):
    from parti_jax.data import image_decoding

    name = pathlib.Path(image).name
    whole = _decoded('image', image, lambda data: image_decoding.decode_whole(data)[0])
  elif isinstance(image, Image.Image):
    whole = image
    if image.mode in ('RGBA', 'LA', 'PA') or 'transparency' in image.info:
      whole = Image.new('RGBA', image.size, 'white')
      whole.alpha_composite(image.convert('RGBA'))
    whole = whole.convert('RGB')
  else:
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
      raise UserError(
        f'image is {array.dtype} {list(array.shape)}, expected the path of a file, a PIL image, or '
        'uint8 [height, width, 3]'
      )
    whole = Image.fromarray(array)
  height, width = image_sizes.sides(size)
  central = whole.crop(image_sizes.central(whole.width, whole.height, size))
  if central.size != (width, height):
    central = central.resize((width, height), Image.Resampling.BICUBIC)
  return np.asarray(central), whole.size, name


def _outside(
  mask: Any, full_size: tuple[int, int], size: image_sizes.ImageSize, grid: tuple[int, int]
) -> Bool[np.ndarray, 'rows columns']:
  """Returns which tokens lie outside a mask entirely.

  Args:
    mask: a path, a PIL image, or bool or uint8 [height, width].
    full_size: width and height of the picture that it belongs to.
    size: height and width of the model's pictures, in pixels; one number for squares.
    grid: rows and columns of image tokens.
  """
  if isinstance(mask, (str, os.PathLike)):
    inside = _decoded('mask', mask, _marked_in_file)
  elif isinstance(mask, Image.Image):
    inside = _marked(mask)
  else:
    array = np.asarray(mask)
    if array.ndim != 2 or array.dtype not in (np.bool_, np.uint8):
      raise UserError(
        f'mask is {array.dtype} {list(array.shape)}, expected the path of a file, a PIL image, or bool '
        'or uint8 [height, width]'
      )
    inside = array if array.dtype == np.bool_ else array >= _IN_MASK
  if inside.shape != full_size[::-1]:
    raise UserError(
      f'the mask has {inside.shape[1]}×{inside.shape[0]} pixels, and the picture '
      f'{full_size[0]}×{full_size[1]}; they must have the same size'
    )
  left, top, right, bottom = image_sizes.central(*full_size, size)
  inside = inside[top:bottom, left:right]
  rows, columns = (
    [slice(side * at // count, -(-side * (at + 1) // count)) for at in range(count)]
    for side, count in zip(inside.shape, grid)
  )
  kept = ~np.array([[inside[row, column].any() for column in columns] for row in rows])
  if kept.all():
    raise UserError(
      f"the mask marks nothing of the picture's central {'area' if isinstance(size, tuple) else 'square'}"
      '; white, or transparent, is what is redrawn'
    )
  return kept


def _marked_in_file(data: bytes) -> Bool[np.ndarray, 'height width']:
  from parti_jax.data import image_decoding

  image_decoding.decode_whole(data)  # Refuses what is damaged or too large.
  with Image.open(io.BytesIO(data), formats=image_decoding.FORMATS) as image:
    # As the picture's is, so that a mask that was painted over a photograph stays in place.
    return _marked(image_decoding.upright(image, image))


def _marked(mask: Image.Image) -> Bool[np.ndarray, 'height width']:
  """Returns what a mask marks: what is transparent; in a mask without transparency, what is white."""
  if mask.mode in ('RGBA', 'LA', 'PA') or 'transparency' in mask.info:
    alpha = np.asarray(mask.convert('RGBA').getchannel('A'))
    if alpha.min() < _IN_MASK:
      return alpha < _IN_MASK
    mask = mask.convert('RGB')
  return np.asarray(mask.convert('L')) >= _IN_MASK


def _decoded(name: str, path: Any, decode: Any) -> Any:
  """Decodes a file; raises UserError, with the argument's name and the path, if that fails."""
  from parti_jax.data.undecodable import UndecodablePicture

  try:
    return decode(pathlib.Path(path).read_bytes())
  except (OSError, ValueError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(f'{name} {path}: cannot read it ({reason})') from error
  except UndecodablePicture as error:
    raise UserError(f'{name} {path}: {error}; give a PNG, JPEG, WebP or GIF') from error

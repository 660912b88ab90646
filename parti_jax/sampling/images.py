"""Writes pictures as PNG files with metadata and descriptive names, and draws labeled grids."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import os
import pathlib
import re
import secrets
import sys
import textwrap
import unicodedata
import warnings
from collections.abc import Iterable
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import PngImagePlugin

import parti_jax
from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError

SOFTWARE = f'parti_jax {parti_jax.__version__}'

# Pictures on a grid are enlarged to about this many pixels.
_SMALLEST_ON_GRID = 192
_FONT_SIZE = 16
_GAP = 8
# A sheet takes three bytes per pixel.
_MOST_PIXELS = 1 << 30
_LONGEST_SLUG = 60
# File names may have 255 bytes, and the seed, index and suffixes need some of them.
_LONGEST_SLUG_BYTES = 120
_DIGITS = 12
_NO_WORDS = 'picture'
# Invisible letters and marks, which file systems may ignore in comparisons.
_INVISIBLE = re.compile(
  '[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]'
)
# Names of devices on Windows, with any suffix.
_RESERVED = re.compile('con|prn|aux|nul|com[0-9]|lpt[0-9]')


def checked(images, size: image_sizes.ImageSize | None = None) -> np.ndarray:
  """Checks pictures.

  Args:
    images: uint8 [images, height, width, 3], as an array or what NumPy can convert to one.
    size: required height and width, one number for squares; None for any.

  Returns:
    The array.

  Raises:
    UserError: if the shape or the dtype is wrong.
  """
  try:
    array = np.asarray(images)
  except ValueError:  # Lists of different lengths.
    raise UserError(f'images={checks.shown(images)} have different sizes') from None
  sides = ('height', 'width') if size is None else image_sizes.sides(size)
  right = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3
  if not right or (size is not None and array.shape[1:3] != sides):
    raise UserError(
      f'images are {array.dtype} {list(array.shape)}, expected uint8 [n, {sides[0]}, {sides[1]}, 3]'
    )
  return array


def to_pil(image: UInt8[np.ndarray, 'height width 3']) -> Image.Image:
  """Converts a picture to a PIL image."""
  return Image.fromarray(image)


def slug(text: str) -> str:
  """Converts a text to part of a file name: lower-case letters, digits and dashes; never empty.

  Latin letters lose their accents. Letters of other scripts are kept, in a normal form that is the
  same on every file system, unless this file system's encoding doesn't have them. The result has at
  most 120 bytes.
  """
  decomposed = unicodedata.normalize('NFKD', text)
  plain = decomposed.encode('ascii', 'ignore').decode()
  words = _words(plain)
  if any(unicodedata.category(letter)[0] in 'LN' for letter in decomposed if not letter.isascii()):
    kept = _words(text)
    try:
      kept.encode(sys.getfilesystemencoding())
      words = kept
    except UnicodeEncodeError:
      words = f'{words or _NO_WORDS}-{_digest(text)}'
  if words or not text.strip():
    return words or _NO_WORDS
  return f'{_NO_WORDS}-{_digest(text)}'


def _words(text: str) -> str:
  """Returns the letters and digits of a text, case folded, with dashes in place of the rest."""
  folded = text
  for _ in range(2):  # Folding may undo the normal form, and vice versa.
    folded = unicodedata.normalize('NFKC', folded).casefold()
  found: list[str] = []
  for letter in unicodedata.normalize('NFKC', folded):
    category = unicodedata.category(letter)[0]
    if category in 'LN' or (category == 'M' and found and found[-1] != '-'):
      if not _INVISIBLE.match(letter):
        found.append(letter)
    elif found and found[-1] != '-':
      found.append('-')
  words = ''.join(found)[:_LONGEST_SLUG].encode('utf-8', 'ignore')[:_LONGEST_SLUG_BYTES]
  return words.decode('utf-8', 'ignore').strip('-')


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:_DIGITS]


def distinct_names(texts: Iterable[str]) -> dict[str, str]:
  """Returns a file name, without a suffix, for each text; all differ on every file system.

  The name is the text's `slug`. If another text has the same slug, or Windows reserves it for a
  device, a digest of the text follows, so that names don't depend on the order of the texts.

  Args:
    texts: any texts; duplicates count once.

  Returns:
    {text: name}.
  """
  slugs = {text: slug(text) for text in texts}
  # Through upper case too, since some file systems compare names in upper case.
  keys = {text: name.upper().casefold() for text, name in slugs.items()}
  times = collections.Counter(keys.values())
  return {
    text: name
    if times[keys[text]] == 1 and not _RESERVED.fullmatch(name)
    else f'{name}_{_digest(text)}'
    for text, name in slugs.items()
  }


def save_picture(
  folder, image: UInt8[np.ndarray, 'height width 3'], metadata: dict[str, str]
) -> pathlib.Path:
  """Writes a picture as PNG. Its name consists of the prompt, the seed, and the rank or index.

  An existing file is replaced only if its metadata shows that it is the same picture. Otherwise the
  new file's name ends in a number.

  Args:
    folder: the output folder, created if it does not exist.
    image: the picture.
    metadata: text chunks of the file. They must include 'prompt', 'seed' and 'image_index'; 'rank'
      if the picture was ranked; and 'upscaled', the factor, if it was enlarged.

  Returns:
    The path of the file.

  Raises:
    UserError: if the file can't be written.
  """
  number = f'rank{metadata["rank"]}' if 'rank' in metadata else metadata['image_index']
  name = f'{slug(metadata["prompt"])}_seed{metadata["seed"]}_{number}'
  return save(folder, name, to_pil(image), metadata)


def save_grid(
  folder, picture: Image.Image, prompts: Sequence[str], metadata: dict[str, str]
) -> pathlib.Path:
  """Writes a grid like `save_picture`; its metadata also has the prompts, one per line."""
  more = f'-and-{len(prompts) - 1}-more' if len(prompts) > 1 else ''
  name = f'{slug(prompts[0])}{more}_seed{metadata["seed"]}_grid'
  return save(folder, name, picture, metadata | {'prompt': '\n'.join(prompts)})


def read_metadata(path) -> dict[str, str] | None:
  """Returns the text chunks of a PNG, or None if it is missing or damaged."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # Grids may be large.
      with Image.open(path) as picture:
        picture.load()
        return dict(getattr(picture, 'text', {}))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return None


def save(folder, name: str, picture: Image.Image, metadata: dict[str, str]) -> pathlib.Path:
  """Writes a PIL image like `save_picture`, under a name given without its suffix."""
  folder = local_folder(folder)
  metadata = _stored(metadata)
  if 'upscaled' in metadata:
    name += f'_x{metadata["upscaled"]}'
  temporary = folder / f'.{name}.{secrets.token_hex(4)}'
  try:
    folder.mkdir(parents=True, exist_ok=True)
    path = _free_path(folder, name, metadata)
    try:
      picture.save(temporary, 'PNG', pnginfo=_chunks(metadata))
      os.replace(temporary, path)
    finally:
      temporary.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'{folder}: cannot write pictures there ({error.strerror or error})') from error
  return path


def local_folder(folder) -> pathlib.Path:
  """Returns the path of an output folder for pictures.

  Raises:
    UserError: if it is a URL or not a valid path.
  """
  folder = checks.text('folder', folder)
  storage.check_local(folder)
  if '\0' in folder:
    raise UserError(f'folder={checks.shown(folder)} has a NUL character, which paths may not have')
  return pathlib.Path(folder)


def _stored(metadata: dict[str, str]) -> dict[str, str]:
  """Returns the metadata as a file has them, with the software's name."""
  return {key: _storable(value) for key, value in (metadata | {'software': SOFTWARE}).items()}


def _storable(value: str) -> str:
  """Replaces what a PNG's text can't have: NUL, and characters that aren't Unicode."""
  return value.encode('utf-8', 'replace').decode().replace('\0', '\ufffd')


def _chunks(metadata: dict[str, str]) -> PngImagePlugin.PngInfo:
  info = PngImagePlugin.PngInfo()
  for key, value in metadata.items():
    if value.isascii():
      info.add_text(key, value)
    else:  # tEXt has only Latin-1.
      info.add_itxt(key, value)
  return info


def png(image: UInt8[np.ndarray, 'height width 3'], metadata: dict[str, str]) -> bytes:
  """Returns the content of the file that `save_picture` writes."""
  content = io.BytesIO()
  to_pil(image).save(content, 'PNG', pnginfo=_chunks(_stored(metadata)))
  return content.getvalue()


def _free_path(folder: pathlib.Path, name: str, metadata: dict[str, str]) -> pathlib.Path:
  """Returns the first path that is free or whose file has this metadata, except the software."""
  paths = (
    folder / (f'{name}.png' if number == 1 else f'{name}_{number}.png')
    for number in itertools.count(1)
  )
  return next(path for path in paths if not os.path.lexists(path) or is_saved(path, metadata))


def is_saved(path: pathlib.Path, metadata: dict[str, str]) -> bool:
  """Returns whether a file is a whole PNG with this metadata, written by any version of the software."""
  expected = {key: value for key, value in _stored(metadata).items() if key != 'software'}
  found = read_metadata(path)
  return found is not None and {key: found.get(key) for key in expected} == expected


def grid(
  images: UInt8[np.ndarray, 'prompts num_images height width 3'],
  prompts: Sequence[str],
  display_size=None,
) -> Image.Image:
  """Draws all pictures on a white sheet, with a labeled row for each prompt.

  Args:
    images: the pictures.
    prompts: labels of the rows; long ones are wrapped.
    display_size: height of a picture on the sheet, in pixels. The default is the multiple of its
      height that is nearest to 192 pixels, and at least its height.

  Raises:
    UserError: if the sheet would be too large for memory, or the size is invalid.
  """
  rows, columns, height, width = images.shape[:4]
  if display_size is None:
    display_size = height * max(1, round(_SMALLEST_ON_GRID / height))
  display_size = checks.count('display_size', display_size)
  size = (max(1, round(display_size * width / height)), display_size)
  font = scaled_font(_FONT_SIZE)
  line_height = sum(font.getmetrics()) + 2
  sheet_width = columns * (size[0] + _GAP) + _GAP
  labels = [wrap(prompt, font, sheet_width - 2 * _GAP) for prompt in prompts]
  heights = [len(label) * line_height + size[1] + 2 * _GAP for label in labels]
  sheet = blank((sheet_width, sum(heights) + _GAP))
  draw = ImageDraw.Draw(sheet)
  top = _GAP
  for row in range(rows):
    for number, line in enumerate(labels[row]):
      draw.text((_GAP, top + number * line_height), line, fill='black', font=font)
    below = top + len(labels[row]) * line_height + _GAP // 2
    for column in range(columns):
      picture = to_pil(images[row, column]).resize(size, Image.Resampling.LANCZOS)
      sheet.paste(picture, (_GAP + column * (size[0] + _GAP), below))
    top += heights[row]
  return sheet


def scaled_font(size: float) -> ImageFont.FreeTypeFont:
  """Returns Pillow's default font in a size, in pixels."""
  font = ImageFont.load_default(size)
  assert isinstance(font, ImageFont.FreeTypeFont)  # Only the font without a size is another kind.
  return font


def blank(size: tuple[int, int]) -> Image.Image:
  """Returns a white sheet.

  Args:
    size: width and height in pixels.

  Raises:
    UserError: if it would be too large for memory.
  """
  if size[0] * size[1] > _MOST_PIXELS:
    raise UserError(
      f'a sheet of {size[0]:,}×{size[1]:,} pixels is too large; show fewer or smaller pictures'
    )
  return Image.new('RGB', size, 'white')


def wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Wraps a text to lines of at most `width` pixels, or of one letter if it is wider."""
  text = ' '.join(text.split())
  longest = len(text)
  while longest > 1:
    lines = textwrap.wrap(text, longest)
    widest = max(font.getlength(line) for line in lines)
    if widest <= width:
      return lines
    longest = min(longest - 1, max(1, int(longest * width / widest)))
  return list(text)

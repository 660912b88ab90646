"""Pictures as files: PNG with metadata, labelled grids, names that tell what they show."""

from __future__ import annotations

import collections
import hashlib
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
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import PngImagePlugin

import parti_jax
from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError

SOFTWARE = f'parti_jax {parti_jax.__version__}'

# Pictures on a grid are enlarged to at least this many pixels.
_SMALLEST_ON_GRID = 192
_FONT_SIZE = 16
_GAP = 8
# A sheet takes three bytes for each of its pixels.
_MOST_PIXELS = 1 << 30
_LONGEST_SLUG = 60
# File systems take names of 255 bytes; seed, index and endings need room too.
_LONGEST_SLUG_BYTES = 120
_DIGITS = 12
_NO_WORDS = 'picture'
# Letters and marks that are not drawn, and that file systems may leave out of a comparison.
_INVISIBLE = re.compile(
  '[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]'
)
# Names of devices on Windows, whatever their ending.
_RESERVED = re.compile('con|prn|aux|nul|com[0-9]|lpt[0-9]')


def checked(images, size: int | None = None) -> np.ndarray:
  """Checks pictures.

  Args:
    images: uint8 [n, height, width, 3], an array or what NumPy makes one of.
    size: height and width that they must have; None for any.

  Returns:
    The array.

  Raises:
    UserError: if they are of another shape or dtype.
  """
  try:
    array = np.asarray(images)
  except ValueError:  # Lists of different lengths.
    raise UserError(f'images={checks.shown(images)} are not of one size') from None
  sides = ('height', 'width') if size is None else (size, size)
  right = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] == 3
  if not right or (size is not None and array.shape[1:3] != sides):
    raise UserError(
      f'images are {array.dtype} {list(array.shape)}, needed is uint8 '
      f'[n, {sides[0]}, {sides[1]}, 3]'
    )
  return array


def to_pil(image: np.ndarray) -> Image.Image:
  """uint8 [height, width, 3] to a PIL picture."""
  return Image.fromarray(image)


def slug(text: str) -> str:
  """A text as part of a file name: lower-case letters, digits and dashes; never empty.

  Latin letters lose their accents; those of other scripts stay, in a normal form that is the same
  on every file system, unless the one in use knows only other letters. The result has 120 bytes at
  most.
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
  """The letters and digits of a text, case folded, with a dash for what is between them."""
  folded = text
  for _ in range(2):  # Folding may undo the normal form, and the other way round.
    folded = unicodedata.normalize('NFKC', folded).casefold()
  found = []
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
  """File names of texts, without an ending: a `slug` each, all different on every file system.

  A text whose slug another text has too, or that Windows reserves for a device, gets a digest of
  its text behind it, so that its name does not depend on the order of the texts.

  Args:
    texts: any texts; each is counted once.

  Returns:
    text -> name.
  """
  slugs = {text: slug(text) for text in texts}
  # Upper case too, since some file systems compare that.
  keys = {text: name.upper().casefold() for text, name in slugs.items()}
  times = collections.Counter(keys.values())
  return {
    text: name
    if times[keys[text]] == 1 and not _RESERVED.fullmatch(name)
    else f'{name}_{_digest(text)}'
    for text, name in slugs.items()
  }


def save_picture(folder, image: np.ndarray, metadata: dict[str, str]) -> pathlib.Path:
  """Writes a picture as PNG, under a name made of its prompt, seed and rank or index.

  A file that is there already is replaced only if its metadata says that it is the same picture;
  otherwise the new one gets a number behind its name.

  Args:
    folder: made if it is not there.
    image: uint8 [height, width, 3].
    metadata: text chunks of the file; 'prompt', 'seed' and 'image_index' among them, and 'rank'
      if the picture was ranked, and 'upscaled', the factor, if it was enlarged.

  Returns:
    The file.

  Raises:
    UserError: if it can't be written.
  """
  number = f'rank{metadata["rank"]}' if 'rank' in metadata else metadata['image_index']
  name = f'{slug(metadata["prompt"])}_seed{metadata["seed"]}_{number}'
  return save(folder, name, to_pil(image), metadata)


def save_grid(
  folder, picture: Image.Image, prompts: Sequence[str], metadata: dict[str, str]
) -> pathlib.Path:
  """Writes a grid as `save_picture` does; its metadata also holds the prompts, one a line."""
  more = f'-and-{len(prompts) - 1}-more' if len(prompts) > 1 else ''
  name = f'{slug(prompts[0])}{more}_seed{metadata["seed"]}_grid'
  return save(folder, name, picture, metadata | {'prompt': '\n'.join(prompts)})


def read_metadata(path) -> dict[str, str] | None:
  """Text chunks of a PNG; None if there is no such picture."""
  try:
    with warnings.catch_warnings():
      warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # Grids may be large.
      with Image.open(path) as picture:
        picture.load()
        return dict(getattr(picture, 'text', {}))
  except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
    return None


def save(folder, name: str, picture: Image.Image, metadata: dict[str, str]) -> pathlib.Path:
  """Writes a PIL picture as `save_picture` does, under a name without its ending."""
  folder = local_folder(folder)
  metadata = {key: _storable(value) for key, value in (metadata | {'software': SOFTWARE}).items()}
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
    raise UserError(
      f'{folder}: pictures cannot be written there ({error.strerror or error})'
    ) from error
  return path


def local_folder(folder) -> pathlib.Path:
  """The path of a folder that pictures are written to.

  Raises:
    UserError: if it is a URL or is not a path.
  """
  folder = checks.text('folder', folder)
  storage.check_local(folder)
  if '\0' in folder:
    raise UserError(f'folder={checks.shown(folder)} has a character that no path may have')
  return pathlib.Path(folder)


def _storable(value: str) -> str:
  """A text that a PNG can hold: without what is not Unicode, and without NUL."""
  return value.encode('utf-8', 'replace').decode().replace('\0', '\ufffd')


def _chunks(metadata: dict[str, str]) -> PngImagePlugin.PngInfo:
  info = PngImagePlugin.PngInfo()
  for key, value in metadata.items():
    if value.isascii():
      info.add_text(key, value)
    else:  # tEXt is Latin-1 only.
      info.add_itxt(key, value)
  return info


def _free_path(folder: pathlib.Path, name: str, metadata: dict[str, str]) -> pathlib.Path:
  """The first name that is free, or whose file has this metadata (but for the software)."""
  identity = {key: value for key, value in metadata.items() if key != 'software'}
  for number in itertools.count(1):
    path = folder / (f'{name}.png' if number == 1 else f'{name}_{number}.png')
    if not os.path.lexists(path):
      return path
    there = read_metadata(path)
    if there is not None and {key: there.get(key) for key in identity} == identity:
      return path


def grid(
  images: np.ndarray, prompts: Sequence[str], display_size: int | None = None
) -> Image.Image:
  """All pictures on one white sheet, a row for each prompt under its label.

  Args:
    images: uint8 [prompts, num_images, height, width, 3].
    prompts: labels of the rows; long ones are wrapped.
    display_size: height of a picture on the sheet, in pixels; by default its own, or enlarged to
      a whole multiple of about 192 pixels if it is smaller.

  Returns:
    A PIL picture.

  Raises:
    UserError: if the sheet would be too large for the memory, or the size is invalid.
  """
  rows, columns, height, width = images.shape[:4]
  if display_size is None:
    display_size = height * max(1, round(_SMALLEST_ON_GRID / height))
  display_size = checks.count('display_size', display_size)
  size = (max(1, round(display_size * width / height)), display_size)
  font = ImageFont.load_default(size=_FONT_SIZE)
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


def blank(size: tuple[int, int]) -> Image.Image:
  """A white sheet.

  Args:
    size: width and height in pixels.

  Raises:
    UserError: if it would be too large for the memory.
  """
  if size[0] * size[1] > _MOST_PIXELS:
    raise UserError(
      f'a sheet of {size[0]:,}×{size[1]:,} pixels is too large; show fewer or smaller pictures'
    )
  return Image.new('RGB', size, 'white')


def wrap(text: str, font, width: int) -> list[str]:
  """A text as lines that are at most `width` pixels wide, unless one letter already is."""
  text = ' '.join(text.split())
  longest = len(text)
  while longest > 1:
    lines = textwrap.wrap(text, longest)
    widest = max(font.getlength(line) for line in lines)
    if widest <= width:
      return lines
    longest = min(longest - 1, max(1, int(longest * width / widest)))
  return list(text)

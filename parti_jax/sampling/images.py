"""Pictures as files: PNG with metadata, labelled grids, names that tell what they show."""

from __future__ import annotations

import itertools
import os
import pathlib
import re
import secrets
import textwrap
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
from PIL import PngImagePlugin

import parti_jax
from parti_jax.errors import UserError

SOFTWARE = f'parti_jax {parti_jax.__version__}'

# Pictures on a grid are enlarged to at least this many pixels.
_SMALLEST_ON_GRID = 192
_FONT_SIZE = 16
_GAP = 8
_LONGEST_SLUG = 60


def to_pil(image: np.ndarray) -> Image.Image:
  """uint8 [height, width, 3] to a PIL picture."""
  return Image.fromarray(image)


def slug(text: str) -> str:
  """A text as part of a file name: lower-case letters, digits and dashes; never empty."""
  plain = unicodedata.normalize('NFKD', text).encode('ascii', 'ignore').decode().lower()
  words = re.sub(r'[^a-z0-9]+', '-', plain).strip('-')
  return words[:_LONGEST_SLUG].strip('-') or 'picture'


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


def save_grid(folder, picture: Image.Image, prompts: Sequence[str],
              metadata: dict[str, str]) -> pathlib.Path:
  """Writes a grid as `save_picture` does; its metadata also holds the prompts, one a line."""
  more = f'-and-{len(prompts) - 1}-more' if len(prompts) > 1 else ''
  name = f'{slug(prompts[0])}{more}_seed{metadata["seed"]}_grid'
  return save(folder, name, picture, metadata | {'prompt': '\n'.join(prompts)})


def read_metadata(path) -> dict[str, str] | None:
  """Text chunks of a PNG; None if there is no such picture."""
  try:
    with Image.open(path) as picture:
      picture.load()
      return dict(getattr(picture, 'text', {}))
  except (OSError, SyntaxError, ValueError):
    return None


def save(folder, name: str, picture: Image.Image, metadata: dict[str, str]) -> pathlib.Path:
  """Writes a PIL picture as `save_picture` does, under a name without its ending."""
  folder = pathlib.Path(folder)
  metadata = metadata | {'software': SOFTWARE}
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
        f'{folder}: pictures cannot be written there ({error.strerror or error})') from error
  return path


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


def grid(images: np.ndarray, prompts: Sequence[str],
         display_size: int | None = None) -> Image.Image:
  """All pictures on one white sheet, a row for each prompt under its label.

  Args:
    images: uint8 [prompts, num_images, height, width, 3].
    prompts: labels of the rows; long ones are wrapped.
    display_size: height of a picture on the sheet, in pixels; by default its own, or enlarged to
      a whole multiple of about 192 pixels if it is smaller.

  Returns:
    A PIL picture.
  """
  rows, columns, height, width = images.shape[:4]
  if display_size is None:
    display_size = height * max(1, round(_SMALLEST_ON_GRID / height))
  size = (max(1, round(display_size * width / height)), display_size)
  font = ImageFont.load_default(size=_FONT_SIZE)
  line_height = sum(font.getmetrics()) + 2
  sheet_width = columns * (size[0] + _GAP) + _GAP
  labels = [wrap(prompt, font, sheet_width - 2 * _GAP) for prompt in prompts]
  heights = [len(label) * line_height + size[1] + 2 * _GAP for label in labels]
  sheet = Image.new('RGB', (sheet_width, sum(heights) + _GAP), 'white')
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

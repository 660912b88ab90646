"""Contact sheets: many small pictures on one page, each with its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from parti_jax.sampling import images as images_lib

_MARGIN = 16
_GAP = 12
_FONT_SIZE = 13
_LINE = 17
# Lines of text that a cell has room for; longer texts end with dots, which every font has.
_LINES = 3
_PICTURE = 128


def sheet(
  title: str, texts: Sequence[str], images: Sequence[Sequence[np.ndarray]], columns: int = 6
) -> Image.Image:
  """Draws a page.

  Args:
    title: above all.
    texts: one for each cell.
    images: for each cell its pictures, uint8 [height, width, 3], shown side by side and 128 pixels
      high; the same number in every cell.
    columns: cells side by side.

  Returns:
    An RGB picture.
  """
  font = ImageFont.load_default(_FONT_SIZE)
  width = len(images[0]) * (_PICTURE + 2) - 2
  columns = min(columns, len(texts))
  rows = -(-len(texts) // columns)
  height = _PICTURE + _LINES * _LINE + _GAP
  page_width = max(2 * _MARGIN + columns * (width + _GAP) - _GAP, 360)
  heading = images_lib.wrap(title, font, page_width - 2 * _MARGIN)
  top = _MARGIN + len(heading) * _LINE + _GAP
  page = images_lib.blank((page_width, top + rows * height + _MARGIN - _GAP))
  draw = ImageDraw.Draw(page)
  draw.multiline_text((_MARGIN, _MARGIN), '\n'.join(heading), fill='black', font=font)
  for index, (text, pictures) in enumerate(zip(texts, images)):
    left = _MARGIN + index % columns * (width + _GAP)
    upper = top + index // columns * height
    for position, picture in enumerate(pictures):
      page.paste(_shown(picture), (left + position * (_PICTURE + 2), upper))
    draw.multiline_text(
      (left, upper + _PICTURE + 2),
      '\n'.join(_label(text, font, width)),
      fill='black',
      font=font,
      spacing=_LINE - _FONT_SIZE,
    )
  return page


def _shown(picture: np.ndarray) -> Image.Image:
  """A picture at the sheet's size; small ones are enlarged without smoothing."""
  enlarge = picture.shape[0] <= _PICTURE // 2
  return Image.fromarray(picture).resize(
    (_PICTURE, _PICTURE), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
  )


def _label(text: str, font, width: int) -> list[str]:
  """The lines of a cell's text."""
  lines = images_lib.wrap(text, font, width)
  if len(lines) > _LINES:
    last = lines[_LINES - 1]
    while font.getlength(last + '...') > width:
      last = last[:-1]
    lines = [*lines[: _LINES - 1], last + '...']
  return lines

"""Draws contact sheets: many small pictures on one page, each with its text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from parti_jax.sampling import images as images_lib

_MARGIN = 16
_GAP = 12
_FONT_SIZE = 13
_LINE = 17
# Maximum number of lines in a cell; longer texts end with three dots, which all fonts have.
_LINES = 3
_PICTURE = 128


def sheet(
  title: str,
  texts: Sequence[str],
  images: Sequence[Sequence[UInt8[np.ndarray, '_ _ 3']]],
  columns: int = 6,
) -> Image.Image:
  """Draws a page.

  Args:
    title: the heading of the page.
    texts: the text of each cell.
    images: the pictures of each cell, the same number in each and of one shape; they are drawn side by
      side, 128 pixels high.
    columns: maximum number of cells in a row.
  """
  font = images_lib.scaled_font(_FONT_SIZE)
  across = max(1, round(_PICTURE * images[0][0].shape[1] / images[0][0].shape[0]))
  width = len(images[0]) * (across + 2) - 2
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
      page.paste(_shown(picture, across), (left + position * (across + 2), upper))
    draw.multiline_text(
      (left, upper + _PICTURE + 2),
      '\n'.join(_label(text, font, width)),
      fill='black',
      font=font,
      spacing=_LINE - _FONT_SIZE,
    )
  return page


def _shown(picture: UInt8[np.ndarray, 'height width 3'], across: int) -> Image.Image:
  """Resizes a picture for the sheet to a width; enlarges small ones without smoothing."""
  enlarge = picture.shape[0] <= _PICTURE // 2
  return Image.fromarray(picture).resize(
    (across, _PICTURE), Image.Resampling.NEAREST if enlarge else Image.Resampling.LANCZOS
  )


def _label(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
  """Returns the lines of a cell's text."""
  lines = images_lib.wrap(text, font, width)
  if len(lines) > _LINES:
    last = lines[_LINES - 1]
    while font.getlength(last + '...') > width:
      last = last[:-1]
    lines = [*lines[: _LINES - 1], last + '...']
  return lines

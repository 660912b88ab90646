"""A page of generated pictures next to the real ones, with the judge's verdicts as marks."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

from parti_jax.evaluation.openmoji import openmoji_report
from parti_jax.sampling import images as images_lib

_MARGIN = 16
_GAP = 8
_FONT_SIZE = 14
_LINE = 22
_TEXT = '#222222'
_RIGHT = '#1a7f37'
_NEAR = '#b26a00'
_WRONG = '#c62828'
_FRAME = '#cccccc'
# Minimum size of the pictures; they are enlarged by whole factors so that pixels stay sharp.
_SHOWN_SIZE = 128


def contact_sheet(
  sample: openmoji_report.Sample, max_rows: int = 40, columns: int = 2
) -> Image.Image:
  """Draws a page: for each prompt its caption, the real picture and the generated ones.

  Marks below each generated picture show whether its name is right (a tick), among the nearest five
  (5) or wrong (a cross), and whether its tone is right (a tick or a cross, for names with tones).

  Args:
    sample: the pictures of a split.
    max_rows: maximum number of prompts, spread evenly over the sample.
    columns: prompts side by side.

  Returns:
    An RGB picture. Its pictures are enlarged by a whole factor, without smoothing.
  """
  count = len(sample.asked)
  shown = np.unique(np.linspace(0, count - 1, min(count, max_rows)).round().astype(int))
  scale = _scale(sample)
  cell_width, cell_height = _cell_size(sample)
  columns = min(columns, len(shown))
  rows = -(-len(shown) // columns)
  width = 2 * _MARGIN + columns * cell_width + (columns - 1) * 2 * _MARGIN
  title = _title(sample, len(shown))
  page = Image.new(
    'RGB',
    (max(width, _text_width(title) + 2 * _MARGIN), 2 * _MARGIN + 2 * _LINE + rows * cell_height),
    'white',
  )
  draw = ImageDraw.Draw(page)
  draw.multiline_text((_MARGIN, _MARGIN), title, fill=_TEXT, font=_font())
  for position, prompt in enumerate(shown):
    row, column = position % rows, position // rows
    corner = (
      _MARGIN + column * (cell_width + 2 * _MARGIN),
      _MARGIN + 2 * _LINE + row * cell_height,
    )
    _draw_prompt(page, draw, corner, sample, prompt, scale)
  return page


def _font() -> ImageFont.FreeTypeFont:
  return images_lib.scaled_font(_FONT_SIZE)


def _text_width(text: str) -> int:
  return max(int(_font().getlength(line)) + 1 for line in text.split('\n'))


def _scale(sample: openmoji_report.Sample) -> int:
  """Returns the integer factor by which pictures are enlarged."""
  return max(1, -(-_SHOWN_SIZE // sample.real.shape[1]))


def _cell_size(sample: openmoji_report.Sample) -> tuple[int, int]:
  """Returns the width and height of a prompt's cell, in pixels."""
  shown = sample.real.shape[1] * _scale(sample)
  pictures = 1 + sample.generated.shape[1]
  return pictures * shown + pictures * _GAP, shown + 2 * _LINE + 2 * _GAP


def _title(sample: openmoji_report.Sample, shown: int) -> str:
  """Returns a description of the page, in two lines."""
  of = '' if shown == len(sample.asked) else f' of {len(sample.asked)} judged'
  return (
    f'{sample.split}: {shown}{of} prompts. Left: the real picture. Right: generated.\n'
    'name: nearest real picture in the asked tones (tick: right, 5: among five nearest). '
    "tone: nearest of the name's tones."
  )


def _draw_prompt(page, draw, corner, sample, prompt, scale):
  """Draws one prompt's caption, pictures and marks with its upper left corner at `corner`."""
  left, top = corner
  size = sample.real.shape[1] * scale
  width, _ = _cell_size(sample)
  draw.text((left, top), _shortened(sample.asked[prompt].caption, width), fill=_TEXT, font=_font())
  top += _LINE
  _paste(page, draw, sample.real[prompt], (left, top), scale)
  draw.text((left, top + size + 4), 'real', fill=_TEXT, font=_font())
  verdicts = sample.verdicts
  for index, image in enumerate(sample.generated[prompt]):
    x = left + 2 * _GAP + (index + 1) * size + index * _GAP
    _paste(page, draw, image, (x, top), scale)
    marks = [
      (
        'name',
        'tick'
        if verdicts.name_top1[prompt, index]
        else '5'
        if verdicts.name_top5[prompt, index]
        else 'cross',
      )
    ]
    if verdicts.tone_judged[prompt]:
      marks.append(('tone', 'tick' if verdicts.tone_right[prompt, index] else 'cross'))
    _draw_marks(draw, (x, top + size + 4), marks)


def _shortened(text: str, width: int) -> str:
  """Shortens a caption that is wider than its cell, and appends dots."""
  if _text_width(text) <= width:
    return text
  while text and _text_width(text + '...') > width:
    text = text[:-1]
  return text + '...'


def _paste(page, draw, image: UInt8[np.ndarray, 'height width 3'], corner, scale: int):
  """Pastes a picture on the page with a thin frame."""
  enlarged = Image.fromarray(image.repeat(scale, axis=0).repeat(scale, axis=1))
  page.paste(enlarged, corner)
  left, top = corner
  draw.rectangle((left - 1, top - 1, left + enlarged.width, top + enlarged.height), outline=_FRAME)


def _draw_marks(draw, corner, marks: Sequence[tuple[str, str]]):
  """Draws words with a tick, cross or 5 each; as lines, since fonts may lack the characters."""
  x, y = corner
  for word, mark in marks:
    draw.text((x, y), word, fill=_TEXT, font=_font())
    x += _text_width(word) + 4
    if mark == 'tick':
      draw.line([(x, y + 8), (x + 4, y + 13), (x + 11, y + 3)], fill=_RIGHT, width=3)
    elif mark == 'cross':
      draw.line([(x, y + 3), (x + 10, y + 13)], fill=_WRONG, width=3)
      draw.line([(x, y + 13), (x + 10, y + 3)], fill=_WRONG, width=3)
    else:
      draw.text((x + 1, y), mark, fill=_NEAR, font=_font())
    x += 20

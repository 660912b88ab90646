"""Draws lines through points on axes, with a label at each point."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from PIL import Image
from PIL import ImageDraw

from parti_jax.sampling import images as images_lib

_WIDTH, _HEIGHT = 560, 400
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 40, 64, 56
_FONT_SIZE = 13
_LINE = 17
_TICKS = 5
_TITLE_LINES = 2
# Colors that color-blind people can distinguish (Okabe and Ito 2008).
_COLORS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')


@dataclasses.dataclass(frozen=True)
class Point:
  """A point.

  Attributes:
    x: its position.
    y: its position.
    label: a short text next to it.
    x_error: half of the length of a bar through it; None for no bar.
  """

  x: float
  y: float
  label: str
  x_error: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
  """A chart.

  Attributes:
    title: its heading, of at most two lines. Like all texts, it may only have letters of Pillow's font,
      which lacks those with accents.
    x_label: name of the horizontal axis.
    y_label: name of the vertical axis, above it.
    lines: name of a line, for the legend -> its points in order.
  """

  title: str
  x_label: str
  y_label: str
  lines: dict[str, Sequence[Point]]


def draw(panels: Sequence[Panel]) -> Image.Image:
  """Draws panels below each other.

  Args:
    panels: the panels; each has a point, and all positions are finite.
  """
  heights = [
    _HEIGHT + _LINE * (len(panel.lines) if len(panel.lines) > 1 else 0) for panel in panels
  ]
  page = images_lib.blank((_WIDTH, sum(heights)))
  upper = 0
  for panel, height in zip(panels, heights):
    _panel(ImageDraw.Draw(page), panel, upper)
    upper += height
  return page


def ticks(low: float, high: float) -> list[float]:
  """Returns round numbers, some of which lie outside of [low, high] by at most a step."""
  step = _step((high - low) / _TICKS or abs(high) / _TICKS or 1)
  first = math.floor(low / step)
  count = math.ceil(high / step) - first
  return [step * (first + number) for number in range(max(count, 1) + 1)]


def _step(least: float) -> float:
  """Returns the smallest of 1, 2 and 5 times a power of ten that is at least `least`."""
  power = 10.0 ** math.floor(math.log10(least))
  return next(power * digit for digit in (1, 2, 5, 10) if power * digit >= least * (1 - 1e-9))


def _panel(draw: ImageDraw.ImageDraw, panel: Panel, upper: int) -> None:
  font = images_lib.scaled_font(_FONT_SIZE)
  points = [point for line in panel.lines.values() for point in line]
  reach = [point.x_error or 0 for point in points]
  x_ticks = ticks(
    min(point.x - error for point, error in zip(points, reach)),
    max(point.x + error for point, error in zip(points, reach)),
  )
  y_ticks = ticks(min(point.y for point in points), max(point.y for point in points))
  right, lower = _WIDTH - _RIGHT, upper + _HEIGHT - _BOTTOM

  def across(x: float) -> float:
    return _LEFT + (x - x_ticks[0]) / (x_ticks[-1] - x_ticks[0]) * (right - _LEFT)

  def down(y: float) -> float:
    top = upper + _TOP
    return lower - (y - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]) * (lower - top)

  for x in x_ticks:
    draw.line([(across(x), upper + _TOP), (across(x), lower)], fill='#dddddd')
    draw.text((across(x), lower + 4), _number(x, x_ticks), fill='black', font=font, anchor='ma')
  for y in y_ticks:
    draw.line([(_LEFT, down(y)), (right, down(y))], fill='#dddddd')
    draw.text((_LEFT - 6, down(y)), _number(y, y_ticks), fill='black', font=font, anchor='rm')
  title = images_lib.wrap(panel.title, font, _WIDTH - 16)[:_TITLE_LINES]
  for row, text in enumerate([*title, panel.y_label]):
    draw.text((8, upper + 6 + _LINE * row), text, fill='black', font=font)
  middle = (_LEFT + right) / 2
  draw.text((middle, lower + 8 + _LINE), panel.x_label, fill='black', font=font, anchor='ma')
  for number, (name, line) in enumerate(panel.lines.items()):
    color = _COLORS[number % len(_COLORS)]
    places = [(across(point.x), down(point.y)) for point in line]
    if len(places) > 1:
      draw.line(places, fill=color, width=2)
    for point, (x, y) in zip(line, places):
      if point.x_error:
        draw.line(
          [(across(point.x - point.x_error), y), (across(point.x + point.x_error), y)], color
        )
      draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
      draw.text((x + 5, y - 5), point.label, fill=color, font=font, anchor='ls')
    if len(panel.lines) > 1:
      row = upper + _HEIGHT - _BOTTOM + 10 + _LINE * (number + 2)
      draw.line([(_LEFT, row + 8), (_LEFT + 20, row + 8)], fill=color, width=2)
      draw.text((_LEFT + 26, row), name, fill='black', font=font)


def _number(value: float, among: Sequence[float]) -> str:
  """Returns a tick's number with as many decimals as the ticks need."""
  step = among[1] - among[0]
  decimals = max(0, -math.floor(math.log10(step) + 1e-9))
  return f'{value:.{decimals}f}' if decimals < 7 else f'{value:.3g}'

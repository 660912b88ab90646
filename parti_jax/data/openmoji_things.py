"""The things that scenes are made of: OpenMoji drawings that are easy to recognize and to tell apart.

openmoji_things.tsv lists them with their nouns, their colors and the box of their ink. Some come in
several colors; these are drawn by replacing the fills of the original. Drawings are rendered at
the size that they have in a scene, with transparency.

This module doesn't import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import pathlib
import re
from collections.abc import Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji

LIST = pathlib.Path(__file__).with_name('openmoji_things.tsv')
LIST_COLUMNS = ('code', 'noun', 'plural', 'aliases', 'colors', 'fills', 'box')

# Color -> its main shade and its darker shade.
COLORS = {
  'red': ('#e0382f', '#b3221b'),
  'orange': ('#f68b1f', '#d86a0c'),
  'yellow': ('#fcea2b', '#f1b31c'),
  'green': ('#5fae3a', '#3f7f26'),
  'blue': ('#3f8fe0', '#2465ad'),
  'purple': ('#9161c4', '#6d4299'),
  'pink': ('#ff9ec6', '#e8719f'),
  'brown': ('#9a6236', '#6e4322'),
  'white': ('#ffffff', '#d0cfce'),
  'black': ('#3f3f3f', '#1e1e1e'),
}
# Ground -> its color in RGB. There is no black ground, since outlines are black.
GROUNDS = {
  'white': (255, 255, 255),
  'grey': (190, 190, 190),
  'red': (235, 90, 80),
  'orange': (250, 165, 70),
  'yellow': (255, 226, 90),
  'green': (130, 195, 100),
  'blue': (100, 170, 230),
  'purple': (170, 135, 210),
  'pink': (250, 185, 210),
  'brown': (170, 125, 85),
}
# The longest side of a thing, in units of which a picture's side has `UNITS`.
SIZES = {'small': 22, 'medium': 34, 'big': 56}
UNITS = 128
# Drawings are rendered this many times larger and averaged, since resvg draws lines thinner than a
# pixel with gaps.
_OVERSAMPLING = 4


@dataclasses.dataclass(frozen=True)
class Kind:
  """A kind of thing.

  Attributes:
    code: the code of its drawing.
    noun: the noun that identifies the kind.
    nouns: pairs of singular and plural, those of `noun` first; true of no other kind.
    colors: its colors; none if no color dominates, and one if it is the drawing's own.
    fills: fills of the drawing that take another color -> 0 for its main shade, 1 for the darker.
    box: left, top, right and bottom of the ink in the drawing of 72 by 72 units.
  """

  code: str
  noun: str
  nouns: tuple[tuple[str, str], ...]
  colors: tuple[str, ...]
  fills: Mapping[str, int]
  box: tuple[float, float, float, float]

  @property
  def varies(self) -> bool:
    """Whether the kind comes in several colors."""
    return len(self.colors) > 1

  def shape(self, longest: int) -> tuple[int, int]:
    """Returns height and width of a drawing, given the longer of the two."""
    width, height = self.box[2] - self.box[0], self.box[3] - self.box[1]
    scale = longest / max(width, height)
    return max(1, round(height * scale)), max(1, round(width * scale))


@functools.cache
def kinds() -> Mapping[str, Kind]:
  """Returns the kinds of things by noun, in the order of the list."""
  found = {}
  for line in LIST.read_text(encoding='utf-8').splitlines()[1:]:
    code, noun, plural, aliases, colors, fills, box = line.split('\t')
    nouns = [(noun, plural)]
    for alias in filter(None, aliases.split(';')):
      singular, _, several = alias.partition('/')
      nouns.append((singular, several))
    left, top, right, bottom = map(float, box.split())
    found[noun] = Kind(
      code,
      noun,
      tuple(nouns),
      tuple(filter(None, colors.split(','))),
      {fill[:-2]: int(fill[-1]) for fill in filter(None, fills.split(','))},
      (left, top, right, bottom),
    )
  return found


def list_digest() -> str:
  """Returns the digest of the list and the colors, which change when the drawings do."""
  return hashlib.sha256(
    LIST.read_bytes() + repr((COLORS, GROUNDS, SIZES, _OVERSAMPLING)).encode()
  ).hexdigest()


@functools.lru_cache(4096)
def render(noun: str, color: str, longest: int) -> UInt8[np.ndarray, 'height width 4']:
  """Renders a thing, cropped to its ink.

  Args:
    noun: noun of its kind.
    color: one of the kind's colors; '' if it has none.
    longest: the longer one of height and width, in pixels.

  Returns:
    Red, green, blue and opacity; read-only, since it is kept.

  Raises:
    UserError: the kind or the color doesn't exist, or `openmoji.render` raises it.
  """
  kind = kinds().get(noun)
  if kind is None or color not in (kind.colors or ('',)):
    raise UserError(f'there is no drawing of {noun!r} in the color {color!r}')
  svg = openmoji.read_svg(kind.code).decode()
  if kind.varies:
    for fill, shade in kind.fills.items():
      svg = re.sub(f'#{fill}', COLORS[color][shade], svg, flags=re.IGNORECASE)
  left, top, right, bottom = kind.box
  height, width = kind.shape(longest)
  size = (
    f'viewBox="{left:g} {top:g} {right - left:g} {bottom - top:g}" '
    f'width="{_OVERSAMPLING * width}" height="{_OVERSAMPLING * height}" preserveAspectRatio="none"'
  )
  svg, found = re.subn('viewBox="0 0 72 72"', size, svg, count=1)
  assert found, kind.code
  png = openmoji.import_data_package('resvg_py').svg_to_bytes(
    svg_string=svg, skip_system_fonts=True
  )
  large = np.asarray(Image.open(io.BytesIO(png)).convert('RGBA'))
  image = _averaged(large.reshape(height, _OVERSAMPLING, width, _OVERSAMPLING, 4))
  image.setflags(write=False)
  return image


def _averaged(
  pixels: UInt8[np.ndarray, 'height factor width factor 4'],
) -> UInt8[np.ndarray, 'height width 4']:
  """Averages squares of pixels; each color counts by its opacity."""
  opacity = pixels[..., 3:].astype(np.uint32)
  total = opacity.sum(axis=(1, 3))
  colors = (pixels[..., :3] * opacity).sum(axis=(1, 3))
  colors = (2 * colors + total) // np.maximum(2 * total, 1)
  count = _OVERSAMPLING**2
  return np.concatenate([colors, (total + count // 2) // count], axis=-1).astype(np.uint8)

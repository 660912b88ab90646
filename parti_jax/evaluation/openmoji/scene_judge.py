"""Says by its pixels alone what a picture of a scene shows, and whether it is what was asked for.

The judge learns nothing. It takes the color that prevails along the picture's edge for the ground,
and the rest for things: each connected part is compared with the drawings of all kinds in all
colors and sizes, by the squared difference of pixels over small shifts. A part that is too
different from all of them is an unknown thing.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32
from jaxtyping import Float64
from jaxtyping import Int
from jaxtyping import UInt8
from scipy import ndimage

from parti_jax.core import image_sizes
from parti_jax.data import openmoji_scenes
from parti_jax.data import openmoji_things

# What is judged of a picture, and its names in reports.
ASPECTS = ('things', 'counts', 'colors', 'sizes', 'places', 'ground')

# How far the ground may be from its nominal color, of values in [0, 255].
_SAME_GROUND = 60.0
# How parts are found: the color distance from which pixels differ from the ground, and by how many
# units they are joined. The next way is tried while there are unknown things.
_WAYS = ((60.0, 1.0), (90.0, 0.0), (35.0, 1.0), (60.0, 2.0))
# Sizes in units, of which a picture's side has `openmoji_things.UNITS`.
_EDGE, _SPECK, _TOLERANCE, _SHIFT, _AROUND = 3.0, 4.0, 5.0, 2.0, 3.0
# A part is unknown if no drawing explains this share of its difference from the ground.
_EXPLAINED = 0.4
# A thing of which more is unexplained may be larger or smaller than the nearest size, by this factor.
_DOUBTFUL, _SCALED = 0.12, 1.3
# Pictures and drawings are blurred by this standard deviation, in units, before they are compared.
# Otherwise a slight blur of a picture would change thin lines more than another drawing does.
_BLUR = 1.2
# Blurred, every second pixel is enough.
_STRIDE = 2.0


@dataclasses.dataclass(frozen=True)
class SeenThing:
  """A thing in a picture.

  Attributes:
    kind: noun of its kind; '' if it is unknown.
    color: its color; '' if it is unknown or its kind has none.
    size: a key of `openmoji_things.SIZES`; '' if it is unknown.
    box: left, top, width and height in pixels.
    unexplained: share of its difference from the ground that the nearest drawing leaves.
  """

  kind: str
  color: str
  size: str
  box: tuple[int, int, int, int]
  unexplained: float


@dataclasses.dataclass(frozen=True)
class Seen:
  """What a picture shows.

  Attributes:
    ground: a key of `openmoji_things.GROUNDS`; '' if it has another color.
    things: the things, from the left.
  """

  ground: str
  things: tuple[SeenThing, ...]


@dataclasses.dataclass(frozen=True)
class Verdict:
  """Whether a picture shows what was asked for; None for an aspect that wasn't asked for.

  Attributes:
    things: it shows the kinds, no others, and nothing unknown.
    counts: it shows the right number of each.
    colors: each has its color, for kinds that come in several.
    sizes: each has the size, where the caption states one.
    places: the things are in the relation.
    ground: the ground has its color.
  """

  things: bool
  counts: bool
  colors: bool | None
  sizes: bool | None
  places: bool | None
  ground: bool

  @property
  def right(self) -> bool:
    """Whether all aspects are right."""
    return all(getattr(self, aspect) is not False for aspect in ASPECTS)


@dataclasses.dataclass(frozen=True)
class _Templates:
  """The drawings of one size, each in the middle of a square.

  Attributes:
    side: the square's side in pixels, of which only every stride-th is kept.
    keys: kind and color of each.
    shapes: height and width of each.
    ink: red, green and blue, multiplied by the opacity.
    opacity: from 0 to 1.
  """

  side: int
  keys: Sequence[tuple[str, str]]
  shapes: Int[np.ndarray, 'drawings 2']
  ink: Float32[np.ndarray, 'drawings side side 3']
  opacity: Float32[np.ndarray, 'drawings side side 1']

  @classmethod
  def of_size(cls, size: str, image_size: int, around: int, stride: int) -> _Templates:
    """Renders the drawings of a size, with `around` pixels around the largest."""
    longest = openmoji_scenes.pixels(size, image_size)
    side = longest + 2 * around
    keys, shapes, drawings = [], [], []
    for kind in openmoji_things.kinds().values():
      for color in kind.colors or ('',):
        sprite = openmoji_things.render(kind.noun, color, longest).astype(np.float32)
        height, width = sprite.shape[:2]
        square = np.zeros((side, side, 4), np.float32)
        top, left = (side - height) // 2, (side - width) // 2
        square[top : top + height, left : left + width] = sprite
        keys.append((kind.noun, color))
        shapes.append((height, width))
        drawings.append(square)
    stacked = np.stack(drawings)
    stacked[..., :3] *= stacked[..., 3:] / 255
    stacked = np.ascontiguousarray(_blurred(stacked, image_size)[:, ::stride, ::stride])
    opacity = stacked[..., 3:] / 255
    return cls(side, keys, np.array(shapes), stacked[..., :3], opacity)


class Judge:
  """Judges pictures of one size.

  Args:
    size: height and width of the pictures in pixels.

  Raises:
    UserError: the drawings can't be rendered.
  """

  def __init__(self, size: image_sizes.ImageSize):
    size = image_sizes.square(size, 'the judge of scenes sees')
    self.size = size
    scale = size / openmoji_things.UNITS
    pixels = lambda units, least=1: max(least, round(units * scale))
    self._edge, self._shift = pixels(_EDGE), pixels(_SHIFT)
    self._around, self._tolerance = pixels(_AROUND), pixels(_TOLERANCE, 2)
    self._speck = pixels(_SPECK, 2) ** 2
    self._stride = pixels(_STRIDE)
    self._templates = {
      name: _Templates.of_size(name, size, self._around, self._stride)
      for name in openmoji_things.SIZES
    }

  def see(self, image: UInt8[np.ndarray, 'size size 3']) -> Seen:
    """Returns what a picture shows."""
    pixels = image.astype(np.float32)
    ground, color = self._ground(pixels)
    relative = pixels - color
    blurred = _blurred(relative[None], self.size)[0]
    best: list[SeenThing] | None = None
    for threshold, joined in _WAYS:
      boxes = self._boxes(relative, threshold, round(joined * self.size / openmoji_things.UNITS))
      things = [self._thing(blurred, color, box) for box in boxes]
      if best is None or _area_of_unknown(things) < _area_of_unknown(best):
        best = things
      if not _area_of_unknown(best):
        break
    assert best is not None
    best = [
      self._scaled(thing, blurred, color) if thing.unexplained > _DOUBTFUL else thing
      for thing in best
    ]
    return Seen(ground, tuple(sorted(best, key=lambda thing: thing.box)))

  def judge(self, scene: openmoji_scenes.Scene, image: UInt8[np.ndarray, 'size size 3']) -> Verdict:
    """Judges a picture that was drawn for the captions of a scene."""
    return compare(scene, self.see(image))

  def _ground(
    self, pixels: Float32[np.ndarray, 'size size 3']
  ) -> tuple[str, Float32[np.ndarray, '3']]:
    """Returns the name of the ground, or '', and its color in the picture."""
    inner = slice(self._edge, -self._edge)
    edge = np.ones(pixels.shape[:2], bool)
    edge[inner, inner] = False
    border = pixels[edge]
    names = list(openmoji_things.GROUNDS)
    colors = np.array(list(openmoji_things.GROUNDS.values()), np.float32)
    nearest = np.linalg.norm(border[:, None] - colors, axis=-1).argmin(axis=1)
    most = np.bincount(nearest, minlength=len(names)).argmax()
    color = np.median(border[nearest == most], axis=0).astype(np.float32)
    same = np.linalg.norm(color - colors[most]) <= _SAME_GROUND
    return names[most] if same else '', color

  def _boxes(
    self, relative: Float32[np.ndarray, 'size size 3'], threshold: float, join: int
  ) -> list[tuple[int, int, int, int]]:
    """Returns left, top, width and height of the parts that differ from the ground."""
    different = np.linalg.norm(relative, axis=-1) > threshold
    joined = ndimage.maximum_filter(different, 2 * join + 1)
    labels, count = ndimage.label(joined, np.ones((3, 3), int))
    boxes = []
    for rows, columns in ndimage.find_objects(labels * different, count):
      if np.count_nonzero(different[rows, columns]) >= self._speck:
        boxes.append(
          (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        )
    return boxes

  def _thing(
    self,
    relative: Float32[np.ndarray, 'size size 3'],
    ground: Float32[np.ndarray, '3'],
    box: tuple[int, int, int, int],
  ) -> SeenThing:
    """Returns the thing in a box: the nearest drawing, or an unknown thing."""
    found = SeenThing('', '', '', box, 1.0)
    for size in self._templates:
      found = self._nearer(found, relative, ground, size, 1.0)
    return found

  def _scaled(
    self,
    thing: SeenThing,
    relative: Float32[np.ndarray, 'size size 3'],
    ground: Float32[np.ndarray, '3'],
  ) -> SeenThing:
    """Returns a thing, or the drawing that is nearer to it in a size between ours."""
    longest = max(thing.box[2:])
    factors = {size: openmoji_scenes.pixels(size, self.size) / longest for size in self._templates}
    size = min(factors, key=lambda name: abs(np.log(factors[name])))
    if abs(np.log(factors[size])) > np.log(_SCALED):
      return thing
    return self._nearer(thing, relative, ground, size, factors[size])

  def _nearer(
    self,
    found: SeenThing,
    relative: Float32[np.ndarray, 'size size 3'],
    ground: Float32[np.ndarray, '3'],
    size: str,
    factor: float,
  ) -> SeenThing:
    """Returns the nearest drawing of a size if it is nearer than `found`.

    Args:
      found: the nearest thing until now, whose box is used.
      relative: the blurred picture minus its ground.
      ground: the ground's color.
      size: a key of `openmoji_things.SIZES`.
      factor: how much the box is enlarged before it is compared.
    """
    templates = self._templates[size]
    shape = np.array([found.box[3], found.box[2]]) * factor
    chosen = np.flatnonzero(np.abs(templates.shapes - shape).max(axis=1) <= self._tolerance)
    if not len(chosen):
      return found
    windows = self._windows(relative, found.box, templates.side, factor)
    drawings = templates.ink[chosen] - templates.opacity[chosen] * ground
    drawings = drawings.reshape(len(chosen), -1)
    energy = np.square(windows).sum(axis=1)[:, None]
    distances = energy - 2 * windows @ drawings.T + np.square(drawings).sum(axis=1)
    shares = (distances / np.maximum(energy, 1.0)).min(axis=0)
    best = int(shares.argmin())
    if shares[best] >= min(found.unexplained, _EXPLAINED):
      return found
    kind, color = templates.keys[chosen[best]]
    return SeenThing(kind, color, size, found.box, float(shares[best]))

  def _windows(
    self,
    relative: Float32[np.ndarray, 'size size 3'],
    box: tuple[int, int, int, int],
    side: int,
    factor: float,
  ) -> Float32[np.ndarray, 'shifts values']:
    """Returns squares around a box's middle for all small shifts; beyond its margin is ground."""
    left, top, width, height = box
    around = self._around
    padded = np.pad(relative, ((around, around), (around, around), (0, 0)))
    part = padded[top : top + height + 2 * around, left : left + width + 2 * around]
    if factor != 1:
      part = ndimage.zoom(part, (factor, factor, 1), order=1)
    alone = np.pad(part, ((side, side), (side, side), (0, 0)))
    first_row, first_column = (side + (length - side) // 2 for length in part.shape[:2])
    shifts = range(-self._shift, self._shift + 1)
    return np.stack(
      [
        alone[
          first_row + y : first_row + y + side : self._stride,
          first_column + x : first_column + x + side : self._stride,
        ]
        for y in shifts
        for x in shifts
      ]
    ).reshape(len(shifts) ** 2, -1)


def _area_of_unknown(things: Sequence[SeenThing]) -> int:
  return sum(thing.box[2] * thing.box[3] for thing in things if not thing.kind)


def _blurred(
  images: Float32[np.ndarray, 'images height width channels'], size: int
) -> Float32[np.ndarray, 'images height width channels']:
  """Blurs pictures or parts of pictures of a size."""
  deviation = _BLUR * size / openmoji_things.UNITS
  return ndimage.gaussian_filter(images, (0, deviation, deviation, 0), mode='nearest', truncate=2.5)


def compare(scene: openmoji_scenes.Scene, seen: Seen) -> Verdict:
  """Compares what a picture shows with what the captions of a scene state.

  Args:
    scene: the scene; the boxes don't matter.
    seen: what the picture shows.
  """
  of_kind = collections.defaultdict(list)
  for thing in seen.things:
    of_kind[thing.kind].append(thing)
  groups = scene.groups
  things = set(of_kind) == {group.kind for group in groups}
  varied = [group for group in groups if openmoji_things.kinds()[group.kind].varies]
  sized = [group for group in groups if group.size != 'medium']

  def all_have(asked: Sequence[openmoji_scenes.Group], attribute: str) -> bool | None:
    if not asked:
      return None
    return all(
      of_kind[group.kind]
      and all(
        getattr(thing, attribute) == getattr(group, attribute) for thing in of_kind[group.kind]
      )
      for group in asked
    )

  return Verdict(
    things=things,
    counts=things and all(len(of_kind[group.kind]) == group.count for group in groups),
    colors=all_have(varied, 'color'),
    sizes=all_have(sized, 'size'),
    places=_in_relation(scene, of_kind) if scene.relation else None,
    ground=seen.ground == scene.ground,
  )


def _in_relation(scene: openmoji_scenes.Scene, of_kind) -> bool:
  """Returns whether the things of a scene are in its relation."""
  things = [of_kind[group.kind] for group in scene.groups]
  if any(len(found) != group.count for group, found in zip(scene.groups, things)):
    return False
  centers = [_center(thing.box) for found in things for thing in found]
  if scene.relation == 'between':
    return _is_between(*centers)
  return _relation(*centers) == scene.relation


def _relation(center: Float64[np.ndarray, '2'], other: Float64[np.ndarray, '2']) -> str:
  """Returns the relation in which a center mostly is to another."""
  right, down = other - center
  if abs(right) >= abs(down):
    return 'left of' if right > 0 else 'right of'
  return 'above' if down > 0 else 'below'


def _is_between(
  center: Float64[np.ndarray, '2'],
  one: Float64[np.ndarray, '2'],
  other: Float64[np.ndarray, '2'],
) -> bool:
  """Returns whether a center is between two others, near the line that joins them."""
  line = other - one
  length = np.linalg.norm(line)
  along, across = np.array([line, [-line[1], line[0]]]) @ (center - one) / length
  return bool(0 < along < length and abs(across) <= length / 4)


def _center(box: tuple[int, int, int, int]) -> Float64[np.ndarray, '2']:
  return np.array([box[0] + box[2] / 2, box[1] + box[3] / 2])

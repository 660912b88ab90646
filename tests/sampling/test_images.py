"""PNGs with metadata, names, grids."""

import os
import re
import sys
import unicodedata

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from PIL import Image

from parti_jax.core.errors import UserError
from parti_jax.sampling import images

# The same examples at each run, however busy the machine is.
SEARCHED = hypothesis.settings(deadline=None, derandomize=True, database=None, max_examples=200)


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


def test_a_png_in_memory_is_the_file(tmp_path):
  asked = metadata(prompt='Apfel, größer als \u200b林檎\0')
  path = images.save_picture(tmp_path, picture(), asked)
  assert images.png(picture(), asked) == path.read_bytes()


def test_names_tell_prompt_seed_and_index(tmp_path):
  path = images.save_picture(tmp_path, picture(), metadata())
  assert path.name == 'waving-hand-dark-skin-tone_seed0_1.png'
  assert images.slug('  Déjà vu!  ') == 'deja-vu'
  assert images.slug('../../etc') == 'etc'
  assert images.slug('') == images.slug('  ') == 'picture'
  assert len(images.slug('long ' * 99)) <= 60


@pytest.mark.parametrize(
  'text, name',
  [
    ('手を振る — naïve!', '手を振る-naïve'),
    ('Красное яблоко', 'красное-яблоко'),
    ('Straße nach Łódź', 'strasse-nach-łódź'),
    ('हिन्दी', 'हिन्दी'),
    ('ＡＢＣ №5', 'abc-no5'),
    ('が', 'が'),
    ('か\u3099', 'が'),
    ('e\u0301 手', 'é-手'),
    ('cafe\u0301', 'cafe'),
    ('..', None),
    ('🍎', None),
    ('🍎 red apple', 'red-apple'),
    ('\u3164', None),
    ('\ud800', None),
  ],
)
def test_names_of_any_script(text, name):
  found = images.slug(text)
  if name is None:  # Nothing that can be read is left.
    assert re.fullmatch('picture-[0-9a-f]{12}', found)
    assert found != images.slug(text + '?')
  else:
    assert found == unicodedata.normalize('NFC', name)


def test_letters_that_the_file_system_does_not_know_become_digests(monkeypatch, tmp_path):
  monkeypatch.setattr(sys, 'getfilesystemencoding', lambda: 'ascii')
  assert re.fullmatch('red-[0-9a-f]{12}', images.slug('red 林檎'))
  assert images.slug('林檎') != images.slug('動物')
  assert images.save_picture(tmp_path, picture(), metadata(prompt='林檎')).name.isascii()


def reference_slug(text):
  """What names of plain English have always been."""
  words = re.sub(r'[^a-z0-9]+', '-', text.lower()).strip('-')
  return words[:60].strip('-')


@SEARCHED
@hypothesis.given(st.text(st.characters(max_codepoint=127)))
def test_names_of_plain_english_stay(text):
  expected = reference_slug(text)
  assert images.slug(text) == expected if expected else images.slug(text).startswith('picture')


TEXTS = st.one_of(
  st.text(),
  st.text(st.characters(categories=('L', 'M', 'N')), max_size=200),
  st.sampled_from(
    [
      'CON',
      'con',
      'nul.txt',
      'COM1',
      'COM¹',
      'LPT9',
      'aux',
      '..',
      '.',
      '../x',
      'a/b',
      'a\\b',
      'a. ',
      'Food & Drink',
      'Food, Drink',
      'Cat',
      'cat',
      'ı',
      'I',
      'i',
      'İ',
      'ß',
      'ẞ',
      'ss',
      'é',
      'e\u0301',
      'Å',
      'Å',
      '手',
      '🍎',
      '🍏',
      '',
      ' ',
      '\0',
      'a\nb',
      'ſ',
      's',
      'ς',
      'σ',
      '𐐨' * 100,
      '手' * 100,
      'picture',
      '\ud800',
      '\ufe0f手',
    ]
  ),
)


def safe(name):
  """Whether every system takes a name, and none changes it."""
  return (
    unicodedata.normalize('NFC', name) == name
    and name.casefold() == name
    and name[0] not in '-.~ '
    and name[-1] not in '. '
    and len(name.encode()) <= 140
    and not re.search(r'[\x00-\x20\x7f/\\<>:"|?*]', name)
    and name.split('.')[0].upper() not in RESERVED
  )


RESERVED = {
  'CON',
  'PRN',
  'AUX',
  'NUL',
  *(f'{port}{number}' for port in ('COM', 'LPT') for number in range(10)),
}


@SEARCHED
@hypothesis.given(st.lists(TEXTS, max_size=8))
def test_distinct_names_are_safe_and_distinct_on_every_file_system(texts):
  names = images.distinct_names(texts)
  assert names.keys() == set(texts) and all(map(safe, names.values()))
  for fold in (str.casefold, str.upper, lambda name: unicodedata.normalize('NFD', name).upper()):
    assert len({fold(name) for name in names.values()}) == len(names)
  assert images.distinct_names(texts[::-1]) == names  # Whatever the order.
  assert not any('--' in name or name.startswith('_') for name in names.values())


@SEARCHED
@hypothesis.given(TEXTS)
def test_slugs_are_short_and_have_no_dots_or_separators(text):
  name = images.slug(text)
  assert name and len(name) <= 60 and len(name.encode()) <= 120 and '_' not in name
  assert images.slug(text) == name


def test_texts_that_would_share_a_name_get_a_digest_and_others_do_not():
  names = images.distinct_names(['Food & Drink', 'Food, Drink', '動物', '食べ物', 'Animals', 'Con'])
  assert [names['動物'], names['食べ物'], names['Animals']] == ['動物', '食べ物', 'animals']
  words = {'Food & Drink': 'food-drink', 'Food, Drink': 'food-drink', 'Con': 'con'}
  for text, slug in words.items():
    assert re.fullmatch(f'{slug}_[0-9a-f]{{12}}', names[text])
  assert images.distinct_names(['Food & Drink']) == {'Food & Drink': 'food-drink'}


@pytest.mark.parametrize(
  'prompt', ['手' * 500, '𐐨' * 500, 'word ' * 500, '\0\x1b[0m', '\ud800', '🍎' * 99]
)
def test_pictures_of_any_prompt_are_written_once(tmp_path, prompt):
  asked = metadata(prompt=prompt, seed='4294967295', image_index='2147483647', upscaled='16')
  path = images.save_picture(tmp_path, picture(), asked)
  assert len(path.name.encode()) < 200 and path.is_file()
  assert images.save_picture(tmp_path, picture(), asked) == path
  other = images.save_picture(tmp_path, picture(), asked | {'prompt': prompt + ' too'})
  assert other != path and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize('folder', [None, 5, b'out', 'gs://bucket/out', 'a\0b', ['out']])
def test_what_is_no_folder_is_named(folder):
  with pytest.raises(UserError, match='^(folder=|gs:)') as caught:
    images.save_picture(folder, picture(), metadata())
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'pictures',
  [
    None,
    5,
    'x',
    [],
    [[1], [1, 2]],
    np.zeros((1, 8, 8, 3)),
    np.zeros((8, 8, 3), np.uint8),
    np.zeros((1, 8, 9, 3), np.uint8),
    np.zeros((1, 8, 8, 4), np.uint8),
  ],
)
def test_what_are_no_pictures(pictures):
  with pytest.raises(UserError, match='^images') as caught:
    images.checked(pictures, 8)
  assert '\n' not in str(caught.value)


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
  colors = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [250, 250, 0]]], np.uint8)
  flat = np.broadcast_to(colors[:, :, None, None], (2, 2, 8, 8, 3))
  sheet = np.asarray(images.grid(flat, ['a', 'b ' * 60], display_size=40))
  counts = [np.sum(np.all(sheet == color, axis=-1)) for color in colors.reshape(-1, 3)]
  assert counts == [40 * 40] * 4
  rows = [
    np.flatnonzero(np.any(np.all(sheet == colors[row, 0], axis=-1), axis=1))[0] for row in range(2)
  ]
  assert np.any(sheet[: rows[0]] < 100)  # The label above the first row.
  lines = (rows[1] - rows[0] - 40) / rows[0]
  assert lines > 3  # The second label is wrapped.


@pytest.mark.parametrize(
  'size, message',
  [
    (0, '^display_size=0 must be'),
    (-1, '^display_size='),
    (1.5, '^display_size='),
    ('8', '^display_size='),
    (True, '^display_size='),
    (10**6, 'sheet of .* pixels is too large'),
    (2**64, '^display_size='),
  ],
)
def test_sizes_that_no_grid_can_have(size, message):
  with pytest.raises(UserError, match=message):
    images.grid(np.zeros((1, 1, 8, 8, 3), np.uint8), ['x'], display_size=size)


def test_small_pictures_are_enlarged_on_a_grid():
  assert images.grid(np.zeros((1, 1, 64, 64, 3), np.uint8), ['x']).width >= 192
  assert images.grid(np.zeros((1, 1, 256, 256, 3), np.uint8), ['x']).width < 300

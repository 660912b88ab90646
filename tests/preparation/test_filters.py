"""Filtered examples, and invalid settings in gin."""

import pickle

import gin
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Unusable
from parti_jax.preparation import filters
from parti_jax.preparation.settings import Settings


def _reason(check, *args, **settings):
  """Returns the reason for which a filter rejects an example, None if it doesn't."""
  try:
    check(*args, Settings(**settings))
  except Unusable as error:
    return str(error)
  return None


@pytest.mark.parametrize(
  'text, settings, reason',
  [
    ('abcd', {}, None),
    ('abcd', {'caption_length': (4, 4)}, None),
    ('abcd', {'caption_length': (5, 9)}, 'caption too short'),
    ('abcd', {'caption_length': (1, 3)}, 'caption too long'),
    ('a b  c', {'caption_words': (3, 3)}, None),
    ('a b  c', {'caption_words': (4, 9)}, 'caption too short'),
    ('a b  c', {'caption_words': (1, 2)}, 'caption too long'),
    ('Café, 3 dogs 🐕!', {'scripts': ('LATIN',)}, None),
    ('cafe\u0301', {'scripts': ('LATIN',)}, None),
    ('ＷＩＤＥ', {'scripts': ('LATIN',)}, None),
    ('123', {'scripts': ('LATIN',)}, None),
    ('собака', {'scripts': ('LATIN',)}, 'caption in other scripts'),
    ('собака', {'scripts': ('LATIN', 'CYRILLIC')}, None),
    ('a dog собака', {'scripts': ('LATIN',), 'min_script_share': 0.4}, None),
    ('a dog собака', {'scripts': ('LATIN',), 'min_script_share': 0.41}, 'caption in other scripts'),
    ('犬がいます', {'scripts': ('CJK', 'HIRAGANA')}, None),
  ],
)
def test_captions(text, settings, reason):
  assert _reason(filters.check_caption, text, **settings) == reason


@pytest.mark.parametrize(
  'columns, wanted, reason',
  [
    ({}, {}, None),
    ({'clip': 0.3}, {'clip': (0.3, None)}, None),
    ({'clip': 0.29}, {'clip': (0.3, None)}, 'column clip too low'),
    ({'clip': 1}, {'clip': (None, 0.5)}, 'column clip too high'),
    ({'clip': None}, {'clip': (0.3, None)}, 'no column clip'),
    ({}, {'clip': (0.3, None)}, 'no column clip'),
    ({'clip': '0.4'}, {'clip': (0.3, None)}, 'column clip is not a number'),
    ({'clip': float('nan')}, {'clip': (0.3, None)}, 'column clip is not a number'),
    ({'clip': True}, {'clip': (0.3, None)}, 'column clip is not a number'),
    ({'NSFW': 'UNSURE'}, {'NSFW': ('UNLIKELY', 'UNSURE')}, None),
    ({'NSFW': 'NSFW'}, {'NSFW': ('UNLIKELY', 'UNSURE')}, 'column NSFW is another text'),
  ],
)
def test_columns(columns, wanted, reason):
  assert _reason(filters.check_columns, columns, columns=wanted) == reason


@pytest.mark.parametrize(
  'sides, settings, reason',
  [
    ((100, 10), {}, None),
    ((100, 10), {'min_side': 10}, None),
    ((100, 10), {'min_side': 11}, 'picture too small'),
    ((10, 30), {'max_aspect_ratio': 3}, None),
    ((10, 31), {'max_aspect_ratio': 3}, 'picture too oblong'),
  ],
)
def test_sides(sides, settings, reason):
  assert _reason(filters.check_sides, *sides, **settings) == reason


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'size': 1}, r'prepare\.size=1\b.* 2'),
    ({'quality': 101}, r'prepare\.quality=101'),
    ({'max_aspect_ratio': 0.5}, r'prepare\.max_aspect_ratio=0\.5'),
    ({'caption_length': (5, 2)}, r'prepare\.caption_length=\(5, 2\)'),
    ({'caption_words': (5,)}, r'prepare\.caption_words'),
    ({'image_format': 'gif'}, "image_format='gif'.* jpeg, webp, png"),
    ({'duplicates': 'yes'}, "duplicates='yes'.* picture, picture_and_caption"),
    ({'near_duplicates': 16}, 'near_duplicates=16'),
    ({'scripts': ('Latin',)}, "scripts: 'Latin'.*LATIN"),
    ({'scripts': ()}, r'scripts=\(\)'),
    ({'enlarge': True}, 'enlarge=True.*prepare.size'),
    ({'columns': {'clip': 0.3}}, r'prepare\.columns: .*clip.*0\.3'),
    ({'columns': {'clip': (0.3, 0.1)}}, r'prepare\.columns: .*clip.*\(0\.3, 0\.1\)'),
    ({'columns': {'clip': (None, None)}}, r'prepare\.columns: .*clip.*\(None, None\)'),
    ({'columns': {'clip': (float('nan'), None)}}, r'prepare\.columns: .*clip.*nan'),
    ({'columns': ('clip',)}, r'prepare\.columns=.*clip'),
  ],
)
def test_values_that_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    Settings(**settings)


def test_gin_sets_them_and_workers_get_them():
  gin_config.parse([], ["prepare.columns = {'clip': (0.3, None)}", 'prepare.size = 32'])
  settings = Settings()
  assert settings.size == 32
  with gin.unlock_config():
    gin.clear_config()
  assert pickle.loads(pickle.dumps(settings)) == settings

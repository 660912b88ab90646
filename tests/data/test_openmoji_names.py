"""Captions of single pictures as people write them."""

import collections

import gin
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import captions as captions_lib
from parti_jax.data import held_out_requests
from parti_jax.data import openmoji
from parti_jax.data import openmoji_names
from parti_jax.data import sources


@pytest.fixture(scope='module')
def pictures():
  return {picture.caption: picture for picture in openmoji.pictures()}


def test_no_caption_is_that_of_two_pictures(pictures):
  found = collections.defaultdict(set)
  for picture in pictures.values():
    texts = openmoji_names.captions(picture, 8)
    assert texts[0] == picture.caption and len(set(texts)) == len(texts) <= 8
    for text in texts:
      found[text.casefold()].add(picture.code)
  assert not [text for text, codes in found.items() if len(codes) > 1]
  assert len(found) > 6 * len(pictures)


def test_skin_tones_stand_in_free_order(pictures):
  texts = set(openmoji_names.captions(pictures['woman firefighter: dark skin tone'], 200))
  assert {
    'woman firefighter: dark skin tone',
    'woman firefighter, dark skin tone',
    'dark skin tone woman firefighter',
    'dark-skinned female firefighter',
    'a woman firefighter with dark skin',
    'a dark-skinned woman firefighter',
  } <= texts
  assert all('dark' in text and 'medium' not in text for text in texts)


def test_every_tone_stays(pictures):
  for picture in pictures.values():
    short = [tone.removesuffix(' skin tone') for tone in picture.tones]
    for text in openmoji_names.captions(picture, 12):
      places = [text.find(tone) for tone in short]
      assert -1 not in places and places == sorted(places), text


def test_other_names():
  assert 'thumbs up' in openmoji_names.names('thumbs up')
  assert 'bike' in openmoji_names.names('bicycle')
  assert 'heart in blue' in openmoji_names.names('blue heart')
  assert 'male firefighter' in openmoji_names.names('man firefighter')
  assert openmoji_names.names('cat face') == ('cat face',)  # A cat is another picture.
  assert not any(
    'golfing' in name.split()[1:2] for name in openmoji_names.names('woman golfing')[1:]
  )
  assert not {'de', 'germany'} & set(openmoji_names.names('Germany'))
  assert 'flag for Germany' in openmoji_names.names('Germany')


@pytest.mark.parametrize(
  'name, expected',
  [
    ('unicorn', 'a unicorn'),
    ('owl', 'an owl'),
    ('umbrella', 'an umbrella'),
    ('grapes', 'grapes'),
    ('cactus', 'a cactus'),
    ('octopus', 'an octopus'),
    ('glass of milk', 'a glass of milk'),
    ('Germany', 'Germany'),
    ('men wrestling', 'men wrestling'),
    ('thumbs up', 'thumbs up'),
    ('bread', 'bread'),
  ],
)
def test_articles(name, expected):
  assert openmoji_names._with_article(name, definite=False) == expected


def test_languages(pictures):
  apple = pictures['red apple']
  texts = openmoji_names.captions(apple, 5, ('en', 'de', 'fr'))
  assert texts[:3] == ['red apple', 'roter apfel', 'pomme rouge'] and len(texts) == 5
  assert openmoji_names.captions(apple, 5, ('de',)) == ['roter apfel']
  fire = pictures['woman firefighter: dark skin tone']
  assert openmoji_names.captions(fire, 2, ('de',)) == ['feuerwehrfrau dunkle hautfarbe']


@pytest.mark.parametrize('languages', ['en', (), ('en', 'xx')])
def test_bad_languages(pictures, languages):
  with pytest.raises(UserError, match='openmoji.languages'):
    openmoji_names.captions(pictures['red apple'], 2, languages)


def test_the_source_has_one_caption_by_default():
  records = sources.configured('openmoji').open('validation', pictures=False)
  expected = [p.caption.encode() for p in openmoji.pictures() if p.split == 'validation']
  assert [example['caption'] for example in records.read(range(len(records)))] == expected


def test_the_source_has_several_captions_if_asked():
  gin.parse_config("openmoji.captions = 4\nopenmoji.languages = ('en', 'de')")
  source = sources.configured('openmoji')
  records = source.open('validation', pictures=False)
  members = [p for p in openmoji.pictures() if p.split == 'validation']
  for example, picture in zip(records.read(range(len(records))), members, strict=True):
    texts = [text.decode() for text in captions_lib.alternatives(example['caption'])]
    assert texts == openmoji_names.captions(picture, 4, ('en', 'de'))
  assert len(list(source.captions('validation'))) > 500


@pytest.mark.parametrize(
  'config, message',
  [
    ("openmoji.captions = 2\nopenmoji.languages = 'de'", 'must be a tuple'),
    ("openmoji.languages = ('de',)", 'no effect with openmoji.captions = 1'),
    ("openmoji.captions = 2\nopenmoji.languages = ('xx',)", "unknown language 'xx'"),
    ('openmoji.requests = 0.5', 'openmoji.requests has no effect with openmoji.captions = 1'),
  ],
)
def test_bad_settings(config, message):
  gin.parse_config(config)
  with pytest.raises(UserError, match=message):
    sources.configured('openmoji')


def test_the_plain_requests_are_held_out():
  """The benchmark asks for things of train, in words that no caption has."""
  known = {picture.name for picture in openmoji.pictures() if picture.split == 'train'}
  assert len(held_out_requests.REQUESTS) == 60
  assert set(held_out_requests.REQUESTS.values()) <= known
  words = [
    caption.casefold()
    for picture in openmoji.pictures()
    if not picture.tones
    for caption in openmoji_names.captions(picture, 20)
  ]
  assert not set(held_out_requests.REQUESTS) & set(words)

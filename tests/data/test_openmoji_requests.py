"""Captions with other words around the name of a picture."""

import collections
import hashlib
import re

import gin
import numpy as np
import pytest

from parti_jax.data import captions as captions_lib
from parti_jax.data import held_out_requests
from parti_jax.data import openmoji
from parti_jax.data import openmoji_colors
from parti_jax.data import openmoji_names
from parti_jax.data import openmoji_requests
from parti_jax.data import sources

# Of captions without plain requests, with emoji 2.16.0.
DIGEST = '94d38034112e1834'


@pytest.fixture(name='texts', scope='module')
def _texts():
  """Captions of one in three pictures: the usual one and plain requests."""
  return {
    picture: openmoji_names.captions(picture, 20, requests=1.0)
    for picture in openmoji.pictures()[::3]
  }


def test_the_words_contain_no_name():
  found = [
    (phrase, part)
    for phrase in openmoji_requests.phrases()
    for part in _parts(openmoji_requests.words(phrase))
    if openmoji_names.is_other_name(part)
  ]
  assert not found
  # They would be found.
  assert openmoji_names.is_other_name(['red', 'apples'])
  assert openmoji_names.is_other_name(['bicycles']) and openmoji_names.is_other_name(['bike'])


def test_the_words_state_nothing_that_other_captions_mean():
  """Neither colors and tones, nor numbers, nor what relates two things in a scene."""
  meant = (
    'red orange yellow green blue purple brown black white pink grey gray violet light dark medium '
    'two three four five left right below under beneath over between background skin'
  )
  distracting = (
    openmoji_requests.TRAITS
    + openmoji_requests.MODIFIERS
    + openmoji_requests.MEASURES
    + openmoji_requests.OTHERS
    + openmoji_requests.APPOSITIONS
  )
  listed = (
    openmoji_requests.ADJECTIVES
    + openmoji_requests.NOUNS
    + openmoji_requests.PROPER_NAMES
    + openmoji_requests.ENDINGS
  )
  texts = (*openmoji_requests.phrases(), *distracting, *listed)
  words = {word for text in texts for word in openmoji_requests.words(text)}
  assert not words & set(meant.split())


def test_articles_are_right():
  core = openmoji_requests.Core('spoon', 'a', True)
  texts = ' | '.join(
    openmoji_requests.request(core, np.random.default_rng(seed), lambda words: False) or ''
    for seed in range(4000)
  )
  for right in ('a one-', 'a used', 'an a', 'an um', 'a h'):
    assert re.search(rf'\b{right}', texts), right
  assert not re.findall(
    r'\b(?:an (?:[^aeiouh]|one-|uni|use)|a (?:[ai]|e[^u]|hour|um))[a-z-]*', texts
  )


def test_words_of_other_names_distract():
  """Requests have traits of other pictures, and their names next to the one that is asked for."""
  spoon = next(picture for picture in openmoji.pictures() if picture.name == 'spoon')
  texts = openmoji_names.captions(spoon, 100, requests=1.0)[1:]
  parts = [{tuple(part) for part in _parts(openmoji_requests.words(text))} for text in texts]
  named = [any(openmoji_names.is_other_name(part, 'spoon') for part in found) for found in parts]
  assert 20 < sum(named) < 80
  traits = {tuple(openmoji_requests.words(trait)) for trait in openmoji_requests.TRAITS}
  assert 10 < sum(bool(found & traits) for found in parts) < 60


@pytest.mark.parametrize(
  'name, alias',
  [('crying face', 'cry'), ('smiling face', 'relaxed'), ('thinking face', 'thinking')],
)
def test_a_face_keeps_its_expression(name, alias):
  face = next(p for p in openmoji.pictures() if p.name == name)
  texts = openmoji_names.captions(face, 100, requests=1.0)
  assert [text for text in texts if alias in text and name not in text]
  words = set(openmoji_requests.words(' '.join(texts)))
  assert not words & {'laughing', 'angry', 'sleeping', 'melting', 'gloomy', 'sad', 'halo'}


@pytest.mark.parametrize(
  'name, color',
  [('banana', 'yellow'), ('frog', 'green'), ('evergreen tree', 'green'), ('rainbow', '')],
)
def test_requests_state_the_color_of_the_picture_alone(name, color):
  picture = next(picture for picture in openmoji.pictures() if picture.name == name)
  assert openmoji_colors.main_color(picture.code) == color
  words = set(
    openmoji_requests.words(' '.join(openmoji_names.captions(picture, 100, requests=1.0)))
  )
  assert words & set(openmoji_colors.COLORS) == ({color} if color else set())


def test_a_name_with_a_color_gets_no_other():
  for name in ('red apple', 'blue heart', 'white flower'):
    picture = next(picture for picture in openmoji.pictures() if picture.name == name)
    texts = openmoji_names.captions(picture, 60, requests=1.0)
    words = set(openmoji_requests.words(' '.join(texts))) & set(openmoji_colors.COLORS)
    assert words <= set(openmoji_requests.words(name))


def _parts(words):
  return [words[i:j] for i in range(len(words)) for j in range(i + 1, len(words) + 1)]


def test_no_request_contains_the_name_of_another_picture(texts):
  for picture, found in texts.items():
    own = {tuple(openmoji_requests.words(name)) for name in openmoji_names.names(picture.name)}
    for text in found[1:]:
      words = openmoji_requests.words(text)
      # Without the name itself: "hot dog" contains "dog".
      cores = [
        (start, start + len(name))
        for name in own
        for start in range(len(words))
        if tuple(words[start : start + len(name)]) == name
      ]
      if picture.tones or not cores:
        continue
      start, end = max(cores, key=lambda core: core[1] - core[0])
      named = [
        words[i:j]
        for i in range(len(words))
        for j in range(i + 1, len(words) + 1)
        # Words of the name together with others; names next to it are meant to distract.
        if i < end and j > start and not start <= i < j <= end
        if openmoji_names.is_other_name(words[i:j], picture.name)
      ]
      assert not named, text


@pytest.mark.parametrize(
  'name, words, forbidden',
  [
    ('man', ['an', 'old', 'man'], True),
    ('apple', ['small', 'airplane'], True),
    ('man', ['man'], 0),
  ],
)
def test_what_is_the_name_of_another_picture(name, words, forbidden):
  found = any(openmoji_names.is_other_name(part, name) for part in _parts(words))
  assert found == bool(forbidden)


def test_a_request_that_becomes_another_name_is_refused():
  core = openmoji_requests.Core('man', 'a', True)
  refuse = lambda words: tuple(words[-2:]) == ('tall', 'man')
  found = {
    openmoji_requests.request(core, np.random.default_rng(seed), refuse) for seed in range(4000)
  }
  assert None in found and len(found) > 3000
  assert not [text for text in found if text and 'tall man' in text]
  always = {
    openmoji_requests.request(core, np.random.default_rng(seed), lambda words: False)
    for seed in range(4000)
  }
  assert [text for text in always if text and 'tall man' in text]


def test_thousands_of_different_words_follow_names(texts):
  after, before = set(), set()
  for picture, found in texts.items():
    if picture.tones:
      continue
    for text in found:
      head, name, tail = text.rpartition(picture.name)
      if name:
        before.add(head.strip())
        after.add(tail.strip())
  assert len(after) > 3000 and len(before) > 3000


def test_no_caption_is_that_of_two_pictures_and_all_tones_stay(texts):
  owners = collections.defaultdict(set)
  for picture, found in texts.items():
    assert found[0] == picture.caption and len(found) == len(set(found)) == 20
    for text in found:
      owners[text.casefold()].add(picture.code)
      tones = re.findall(r'(medium-light|medium-dark|light|medium|dark)[ -]skin', text)
      if not picture.tones:
        assert not tones
      else:
        assert tones == [tone.removesuffix(' skin tone') for tone in picture.tones], text
  assert not [text for text, codes in owners.items() if len(codes) > 1]


def test_the_plain_requests_of_the_benchmark_are_held_out():
  names = set(held_out_requests.ALL.values())
  assert len(held_out_requests.ALL) == 259
  asked = [p for p in openmoji.pictures() if p.name in names and not p.tones]
  for picture in asked:
    texts = openmoji_names.captions(picture, 100, requests=0.6)
    found = [text for text in texts if held_out_requests.is_in(text, picture.name)]
    assert not found
  # They would be found, also within another request and without their article.
  assert held_out_requests.is_in('Please draw a hungry shark in the sea', 'shark')
  assert not held_out_requests.is_in('a hungry shark', 'whale')


def test_what_the_grammar_could_make():
  assert openmoji_requests.could_make('draw my two shiny spoons', 'spoon') is False
  assert openmoji_requests.could_make('draw my unputdownable spoon', 'spoon') is False
  assert openmoji_requests.could_make('draw my tiny spoon on the table in the morning', 'spoon')


def test_captions_are_the_same_each_time_and_as_before_without_requests():
  pictures = openmoji.pictures()
  apple = next(picture for picture in pictures if picture.name == 'red apple')
  first = openmoji_names.captions(apple, 30, requests=0.7)
  assert first == openmoji_names.captions(apple, 30, requests=0.7)
  assert first != openmoji_names.captions(apple, 30)
  found = hashlib.sha256()
  for picture in pictures[::20]:
    found.update(repr(openmoji_names.captions(picture, 20)).encode())
  if openmoji.version('emoji') == '2.16.0':
    assert found.hexdigest()[:16] == DIGEST


def test_the_source_has_plain_requests_if_asked():
  gin.parse_config('openmoji.captions = 12\nopenmoji.requests = 0.5')
  records = sources.configured('openmoji').open('validation', pictures=False)
  members = [p for p in openmoji.pictures() if p.split == 'validation']
  for example, picture in zip(records.read(range(len(records))), members, strict=True):
    texts = [text.decode() for text in captions_lib.alternatives(example['caption'])]
    assert texts == openmoji_names.captions(picture, 12, requests=0.5)

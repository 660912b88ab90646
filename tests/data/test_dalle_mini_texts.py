"""Tests of parti_jax.data.dalle_mini_texts, and of the entry of a tokenizer.json that names it.

Token ids are compared with min-dalle's in tests/references/test_tokenizers.py.
"""

import json
import pickle
import sys
import types

import numpy as np
import pytest
import tiny_dalle_mini

from parti_jax.core.errors import UserError
from parti_jax.data import dalle_mini_texts
from parti_jax.data import json_tokenizer
from parti_jax.data import text_tokenizer
from parti_jax.importers import tokenizer_files


def test_min_dalle_keeps_ascii_and_the_names_of_emoji():
  assert dalle_mini_texts.min_dalle('A ROSÉ, 2\tx ❤️日') == 'a ros, 2\tx red_heart'


@pytest.fixture(name='packages')
def fixture_packages(monkeypatch):
  """Stand for packages that need not be installed; they change nothing here."""
  same = lambda text: text
  monkeypatch.setitem(sys.modules, 'ftfy', types.SimpleNamespace(fix_text=same))
  monkeypatch.setitem(sys.modules, 'emoji', types.SimpleNamespace(demojize=same))
  monkeypatch.setitem(sys.modules, 'unidecode', types.SimpleNamespace(unidecode=same))


# What dalle-mini's own TextNormalizer makes of these texts, except for hashtags and persons.
@pytest.mark.parametrize(
  'text, expected',
  [
    ('An Avocado Armchair!', ' an avocado armchair'),
    ('1,234,567 of 3.14 on 3/4', ' 1234567 of 3.14 on 3/4'),
    ("the dog's 'bone' (old) -- sold...", ' the dog\'s " bone ", old, sold'),
    ('well-known; a & b: 5$', ' well known, a & b, 5 $'),
    ('<b>bold</b> http://x.y/z &amp; &lt;i&gt;', ' bold & '.rstrip()),
    ('[12] a tower [3]', ' a tower'),
    ('aaaargh VIII    !!!!', ' argh viii'),
    ('a #red_car at #CatsOfInstagram', ' a red car at catsofinstagram'),
    ('<person> and <person>, a dog, <PERSON>', ' people, a dog, a person'),
  ],
)
def test_dalle_mini_makes_commas_of_punctuation(packages, text, expected):
  assert dalle_mini_texts.dalle_mini(text) == expected


@pytest.mark.parametrize('text', ['', '  ', '!?', '<b>'])
def test_nothing_stays_nothing(packages, text):
  assert dalle_mini_texts.dalle_mini(text) == ''


@pytest.mark.parametrize('text', [' ' * 60000, ',' * 60000, '<' * 60000, '"' * 60000 + 'x'])
def test_no_text_takes_quadratic_time(packages, text):
  assert len(dalle_mini_texts.dalle_mini(text)) <= len(text) + 1


def test_a_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, 'ftfy', None)
  with pytest.raises(UserError, match=r'needs the package ftfy.*parti_jax\[dalle_mini\]'):
    dalle_mini_texts.dalle_mini('a cat')
  monkeypatch.setitem(sys.modules, 'emoji', None)
  assert dalle_mini_texts.min_dalle('A cat') == 'a cat'
  with pytest.raises(UserError, match='needs the package emoji'):
    dalle_mini_texts.min_dalle('Eine Tür')


@pytest.mark.parametrize('normalizer', dalle_mini_texts.NORMALIZERS)
def test_a_tokenizer_applies_what_its_file_names(tmp_path, packages, normalizer):
  tiny_dalle_mini.write_tokenizer(tmp_path)
  path = tmp_path / 'made.json'
  path.write_bytes(tokenizer_files.of_dalle_mini(str(tmp_path), normalizer))
  tokenizer = text_tokenizer.open_tokenizer(path)
  ids, cut = tokenizer.encode('A red!CAT </s>', 16)
  assert not cut
  text = tokenizer.decode(ids)
  assert text.strip() == {'min_dalle': 'a red!cat </s>', 'dalle_mini': 'a red, cat'}[normalizer]
  # In worker processes, too.
  again = pickle.loads(pickle.dumps(tokenizer))
  np.testing.assert_array_equal(again.encode('A red!CAT </s>', 16)[0], ids)
  assert tokenizer.is_empty(tokenizer.encode('', 5)[0])
  assert tokenizer.encode('', 5)[0].tolist() == [0, 2, 0, 0, 0]
  found = json.loads(path.read_text(encoding='utf-8'))
  found[json_tokenizer.NORMALIZER] = 'upper_case'
  path.write_text(json.dumps(found))
  with pytest.raises(UserError, match="is 'upper_case', not one of min_dalle, dalle_mini"):
    text_tokenizer.open_tokenizer(path)


def test_a_vocabulary_of_another_kind_is_refused(tmp_path):
  tiny_dalle_mini.write_tokenizer(tmp_path)
  path = tmp_path / 'vocab.json'
  path.write_text(path.read_text().replace('"<pad>": 1', '"<pad>": 500'))
  with pytest.raises(UserError, match="isn't DALL·E mini's vocabulary: the ids of <s>, <pad>"):
    tokenizer_files.of_dalle_mini(str(tmp_path), 'min_dalle')

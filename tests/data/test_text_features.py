"""Text features in a token cache: their records, and the examples that training reads."""

import dataclasses
import json
import re

import gin
import numpy as np
import pytest

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.data import captions
from parti_jax.data import datasets
from parti_jax.data import mixtures
from parti_jax.data import tasks
from parti_jax.data import text_features
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.data.batches import Batches

LENGTH, WIDTH = 6, 3
LENGTHS = {'inputs': LENGTH, 'targets': 4}
TEXTS = ['a red circle', 'circle', 'the blue square and the dog']


def _rows(text, dtype):
  """Features that tell which token they are of: its id, its place, and -1."""
  ids = datasets.get_vocabulary().encode(text, LENGTH)[0]
  ids = ids[: np.flatnonzero(ids)[-1] + 1]
  rows = np.stack([ids % 256, np.arange(len(ids)), np.full(len(ids), -1)], axis=1)
  return rows.astype(text_features.DTYPES[dtype])


def _described(dtype='bfloat16', **others):
  entries = {
    'encoder': 'e0',
    'vocabulary': datasets.get_vocabulary().fingerprint,
    'text_length': LENGTH,
    'width': WIDTH,
    'dtype': dtype,
    **others,
  }
  found = text_features.TextFeatures(**entries)
  rows = _rows('', dtype) if not others else np.zeros((1, found.width), text_features.DTYPES[dtype])
  return dataclasses.replace(found, empty=found.to_bytes(rows))


def _info(dtype='bfloat16', **others):
  info = {'codebook_size': 32, 'image_tokens': 4, 'tokenizer': 'abc'}
  return info | _described(dtype, **others).info()


def _write(folder, dtype='bfloat16'):
  examples = [(text, np.full(4, index), [_rows(text, dtype)]) for index, text in enumerate(TEXTS)]
  several = captions.several(TEXTS).decode()
  examples.append((several, np.full(4, 9), [_rows(text, dtype) for text in TEXTS]))
  token_cache.write_token_cache(str(folder), examples, _info(dtype))
  gin.parse_config(f"token_cache.path = '{folder}'")
  return str(folder)


@pytest.mark.parametrize('dtype', list(text_features.DTYPES))
@pytest.mark.parametrize('shuffle', ['global', 'window'])
def test_each_example_has_the_features_of_its_text(tmp_path, dtype, shuffle):
  folder = _write(tmp_path, dtype)
  assert token_cache_info.read_info(folder)['version'] == 3
  gin.parse_config(f"drop_text.rate = 0.3\ntoken_cache.shuffle = '{shuffle}'")
  batches = Batches('cached_tokens', 'train', 400, LENGTHS, training=True)
  batch = next(batches)
  ids, found = batch['encoder_input_tokens'], batch['text_features']
  assert found.shape == (400, LENGTH, WIDTH) and found.dtype == text_features.DTYPES[dtype]
  values = found.astype(np.float32)
  np.testing.assert_array_equal(values[..., 0], ids % 256)
  np.testing.assert_array_equal(values[..., 2], np.where(ids > 0, -1, 0))
  places = np.where(ids > 0, np.arange(LENGTH), 0)
  np.testing.assert_array_equal(values[..., 1], places)
  # Dropped texts, and all texts of the picture with several.
  assert (ids[:, 0] == 1).any()
  chosen = {tuple(text) for text in ids[batch['decoder_target_tokens'][:, 0] == 9]}
  assert len(chosen) == 1 + len(TEXTS)


def test_evaluation_reads_the_features_of_the_first_text(tmp_path):
  _write(tmp_path)
  batch = next(Batches('cached_tokens', 'train', 4, LENGTHS, shuffle=False))
  np.testing.assert_array_equal(batch['text_features'][0], batch['text_features'][3])
  padded = np.zeros((LENGTH, WIDTH), np.float32)
  rows = _rows(TEXTS[0], 'bfloat16')
  padded[: len(rows)] = rows
  np.testing.assert_array_equal(batch['text_features'][3].astype(np.float32), padded)


def test_they_can_be_left_out(tmp_path):
  _write(tmp_path)
  gin.parse_config('token_cache.text_features = False')
  batch = next(Batches('cached_tokens', 'train', 4, LENGTHS, shuffle=False))
  assert set(batch) == {'encoder_input_tokens', 'decoder_target_tokens', 'decoder_loss_weights'}
  expected = [datasets.get_vocabulary().encode(text, LENGTH)[0] for text in (*TEXTS, TEXTS[0])]
  np.testing.assert_array_equal(batch['encoder_input_tokens'], expected)
  gin.parse_config('token_cache.text_features = None')
  with pytest.raises(UserError, match='text_features=None must be True or False'):
    Batches('cached_tokens', 'train', 4, LENGTHS)


def test_another_text_length_or_vocabulary_is_refused(tmp_path):
  _write(tmp_path)
  with pytest.raises(UserError, match='6 text tokens, but the run has text_length=7; set'):
    Batches('cached_tokens', 'train', 1, LENGTHS | {'inputs': 7})
  info = token_cache_info.read_info(str(tmp_path))
  info['text_features']['vocabulary'] = 'v1'
  token_cache_info.write_info(str(tmp_path), info)
  with pytest.raises(UserError, match='text features of the vocabulary v1, but vocabulary.path='):
    Batches('cached_tokens', 'train', 1, LENGTHS)


def test_seqio_refuses_them_unless_they_are_left_out(tmp_path):
  _write(tmp_path)
  with pytest.raises(UserError, match='seqio and t5x do not use; set token_cache.text_features=F'):
    tasks.get_task('cached_tokens')
  gin.parse_config('token_cache.text_features = False')
  dataset = tasks.get_task('cached_tokens').get_dataset(LENGTHS, shuffle=False)
  found = next(dataset.as_numpy_iterator())
  assert found['inputs'].tolist() == datasets.get_vocabulary().encode(TEXTS[0], LENGTH)[0].tolist()


def test_a_mixture_needs_the_same_features_everywhere(tmp_path):
  infos = {'a': _info(), 'b': _info(), 'c': _info(width=4), 'd': dict(_info(), text_features=None)}
  for name, info in infos.items():
    features = [] if name == 'd' else [[np.zeros((1, info['text_features']['width']), '<V2')]]
    features = [[rows.view(text_features.DTYPES['bfloat16']) for rows in some] for some in features]
    token_cache.write_token_cache(str(tmp_path / name), [('x', np.zeros(4), *features)], info)
    gin.parse_config(f"token_cache_{name}/token_cache.path = '{tmp_path / name}'")
  for other, message in (
    ('c', 'have width 3, and those of .*/c 4; .*parti-jax tokenize'),
    ('d', 'a has text features, but .*/d has none; '),
    ('b', None),
  ):
    gin.bind_parameter('mixture.sources', {'token_cache_a': 1, f'token_cache_{other}': 1})
    if message:
      with pytest.raises(UserError, match=message):
        mixtures.text_features('mixture_tokens')
    else:
      assert mixtures.text_features('mixture_tokens').width == WIDTH
      next(Batches('mixture_tokens', 'train', 2, LENGTHS))


@pytest.mark.parametrize(
  'change',
  [
    {'text_features': []},
    {'text_features': {'encoder': 'e0'}},
    {'text_features': {**_info()['text_features'], 'dtype': 'float64'}},
    {'text_features': {**_info()['text_features'], 'width': 2**30}},
    {'text_features': {**_info()['text_features'], 'encoder': 5}},
    {'empty_text': 'AQAA'},
    {'empty_text': '§'},
    {'empty_text': None},
    {'version': 2},
  ],
)
def test_a_damaged_description_is_one_line(tmp_path, change):
  folder = _write(tmp_path)
  path = tmp_path / 'info.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(UserError, match=f'{re.escape(folder)}/info.json is damaged'):
    token_cache_info.read_info(folder)


def test_records_that_do_not_fit_are_refused():
  rows, info = _rows('circle', 'bfloat16'), _info()
  write = lambda *others: token_cache.serialized('circle', np.zeros(4), info, *others)
  for wrong, message in (
    ([], 'text features of 0 texts, expected those of 1'),
    (None, 'text features of 0 texts'),
    ([rows[:, :2]], 'expected'),
    ([rows.astype(np.float16)], 'expected'),
    ([np.repeat(rows, 9, axis=0)], 'expected 6 at most'),
  ):
    with pytest.raises(ValueError, match=message):
      write(wrong)
  record, stored = write([rows]), text_features.of_info(info)
  parse = lambda record: token_cache._parsed(record, info | {'views': 1}, stored, True)
  np.testing.assert_array_equal(parse(record)['text_features'][0], rows)
  for cut in (1, len(rows) * WIDTH * 2, len(record) - 9):
    assert parse(record[:-cut]).reason == 'record of another token cache'
  assert parse(record + b'\0').reason == 'record of another token cache'


def test_info_says_what_the_folder_is(tmp_path, capsys):
  assert main.main(['info', _write(tmp_path)]) == 2
  error = capsys.readouterr().err
  assert 'image tokens with text features (3 in bfloat16 for each of at most 6 text token' in error

"""The token cache: written whole or not at all, read as a seqio task."""

import json
import os

import gin
import numpy as np
import pytest

from parti_jax.data import tasks, token_cache
from parti_jax.data.batches import Batches
from parti_jax.data.feature_converter import PartiFeatureConverter
from parti_jax.errors import UserError

INFO = {'codebook_size': 32, 'image_tokens': 4, 'tokenizer': 'abc', 'image_size': 16}
LENGTHS = {'inputs': 12, 'targets': 4}


def _examples(count, caption='woman firefighter'):
  return [(f'{caption} {i}', np.full(4, i, np.int32)) for i in range(count)]


@pytest.fixture
def cache(tmp_path, monkeypatch):
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD', 4)
  folder = str(tmp_path / 'cache')
  assert token_cache.write_token_cache(folder, iter(_examples(10)), INFO) == 10
  assert token_cache.write_token_cache(folder, _examples(2), INFO, split='validation') == 2
  gin.parse_config(f"token_cache.path = '{folder}'")
  return folder


@pytest.mark.parametrize('task', ['openmoji_tokens', 'cached_tokens'])
def test_batches(cache, task):
  gin.parse_config('drop_text.rate = 0.0')
  batches = Batches(task, 'train', 6, LENGTHS, PartiFeatureConverter(), seed=2, num_epochs=1)
  first, last = batches
  assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
      'encoder_input_tokens': ((6, 12), np.int32),
      'decoder_target_tokens': ((6, 4), np.int32),
      'decoder_loss_weights': ((6, 4), np.float32)}
  vocabulary = tasks.get_vocabulary()
  expected = {i: vocabulary.encode(caption, 12)[0].tolist()
              for i, (caption, _) in enumerate(_examples(10))}
  for batch in (first, last):
    assert (batch['decoder_loss_weights'] == 1).all()
    for ids, codes in zip(batch['encoder_input_tokens'], batch['decoder_target_tokens']):
      assert (codes == codes[0]).all()
      assert ids.tolist() == expected.pop(int(codes[0]))
  assert not expected


def test_every_pass_over_a_small_cache_has_an_order_of_its_own(cache):
  batches = Batches('cached_tokens', 'train', 10, LENGTHS, seed=2)
  orders = [tuple(next(batches)['decoder_target_tokens'][:, 0].tolist()) for _ in range(30)]
  assert all(sorted(order) == list(range(10)) for order in orders)
  assert len(set(orders)) == 30
  again = Batches('cached_tokens', 'train', 10, LENGTHS, seed=2)
  assert orders == [tuple(next(again)['decoder_target_tokens'][:, 0].tolist()) for _ in range(30)]


def test_info(cache):
  size = lambda name: os.path.getsize(os.path.join(cache, name))
  assert token_cache.read_info(cache) == {**INFO, 'splits': {
      'train': {'examples': 10, 'shards': 3,
                'bytes': [size(f'train-0000{i}.tfrecord') for i in range(3)]},
      'validation': {'examples': 2, 'shards': 1, 'bytes': [size('validation-00000.tfrecord')]}}}
  assert sorted(os.listdir(cache)) == [
      'info.json', 'train-00000.tfrecord', 'train-00001.tfrecord', 'train-00002.tfrecord',
      'validation-00000.tfrecord']


def test_writing_again_replaces_a_split(cache):
  token_cache.write_token_cache(cache, _examples(3), INFO)
  splits = token_cache.read_info(cache)['splits']
  assert {name: (split['examples'], split['shards'], len(split['bytes']))
          for name, split in splits.items()} == {'train': (3, 1, 1), 'validation': (2, 1, 1)}
  assert sorted(os.listdir(cache)) == [
      'info.json', 'train-00000.tfrecord', 'validation-00000.tfrecord']


def test_writing_again_leaves_splits_alone_whose_names_begin_the_same(cache):
  token_cache.write_token_cache(cache, _examples(6), INFO, split='train-more')
  token_cache.write_token_cache(cache, _examples(3), INFO, split='हिन्दी 訓練')
  token_cache.write_token_cache(cache, _examples(1), INFO)
  token_cache.write_token_cache(cache, _examples(3), INFO, split='train[:10%]')
  token_cache.write_token_cache(cache, _examples(1), INFO, split='train[%3A10%]')
  source = token_cache.TokenCacheSource(cache)
  found = {split: len(source.list_shards(split)) for split in source.splits}
  assert found == {'validation': 1, 'train-more': 2, 'हिन्दी 訓練': 1, 'train': 1, 'train[:10%]': 1,
                   'train[%3A10%]': 1}
  assert not [name for name in os.listdir(cache) if ':' in name]


@pytest.mark.parametrize('split', [
    '', '../train', 'a/b', 'a\\b', '.hidden', 'a\0', 'a\n', 'a*', '訓' * 70, '-a', '\ud800'])
def test_splits_that_no_file_can_be_named_by(cache, split):
  before = sorted(os.listdir(cache))
  with pytest.raises(UserError, match='^the split .* cannot be part of a file name'):
    token_cache.write_token_cache(cache, _examples(1), INFO, split=split)
  assert sorted(os.listdir(cache)) == before


@pytest.mark.parametrize('split', ['Train', 'ｔｒａｉｎ'])
def test_splits_whose_files_would_be_anothers_on_some_file_systems(cache, split):
  with pytest.raises(UserError, match="holds a split 'train', whose files have the same names"):
    token_cache.write_token_cache(cache, _examples(1), INFO, split=split)


def test_interrupted_writing_changes_nothing(cache):
  before = sorted(os.listdir(cache)), token_cache.read_info(cache)

  def broken():
    yield from _examples(6)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    token_cache.write_token_cache(cache, broken(), INFO)
  assert (sorted(os.listdir(cache)), token_cache.read_info(cache)) == before


def test_tokens_of_another_tokenizer_do_not_mix(cache):
  with pytest.raises(UserError, match='holds validation with tokenizer abc, not xyz'):
    token_cache.write_token_cache(cache, _examples(1), {**INFO, 'tokenizer': 'xyz'})


@pytest.mark.parametrize('tokens', [[1, 2, 3], [0, 0, 0, 32], [-1, 0, 0, 0]])
def test_tokens_that_do_not_fit(tmp_path, tokens):
  with pytest.raises(ValueError, match='tokens'):
    token_cache.write_token_cache(str(tmp_path), [('a', np.array(tokens, np.int32))], INFO)
  assert not list(tmp_path.iterdir())


def test_nothing_to_write(tmp_path):
  with pytest.raises(UserError, match='no example'):
    token_cache.write_token_cache(str(tmp_path), [], INFO)


def test_missing_unfinished_or_damaged(cache, tmp_path):
  with pytest.raises(UserError, match='parti-jax tokenize'):
    tasks.get_task('cached_tokens').source.list_shards('test')
  os.remove(os.path.join(cache, 'train-00001.tfrecord'))
  with pytest.raises(UserError, match='train-00001.tfrecord is missing'):
    Batches('cached_tokens', 'train', 1, LENGTHS)
  with pytest.raises(UserError, match='does not exist; `parti-jax tokenize` makes it'):
    token_cache.read_info(str(tmp_path / 'none'))
  (tmp_path / 'info.json').write_text('{')
  with pytest.raises(UserError, match='info.json is damaged'):
    token_cache.read_info(str(tmp_path))
  (tmp_path / 'info.json').write_text(json.dumps({'splits': {}, **INFO, 'tokenizer': 'a'})[:-1]
                                      .replace('"tokenizer"', '"other"') + '}')
  with pytest.raises(UserError, match='lacks tokenizer'):
    token_cache.read_info(str(tmp_path))
  (tmp_path / 'info.json').unlink()
  with pytest.raises(UserError, match='is not finished'):
    token_cache.read_info(str(tmp_path))


def test_a_shard_that_was_cut_is_refused_when_it_is_opened(cache):
  path = os.path.join(cache, 'train-00001.tfrecord')
  with open(path, 'r+b') as file:
    file.truncate(os.path.getsize(path) - 1)
  with pytest.raises(UserError, match='train-00001.tfrecord is damaged: it has .* when it was '
                                      'written; copy it again, or `parti-jax tokenize`'):
    Batches('cached_tokens', 'train', 1, LENGTHS)


@pytest.mark.parametrize('place', [2, 20])
def test_a_shard_of_something_else_is_refused_when_it_is_opened(cache, place):
  _flip(os.path.join(cache, 'train-00000.tfrecord'), place)
  with pytest.raises(UserError, match='train-00000.tfrecord is damaged: its first record is none'):
    Batches('cached_tokens', 'train', 1, LENGTHS)


def test_a_cache_without_sizes_is_read(cache):
  path = os.path.join(cache, 'info.json')
  info = token_cache.read_info(cache)
  for split in info['splits'].values():
    del split['bytes']
  with open(path, 'w', encoding='utf-8') as file:
    json.dump(info, file)
  assert len(list(Batches('cached_tokens', 'train', 5, LENGTHS, num_epochs=1))) == 2


def test_a_damaged_record_is_left_out_by_whoever_has_its_share(cache, caplog):
  path = os.path.join(cache, 'train-00001.tfrecord')
  _flip(path, os.path.getsize(path) - 10)  # In the last of the four records.
  read, skipped = [], []
  for share in range(3):
    batches = Batches('cached_tokens', 'train', 4, LENGTHS, seed=1, num_epochs=1, share=share,
                      shares=3)
    read += [int(codes[0]) for batch in batches for codes in batch['decoder_target_tokens']]
    skipped.append(batches.skipped)
  assert sorted(read) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
  assert sorted(map(len, skipped)) == [0, 0, 1]
  assert {'record with a wrong checksum': 1} in skipped
  assert 'train-00001.tfrecord: record with a wrong checksum' in caplog.text


@pytest.mark.parametrize('entry, value', [
    ('codebook_size', '8192'), ('image_tokens', 0), ('image_tokens', 1e9), ('image_tokens', True),
    ('tokenizer', None), ('splits', []), ('splits', {'train': 3}),
    ('splits', {'train': {'examples': 3}}), ('splits', {'train': {'examples': 3, 'shards': -1}}),
    ('splits', {'train': {'examples': 3, 'shards': 2, 'bytes': [1]}})])
def test_info_that_makes_no_sense(tmp_path, entry, value):
  info = {**INFO, 'splits': {}, entry: value}
  (tmp_path / 'info.json').write_text(json.dumps(info))
  with pytest.raises(UserError, match='info.json is damaged; `parti-jax tokenize` makes it anew'):
    token_cache.read_info(str(tmp_path))


@pytest.mark.parametrize('content', [b'[1]', b'7', b'\xff{}', b'[' * 100_000])
def test_info_that_is_no_object(tmp_path, content):
  (tmp_path / 'info.json').write_bytes(content)
  with pytest.raises(UserError, match='info.json (is damaged|lacks)'):
    token_cache.read_info(str(tmp_path))


def _flip(path, place):
  """Flips one bit of a file."""
  with open(path, 'r+b') as file:
    file.seek(place)
    byte = file.read(1)[0]
    file.seek(place)
    file.write(bytes([byte ^ 1]))


def test_lengths_and_path(cache):
  with pytest.raises(UserError, match='has 4 tokens a picture'):
    Batches('cached_tokens', 'train', 1, {'inputs': 12, 'targets': 5})
  gin.clear_config()
  with pytest.raises(UserError, match='token_cache.path is not set'):
    Batches('cached_tokens', 'train', 1, LENGTHS)

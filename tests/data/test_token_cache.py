"""The token cache: written atomically, read as a seqio task."""

import json
import os
import pathlib
import re

import gin
import numpy as np
import pytest
import xxhash

from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.data.batches import Batches

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
  batches = Batches(task, 'train', 6, LENGTHS, seed=2, num_epochs=1)
  first, last = batches
  assert {k: (v.shape, v.dtype) for k, v in first.items()} == {
    'encoder_input_tokens': ((6, 12), np.int32),
    'decoder_target_tokens': ((6, 4), np.int32),
    'decoder_loss_weights': ((6, 4), np.float32),
  }
  vocabulary = datasets.get_vocabulary()
  expected = {
    i: vocabulary.encode(caption, 12)[0].tolist() for i, (caption, _) in enumerate(_examples(10))
  }
  for batch in (first, last):
    assert (batch['decoder_loss_weights'] == 1).all()
    for ids, codes in zip(batch['encoder_input_tokens'], batch['decoder_target_tokens']):
      assert (codes == codes[0]).all()
      assert ids.tolist() == expected.pop(int(codes[0]))
  assert not expected


def test_each_pass_over_a_small_cache_has_its_own_order(cache):
  batches = Batches('cached_tokens', 'train', 10, LENGTHS, seed=2)
  orders = [tuple(next(batches)['decoder_target_tokens'][:, 0].tolist()) for _ in range(15)]
  assert all(sorted(order) == list(range(10)) for order in orders)
  assert len(set(orders)) == 15
  again = Batches('cached_tokens', 'train', 10, LENGTHS, seed=2)
  assert orders == [tuple(next(again)['decoder_target_tokens'][:, 0].tolist()) for _ in range(15)]


def test_info(cache):

  def shard(name, examples):
    path = os.path.join(cache, f'{name}.array_record')
    content = pathlib.Path(path).read_bytes()
    return {
      'examples': examples,
      'bytes': len(content),
      'digest': xxhash.xxh3_128_hexdigest(content),
    }

  assert token_cache_info.read_info(cache) == {
    **INFO,
    'version': 2,
    'views': 1,
    'splits': {
      'train': {
        'examples': 10,
        'shards': [shard(f'train-0000{i}', count) for i, count in enumerate((4, 4, 2))],
      },
      'validation': {'examples': 2, 'shards': [shard('validation-00000', 2)]},
    },
  }
  assert sorted(os.listdir(cache)) == [
    'info.json',
    *(f'train-0000{i}.array_record' for i in range(3)),
    'validation-00000.array_record',
  ]


def test_writing_again_replaces_a_split(cache):
  token_cache.write_token_cache(cache, _examples(3), INFO)
  splits = token_cache_info.read_info(cache)['splits']
  assert {name: (split['examples'], len(split['shards'])) for name, split in splits.items()} == {
    'train': (3, 1),
    'validation': (2, 1),
  }
  assert sorted(os.listdir(cache)) == [
    'info.json',
    'train-00000.array_record',
    'validation-00000.array_record',
  ]


def test_writing_again_keeps_splits_with_the_same_prefix(cache):
  token_cache.write_token_cache(cache, _examples(6), INFO, split='train-more')
  token_cache.write_token_cache(cache, _examples(3), INFO, split='हिन्दी 訓練')
  token_cache.write_token_cache(cache, _examples(1), INFO)
  token_cache.write_token_cache(cache, _examples(3), INFO, split='train[:10%]')
  token_cache.write_token_cache(cache, _examples(1), INFO, split='train[%3A10%]')
  source = token_cache.TokenCacheSource(cache)
  found = {split: len(source.open(split)) for split in source.splits}
  assert found == {
    'validation': 2,
    'train-more': 6,
    'हिन्दी 訓練': 3,
    'train': 1,
    'train[:10%]': 3,
    'train[%3A10%]': 1,
  }
  assert not [name for name in os.listdir(cache) if ':' in name]


@pytest.mark.parametrize(
  'split', ['', '../train', 'a/b', 'a\\b', '.hidden', 'a\0', 'a\n', 'a*', '訓' * 70, '-a', '\ud800']
)
def test_split_names_that_cannot_be_file_names(cache, split):
  before = sorted(os.listdir(cache))
  with pytest.raises(UserError, match=re.escape(repr(split[:80]))):
    token_cache.write_token_cache(cache, _examples(1), INFO, split=split)
  assert sorted(os.listdir(cache)) == before


@pytest.mark.parametrize('split', ['Train', 'ｔｒａｉｎ'])
def test_splits_whose_files_collide_on_some_file_systems(cache, split):
  with pytest.raises(UserError, match=f"'train'.*{split!r}"):
    token_cache.write_token_cache(cache, _examples(1), INFO, split=split)


def test_interrupted_writing_changes_nothing(cache):
  before = sorted(os.listdir(cache)), token_cache_info.read_info(cache)

  def broken():
    yield from _examples(6)
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    token_cache.write_token_cache(cache, broken(), INFO)
  assert (sorted(os.listdir(cache)), token_cache_info.read_info(cache)) == before


def test_tokens_of_another_tokenizer_do_not_mix(cache):
  with pytest.raises(UserError, match='validation.*tokenizer abc.* xyz'):
    token_cache.write_token_cache(cache, _examples(1), {**INFO, 'tokenizer': 'xyz'})


@pytest.mark.parametrize('tokens', [[1, 2, 3], [0, 0, 0, 32], [-1, 0, 0, 0]])
def test_tokens_that_do_not_fit(tmp_path, tokens):
  with pytest.raises(ValueError, match='tokens'):
    token_cache.write_token_cache(str(tmp_path), [('a', np.array(tokens, np.int32))], INFO)
  assert not list(tmp_path.iterdir())


def test_nothing_to_write(tmp_path):
  with pytest.raises(UserError, match='token cache'):
    token_cache.write_token_cache(str(tmp_path), [], INFO)


def test_missing_unfinished_or_damaged(cache, tmp_path):
  with pytest.raises(UserError, match="'test'.*train, validation.*parti-jax tokenize"):
    Batches('cached_tokens', 'test', 1, LENGTHS)
  os.remove(os.path.join(cache, 'train-00001.array_record'))
  with pytest.raises(UserError, match='train-00001.array_record.*parti-jax tokenize'):
    Batches('cached_tokens', 'train', 1, LENGTHS)
  with pytest.raises(UserError, match=f'{tmp_path}/none .*parti-jax tokenize.*token_cache.path'):
    token_cache_info.read_info(str(tmp_path / 'none'))
  (tmp_path / 'info.json').write_text('{')
  with pytest.raises(UserError, match='info.json.*parti-jax tokenize'):
    token_cache_info.read_info(str(tmp_path))
  (tmp_path / 'info.json').write_text(
    json.dumps({'splits': {}, **INFO, 'tokenizer': 'a'})[:-1].replace('"tokenizer"', '"other"')
    + '}'
  )
  with pytest.raises(UserError, match='info.json.* tokenizer;'):
    token_cache_info.read_info(str(tmp_path))
  (tmp_path / 'info.json').unlink()
  with pytest.raises(UserError, match=f'{tmp_path} .*parti-jax tokenize.*token_cache.path'):
    token_cache_info.read_info(str(tmp_path))


@pytest.mark.parametrize('grid', [[2, 3], [4], [4, '1'], [-2, -2], '2×2'])
def test_a_grid_of_other_tokens_is_damage(cache, grid):
  info = token_cache_info.read_info(cache)
  token_cache_info.write_info(cache, {**info, 'grid': [2, 2]})
  assert token_cache_info.read_info(cache)['grid'] == [2, 2]
  token_cache_info.write_info(cache, {**info, 'grid': grid})
  with pytest.raises(UserError, match='info.json is damaged'):
    token_cache_info.read_info(cache)


def test_a_truncated_shard_is_refused_when_it_is_opened(cache):
  path = os.path.join(cache, 'train-00001.array_record')
  with open(path, 'r+b') as file:
    file.truncate(os.path.getsize(path) - 1)
  size = f'{os.path.getsize(path):,}.*{os.path.getsize(path) + 1:,}'
  with pytest.raises(UserError, match=f'train-00001.array_record.* {size}.*parti-jax tokenize'):
    Batches('cached_tokens', 'train', 1, LENGTHS)


def test_a_shard_of_something_else_is_refused_when_it_is_opened(cache, tmp_path):
  name = 'train-00000.array_record'
  size = os.path.getsize(os.path.join(cache, name))
  pathlib.Path(cache, name).write_bytes(bytes(size))
  with pytest.raises(UserError, match=f'{name}.*the token cache {cache}.*parti-jax tokenize'):
    Batches('cached_tokens', 'train', 1, LENGTHS)


@pytest.mark.parametrize('tokens, codes', [(9, 32), (4, 8)])
def test_a_shard_of_another_cache_is_refused_when_it_is_opened(cache, tmp_path, tokens, codes):
  """Of the same size and number of records, but with tokens that don't fit info.json."""
  info = token_cache_info.read_info(cache)
  name = 'train-00000.array_record'
  other = {**INFO, 'image_tokens': tokens, 'codebook_size': 2**16}
  records = (token_cache.serialized('', np.full(tokens, 20), other) for _ in range(4))
  shard = token_cache.write_shard(os.path.join(cache, name), records)
  info['splits']['train']['shards'][0] = shard
  token_cache_info.write_info(cache, {**info, 'codebook_size': codes})
  if (tokens, codes) == (4, 8):
    with pytest.raises(UserError, match=f'{name}.*the token cache {cache}.*parti-jax tokenize'):
      Batches('cached_tokens', 'train', 1, LENGTHS)
  else:  # A caption begins after its tokens, and these bytes aren't text.
    batches = Batches('cached_tokens', 'train', 1, LENGTHS, num_epochs=1)
    list(batches)
    assert sum(batches.skipped.values()) == 4


def _damage_a_record(cache, name='train-00001.array_record', number=3):
  """Changes bytes of one record of a shard."""
  path = pathlib.Path(cache, name)
  content = bytearray(path.read_bytes())
  record = token_cache.serialized(f'woman firefighter {4 + number}', np.full(4, 4 + number), INFO)
  place = content.find(record[-8:])
  assert place > 0  # Such short records aren't compressed.
  content[place] ^= 1
  path.write_bytes(content)


def test_a_damaged_record_is_skipped_in_its_share(cache, caplog):
  _damage_a_record(cache)
  read, skipped = [], []
  for share in range(3):
    batches = Batches(
      'cached_tokens', 'train', 4, LENGTHS, seed=1, num_epochs=1, share=share, shares=3
    )
    read += [int(codes[0]) for batch in batches for codes in batch['decoder_target_tokens']]
    skipped.append(batches.skipped)
  assert sorted(read) == [0, 1, 2, 3, 4, 5, 6, 8, 9]
  assert sorted(map(len, skipped)) == [0, 0, 1]
  assert {'damaged record': 1} in skipped
  assert 'train-00001.array_record' in caplog.text
  assert [
    os.path.basename(path) for path in token_cache.TokenCacheSource(cache).damaged_shards('train')
  ] == ['train-00001.array_record']


def test_epochs_report_rarer_and_rarer_what_they_skip(cache, caplog):
  _damage_a_record(cache)
  list(Batches('cached_tokens', 'train', 3, LENGTHS, seed=1, num_epochs=10))
  told = re.findall(r'epoch (\d+) ended after 9 .* so far skipped: (\d+) damaged', caplog.text)
  assert told == [('0', '1'), ('1', '2'), ('2', '3'), ('4', '5'), ('8', '9')]


@pytest.mark.parametrize('codes', [2**16, 2**16 + 1])
@pytest.mark.parametrize('views', [1, 3])
def test_codes_and_views_of_any_number(tmp_path, codes, views):
  rng = np.random.default_rng(0)
  info = {**INFO, 'codebook_size': codes, 'views': views}
  shape = (views, 4) if views > 1 else (4,)
  examples = [(f'apple {i}', rng.integers(0, codes, shape)) for i in range(5)]
  examples[0] = examples[0][0], np.full(shape, codes - 1)
  token_cache.write_token_cache(str(tmp_path), iter(examples), info)
  records = token_cache.TokenCacheSource(str(tmp_path)).open('train')
  for index, example in enumerate(records.read(range(5))):
    assert example['caption'].decode() == examples[index][0]
    np.testing.assert_array_equal(example['tokens'], examples[index][1])
    assert example['tokens'].dtype == np.int32
  gin.parse_config(f"token_cache.path = '{tmp_path}'\ndrop_text.rate = 0.0")
  batches = Batches('cached_tokens', 'train', 5, LENGTHS, shuffle=False)
  seen = {tuple(map(tuple, next(batches)['decoder_target_tokens'])) for _ in range(12)}
  rows = np.array(list(seen))  # [orders of views, examples, tokens]
  assert (len(seen) == 1) == (views == 1)
  for index in range(1, 5):
    expected = {tuple(view) for view in np.atleast_2d(examples[index][1]).tolist()}
    assert set(map(tuple, rows[:, index].tolist())) == expected


def test_tokens_of_several_views_need_a_view_axis(tmp_path):
  with pytest.raises(ValueError, match=r'\(4,\).*\(2, 4\)'):
    token_cache.write_token_cache(str(tmp_path), _examples(1), {**INFO, 'views': 2})


@pytest.mark.parametrize('shuffle', ['global', 'window'])
def test_both_shuffles_read_all(cache, shuffle):
  gin.parse_config(f"token_cache.shuffle = '{shuffle}'\nshuffle.buffer_size = 6")
  for shares in (1, 2, 3, 4):
    read = []
    for share in range(shares):
      batches = Batches(
        'cached_tokens', 'train', 2, LENGTHS, num_epochs=1, share=share, shares=shares
      )
      read.append([int(codes[0]) for batch in batches for codes in batch['decoder_target_tokens']])
    assert sorted(sum(read, [])) == list(range(10))
    if shares <= 3 and shuffle == 'window':  # Each has its own shards.
      assert all(
        {number // 4 for number in part}.isdisjoint({number // 4 for number in other})
        for part in read
        for other in read
        if part is not other
      )


def test_an_unknown_shuffle(cache):
  gin.parse_config("token_cache.shuffle = 'all'")
  with pytest.raises(UserError, match="token_cache.shuffle='all'.* global, window"):
    Batches('cached_tokens', 'train', 1, LENGTHS)


SHARD = {'examples': 3, 'bytes': 10}


@pytest.mark.parametrize(
  'entry, value',
  [
    ('codebook_size', '8192'),
    ('image_tokens', 0),
    ('image_tokens', 1e9),
    ('image_tokens', True),
    ('tokenizer', None),
    ('splits', []),
    ('splits', {'train': 3}),
    ('views', 0),
    ('version', 3),
    ('splits', {'train': {'examples': 3}}),
    ('splits', {'train': {'examples': 3, 'shards': 1}}),
    ('splits', {'train': {'examples': 3, 'shards': []}}),
    ('splits', {'train': {'examples': 4, 'shards': [SHARD]}}),
    ('splits', {'train': {'examples': 3, 'shards': [{**SHARD, 'bytes': '10'}]}}),
  ],
)
def test_invalid_info(tmp_path, entry, value):
  info = {**INFO, 'version': 2, 'views': 1, 'splits': {}, entry: value}
  (tmp_path / 'info.json').write_text(json.dumps(info))
  with pytest.raises(UserError, match='info.json.*parti-jax tokenize'):
    token_cache_info.read_info(str(tmp_path))


def test_version_1_says_what_to_do(tmp_path):
  (tmp_path / 'info.json').write_text(
    json.dumps({**INFO, 'splits': {'train': {'examples': 3, 'shards': 1, 'bytes': [12]}}})
  )
  with pytest.raises(
    UserError,
    match=f'{tmp_path} .*version 1.*parti-jax tokenize --convert={tmp_path} --output_dir=FOLDER',
  ):
    token_cache_info.read_info(str(tmp_path))


@pytest.mark.parametrize('content', [b'[1]', b'7', b'\xff{}', b'[' * 100_000])
def test_info_that_is_not_an_object(tmp_path, content):
  (tmp_path / 'info.json').write_bytes(content)
  with pytest.raises(UserError, match='info.json.*parti-jax tokenize'):
    token_cache_info.read_info(str(tmp_path))


def test_lengths_and_path(cache):
  with pytest.raises(UserError, match=r" 4 .*feature_lengths\['targets'\] = 5"):
    Batches('cached_tokens', 'train', 1, {'inputs': 12, 'targets': 5})
  gin.clear_config()
  with pytest.raises(UserError, match='--gin.token_cache.path='):
    Batches('cached_tokens', 'train', 1, LENGTHS)

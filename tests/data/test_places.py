"""Positions in the data: valid for the same data only; shares with empty or damaged files."""

import gzip
import json
import os

import gin
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import input_parts
from parti_jax.data import shared_batches
from parti_jax.data import sources
from parti_jax.data import token_cache
from parti_jax.data.batches import Batches
from parti_jax.data.readers import array_records
from parti_jax.data.share import Settings

LENGTHS = {'inputs': 8, 'targets': 4}
INFO = {'codebook_size': 32, 'image_tokens': 4, 'tokenizer': 'abc'}


@pytest.fixture(name='cache')
def _cache(tmp_path, monkeypatch):
  """Writes a token cache of `count` examples in shards of 5, each with its number."""
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD', 5)

  def write(count):
    path = str(tmp_path / f'cache_{count}')
    token_cache.write_token_cache(
      path, ((f'number {i}', np.full(4, i % 32)) for i in range(count)), INFO
    )
    gin.bind_parameter('token_cache.path', path)
    return path

  with gin.unlock_config():
    yield write


def _state_after(batches, count=3):
  with batches:
    for _ in range(count):
      next(batches)
    return json.loads(json.dumps(batches.state()))


@pytest.mark.parametrize(
  'change, named',
  [
    (
      lambda cache: gin.bind_parameter('token_cache.shuffle', 'global'),
      'examples None .* 20.*files 4 .* None',
    ),
    (
      lambda cache: gin.bind_parameter('shuffle.buffer_size', 3),
      'shuffle.buffer_size 10000 .* 3',
    ),
    (lambda cache: cache(30), 'files 4 .* 6'),
  ],
)
def test_a_position_in_other_data_or_another_order_is_refused(cache, change, named):
  cache(20)
  gin.bind_parameter('token_cache.shuffle', 'window')
  state = _state_after(Batches('cached_tokens', 'train', 4, LENGTHS))
  change(cache)
  with Batches('cached_tokens', 'train', 4, LENGTHS) as batches:
    with pytest.raises(UserError, match=f'{named}.*train.restart_data=True'):
      batches.restore(state)


def test_another_seed_is_another_order(cache):
  cache(20)
  state = _state_after(Batches('cached_tokens', 'train', 4, LENGTHS, seed=1))
  with Batches('cached_tokens', 'train', 4, LENGTHS, seed=2) as batches:
    with pytest.raises(UserError, match='train.seed 1 .* 2'):
      batches.restore(state)


def test_restart_data_only_ignores_a_position_in_other_data(cache, caplog):
  cache(20)
  shared = lambda restart: shared_batches.SharedBatches(
    'cached_tokens', 'train', 4, LENGTHS, restart=restart
  )
  with shared(False) as batches:
    fresh = [next(batches) for _ in range(4)]
    state = json.loads(json.dumps(batches.state()))
    expected = next(batches)
  with shared(True) as batches:
    batches.restore(state)
    np.testing.assert_array_equal(
      next(batches)['decoder_target_tokens'], expected['decoder_target_tokens']
    )
  assert not caplog.records
  cache(30)
  with shared(True) as batches:
    batches.restore(state)
    assert batches.places()[0].read == 0
    assert next(batches)['decoder_target_tokens'].shape == (4, 4)
  assert 'train.restart_data' in caplog.text
  assert len(fresh) == 4


@pytest.mark.parametrize('shuffle', ['window', 'global'])
def test_a_position_beyond_the_end_of_an_epoch_is_refused(cache, shuffle):
  cache(20)
  gin.bind_parameter('token_cache.shuffle', shuffle)
  place = shared_batches.Place.parse('0/1:0:999+2')
  with pytest.raises(UserError, match=r'\b999 .*\b0\b.*\b20\b'):
    shared_batches.read(place, 'cached_tokens', 'train', LENGTHS, seed=0)


def _texts(folder, contents):
  for index, content in enumerate(contents):
    (folder / f'{index}.txt').write_bytes(content)
  gin.bind_parameter('text.path', str(folder))
  gin.bind_parameter('text.splits', {'train': '*.txt*'})


@pytest.mark.parametrize('share', range(2))
def test_a_share_may_have_only_empty_files_in_an_epoch(tmp_path, share):
  """In each epoch, a share gets two of the files at random."""
  with gin.unlock_config():
    _texts(tmp_path, [b'a\nb\n', b'', b'', b'c\nd\n'])
  seen, epochs = set(), set()
  with Batches('text_texts', 'train', 2, {'inputs': 8}, share=share, shares=2) as batches:
    for _ in range(20):
      seen |= {tuple(row) for row in next(batches)['encoder_input_tokens']}
      epochs.add(batches.place[0])
  assert len(seen) == 4 and epochs < set(range(max(epochs) + 1))


def test_a_damaged_file_of_a_share_is_counted(tmp_path):
  with gin.unlock_config():
    _texts(tmp_path, [b'a\nb\n'])
  (tmp_path / 'broken.txt.gz').write_bytes(gzip.compress(os.urandom(9000))[:2000])
  with Batches('text_texts', 'train', 2, {'inputs': 8}, share=1, shares=2) as batches:
    for _ in range(20):
      next(batches)
    assert batches.skipped


def test_a_share_without_anything_usable_ends(tmp_path):
  with gin.unlock_config():
    _texts(tmp_path, [b'', b'', b''])
  with Batches('text_texts', 'train', 2, {'inputs': 8}, share=0, shares=2) as batches:
    with pytest.raises(UserError, match='1 of 2 .*train.data_shares.*text'):
      next(batches)


def test_files_of_other_sizes_are_another_source(tmp_path):
  descriptions = []
  for name, content in (('a', b'one\ntwo\n'), ('b', b'three\nfour\nfive\n')):
    (tmp_path / name).mkdir()
    with gin.unlock_config():
      _texts(tmp_path / name, [content])
    opened = sources.configured('text').open('train', pictures=False)
    descriptions.append(input_parts.InputParts(opened).description())
  assert descriptions[0].keys() == descriptions[1].keys() and descriptions[0] != descriptions[1]


def test_a_host_keeps_at_least_a_thread_for_each_share():
  assert Settings(4, 3, 8).divided(8) == Settings(1, 1, 1)
  assert Settings(0, 0, 8).divided(8) == Settings(0, 0, 1)


def test_threads_read_more_shards_than_stay_open(cache, monkeypatch):
  import concurrent.futures

  monkeypatch.setattr(array_records, '_MOST_OPEN', 2)
  cache(40)
  gin.bind_parameter('token_cache.shuffle', 'global')
  records = token_cache.configured().open('train')
  draw = np.random.default_rng(0)
  with concurrent.futures.ThreadPoolExecutor(8) as executor:
    found = list(
      executor.map(
        lambda index: (index, records.read([index])[0]), draw.integers(0, 40, 3000).tolist()
      )
    )
  assert all(example['caption'] == f'number {index}'.encode() for index, example in found)

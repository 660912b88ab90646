"""Mixtures: exact weights, resuming, shares, errors, token caches."""

import collections
import fractions
import json
import re

import gin
import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings
from hypothesis import strategies

from parti_jax.core.errors import UserError
from parti_jax.data import mixing
from parti_jax.data import mixtures
from parti_jax.data import shared_batches
from parti_jax.data import token_cache
from parti_jax.data.batches import Batches

IMAGES, PAIRS, TOKENS = {'images': 8}, {'inputs': 16, 'images': 8}, {'inputs': 8, 'targets': 4}
TASK = 'mixture_images'


@pytest.fixture(name='sources')
def _sources(tmp_path, encode):
  """Writes folders whose pictures have the folder's number in green and their own in red.

  Some files of a folder may be damaged.
  """

  def write(counts, weights, damaged=0, splits=('train',)):
    names = [f'folder_{"abcdef"[index]}' for index in range(len(counts))]
    for index, (name, count) in enumerate(zip(names, counts)):
      (tmp_path / name).mkdir(exist_ok=True)
      rows = []
      for number in range(count):
        file = tmp_path / name / f'{number}.png'
        file.write_bytes(b'bad' if number < damaged else encode((number, index, 0)))
        rows.append(json.dumps({'file': file.name, 'caption': f'woman {number}'}))
      for split in splits:
        (tmp_path / name / f'{split}.jsonl').write_text('\n'.join(rows) + '\n')
      gin.parse_config(f"{name}/folder.path = '{tmp_path / name}'")
    gin.parse_config(f'folder.splits = { {split: f"{split}.jsonl" for split in splits} }')
    gin.parse_config(f'mixture.sources = {dict(zip(names, weights))}')
    return names

  return write


def _pairs(batch):
  """Returns (source, number) of the examples of a batch."""
  return [tuple(pixel[1::-1].tolist()) for pixel in batch['images'][:, 0, 0]]


def _read(batches, count):
  return sum((_pairs(next(batches)) for _ in range(count)), [])


_WEIGHTS = strategies.lists(
  strategies.one_of(strategies.floats(1e-9, 1e9), strategies.integers(1, 1000)),
  min_size=1,
  max_size=8,
)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(_WEIGHTS, strategies.integers(1, 300))
def test_each_source_has_its_share_over_any_stretch(weights, stretch):
  exact = [fractions.Fraction(repr(weight)) for weight in weights]
  shares = [weight / sum(exact) for weight in exact]
  bound = 1 - fractions.Fraction(1, 2 * len(shares) - 2) if len(shares) > 1 else 0
  turns, counts = mixing.Turns(shares), [[0] * len(shares)]
  for number in range(1, 400):
    turns.next()
    counts.append(list(turns.taken))
    for share, taken in zip(shares, turns.taken):
      assert abs(taken - share * number) <= bound
  for before, after in zip(counts, counts[stretch:]):
    for share, first, last in zip(shares, before, after):
      assert abs(last - first - share * stretch) <= 2 * bound


def test_turns_continue_from_any_position():
  shares = [fractions.Fraction(7, 10), fractions.Fraction(1, 5), fractions.Fraction(1, 10)]
  turns = mixing.Turns(shares)
  for _ in range(33):
    before = turns.copy()
    resumed = mixing.Turns(shares, turns.taken)
    assert [resumed.next() for _ in range(20)] == [before.next() for _ in range(20)]
    turns.next()
  # After 10 billion examples as at the beginning.
  far = mixing.Turns(shares, [7 * 10**9, 2 * 10**9, 10**9])
  near = mixing.Turns(shares)
  assert [far.next() for _ in range(50)] == [near.next() for _ in range(50)]


@pytest.mark.parametrize(
  'value, message',
  [
    ('{}', '--gin.mixture.sources='),
    ('None', '--gin.mixture.sources='),
    ("{'folder_a': 0}", 'mixture.sources: .* 0 .*folder_a'),
    ("{'folder_a': -1.0}", 'mixture.sources: .* -1.0 .*folder_a'),
    ("{'folder_a': True}", 'mixture.sources: .* True .*folder_a'),
    ("{'folder_a': float}", None),
    ("{'folder_a': '1'}", "mixture.sources: .* '1' .*folder_a"),
    ("{'folders': 1}", "'folders'.*openmoji, .*token_cache"),
    ("{'folder_a b': 1}", "mixture.sources: .*'folder_a b'"),
    ('{1: 1}', 'mixture.sources: .* 1;'),
    ("{'token_cache': 1}", 'token_cache .*images.*mixture_tokens'),
  ],
)
def test_wrong_sources(value, message):
  if message is None:
    with pytest.raises(SyntaxError):
      gin.parse_config(f'mixture.sources = {value}')
    return
  gin.parse_config(f'mixture.sources = {value}')
  with pytest.raises(UserError, match=message):
    Batches(TASK, 'train', 1, IMAGES)


def test_the_examples_are_those_of_each_source_by_its_weight(sources):
  sources([20, 6], [3, 1])
  batches = Batches(TASK, 'train', 4, IMAGES, seed=2)
  for _ in range(30):
    found = _pairs(next(batches))
    assert collections.Counter(source for source, _ in found) == {0: 3, 1: 1}
  batches = Batches(TASK, 'train', 4, IMAGES, seed=2)
  read = _read(batches, 20)
  for source, count in ((0, 20), (1, 6)):
    numbers = [number for other, number in read if other == source]
    assert sorted(numbers[:count]) == list(range(count))
    alone = Batches(
      f'folder_{"ab"[source]}_images',
      'train',
      1,
      IMAGES,
      seed=mixtures.part_seed(2, f'folder_{"ab"[source]}_images'),
    )
    assert numbers[:count] == [number for _, number in _read(alone, count)]


def test_the_order_of_the_sources_in_gin_does_not_matter(sources):
  sources([9, 8, 7], [1, 1, 1])
  batches = Batches(TASK, 'train', 5, IMAGES)
  gin.parse_config("mixture.sources = {'folder_c': 2, 'folder_b': 2.0, 'folder_a': 2}")
  assert _read(batches, 8) == _read(Batches(TASK, 'train', 5, IMAGES), 8)


def test_equal_sources_are_not_shuffled_alike(sources):
  sources([40, 40], [1, 1])
  read = _read(Batches(TASK, 'train', 80, IMAGES), 1)
  first, second = ([number for other, number in read if other == source] for source in range(2))
  assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize('taken', [0, 1, 5, 8])
def test_resumes_as_if_uninterrupted(sources, taken):
  sources([7, 5, 3], [0.5, 0.3, 0.2], damaged=1)
  gin.parse_config('drop_text.rate = 0.5')
  whole, resumed = (
    Batches('mixture_pairs', 'train', 3, PAIRS, seed=5, training=True) for _ in range(2)
  )
  for _ in range(taken):
    next(whole)
  state = json.loads(json.dumps(whole.state()))
  next(resumed)
  resumed.restore(state)
  for _ in range(6):
    batch, again = next(whole), next(resumed)
    assert all((batch[name] == again[name]).all() for name in batch)
  assert whole.state() == resumed.state()


def _shared(rows=None, **kwargs):
  return shared_batches.SharedBatches(TASK, 'train', 8, IMAGES, rows=rows, seed=3, **kwargs)


def test_global_batches_do_not_depend_on_the_processes(sources):
  sources([23, 9], [0.75, 0.25])
  alone = _shared(shares=2)
  first = [_pairs(next(alone)) for _ in range(3)]
  state = json.loads(json.dumps(alone.state()))
  for batch in first:  # Each share has its own schedule.
    for share in range(2):
      assert collections.Counter(source for source, _ in batch[4 * share : 4 * share + 4]) == {
        0: 3,
        1: 1,
      }
  several = [_shared([0, 1, 2, 3, 4]), _shared([5, 6, 7])]
  for batches in several:
    batches.restore(state)
  for _ in range(4):
    assert _pairs(next(alone)) == sum((_pairs(next(batches)) for batches in several), [])
  assert several[0].by_source == {
    'examples/folder_a': 42,
    'skipped_examples/folder_a': 0,
    'examples/folder_b': 14,
    'skipped_examples/folder_b': 0,
  }


def test_a_batch_can_be_read_by_its_places(sources):
  sources([23, 9], [0.75, 0.25])
  batches = _shared(shares=2)
  for _ in range(4):
    places, batch = batches.places(), _pairs(next(batches))
  assert [place.task for place in places] == 2 * ['folder_a_images', 'folder_b_images']
  found = []
  for place in map(str, places):
    place = shared_batches.Place.parse(place)
    found += _pairs(shared_batches.read(place, TASK, 'train', IMAGES, 3))
  assert sorted(found) == sorted(batch)
  with pytest.raises(UserError, match='@TASK'):
    shared_batches.read(shared_batches.Place(0, 2, 0, 0, 3), TASK, 'train', IMAGES, 3)


def test_other_sources_are_refused(sources):
  sources([5, 5], [1, 1])
  state = json.loads(json.dumps(Batches(TASK, 'train', 2, IMAGES).state()))
  alone = Batches('folder_a_images', 'train', 2, IMAGES)
  for other in ("{'folder_a': 1}", "{'folder_a': 1, 'folder_c': 1}"):
    gin.parse_config(f'mixture.sources = {other}')
    with pytest.raises(
      UserError,
      match='folder_a_images, folder_b_images.*folder_a_images.*train.restart_data=True',
    ):
      mixtures.check_state(TASK, state)
  with pytest.raises(UserError, match='folder_b_images.* folder_a_images.*train.restart_data=True'):
    alone.restore(state)
  with pytest.raises(UserError, match='folder_a_images, folder_c_images'):
    mixtures.check_state(TASK, alone.state())


def test_other_weights_apply_from_there_on(sources, caplog):
  sources([40, 40], [9, 1])
  batches = Batches(TASK, 'train', 10, IMAGES)
  before = _read(batches, 3)
  state = json.loads(json.dumps(batches.state()))
  gin.parse_config("mixture.sources = {'folder_a': 1, 'folder_b': 1}")
  changed = Batches(TASK, 'train', 10, IMAGES)
  changed.restore(state)
  assert re.search('folder_a 0.9, folder_b 0.1.*folder_a 0.5, folder_b 0.5', caplog.text)
  after = _pairs(next(changed))
  assert collections.Counter(source for source, _ in after) == {0: 5, 1: 5}
  # No example is repeated.
  assert len({*before, *after}) == 40
  assert changed.state()['seen'] == {'folder_a_images': 32, 'folder_b_images': 8}


def test_a_finite_reading_has_all_examples(sources):
  sources([7, 3, 1], [1, 1e6, 0.1])
  batches = Batches(TASK, 'train', 4, IMAGES, shuffle=False, num_epochs=1)
  read = [_pairs(batch) for batch in batches]
  assert [len(batch) for batch in read] == [4, 4, 3]
  assert sorted(sum(read, [])) == sorted(
    (source, number) for source, count in enumerate([7, 3, 1]) for number in range(count)
  )
  assert next(batches, None) is None


def test_skipped_examples_are_counted_by_source(sources):
  sources([6, 4], [1, 1], damaged=2)
  batches = Batches(TASK, 'train', 3, IMAGES, num_epochs=1)
  assert sum(len(_pairs(batch)) for batch in batches) == 6
  assert batches.skipped == {
    'folder_a: unknown picture format': 2,
    'folder_b: unknown picture format': 2,
  }


def test_a_source_without_the_split_or_the_path_is_named(sources, tmp_path):
  sources([3, 3], [1, 1], splits=('train', 'validation'))
  assert len(next(Batches(TASK, 'validation', 6, IMAGES))['images']) == 6
  gin.parse_config("folder_b/folder.splits = {'train': 'train.jsonl'}")
  with pytest.raises(UserError, match="mixture.sources, folder_b: .*'validation'"):
    Batches(TASK, 'validation', 2, IMAGES)
  gin.parse_config("mixture.sources = {'folder_a': 1, 'folder_z': 1}")
  with pytest.raises(
    UserError,
    match='mixture.sources, folder_z: .*--gin.folder_z/folder.path=',
  ):
    Batches(TASK, 'train', 2, IMAGES)
  (tmp_path / 'a.txt').write_text('one text\n')
  gin.parse_config(f"text.path = '{tmp_path}'")
  gin.parse_config("mixture.sources = {'folder_a': 1, 'text': 1}")
  assert len(next(Batches('mixture_texts', 'train', 4, {'inputs': 8}))['encoder_input_tokens']) == 4
  with pytest.raises(UserError, match="mixture.sources, text: .*data.source='text'"):
    Batches('mixture_pairs', 'train', 2, PAIRS)


@pytest.fixture(name='caches')
def _caches(tmp_path):
  """Writes token caches whose tokens contain the cache's and the example's number."""

  def write(*infos, weights=(1, 3), count=5):
    for index, (name, changed) in enumerate(zip('ab', infos)):
      info = {'codebook_size': 64, 'image_tokens': 4, 'tokenizer': 'f' * 16, **changed}
      examples = [
        (f'woman {number}', np.full(info['image_tokens'], 10 * index + number))
        for number in range(count)
      ]
      folder = tmp_path / f'{name}{len(list(tmp_path.iterdir()))}'
      token_cache.write_token_cache(str(folder), examples, info)
      gin.parse_config(f"token_cache_{name}/token_cache.path = '{folder}'")
    gin.parse_config(f'mixture.sources = {dict(zip(("token_cache_a", "token_cache_b"), weights))}')

  return write


def test_token_caches(caches):
  caches({}, {})
  batches = Batches('mixture_tokens', 'train', 4, TOKENS, training=True)
  for _ in range(6):
    found = next(batches)['decoder_target_tokens'][:, 0]
    assert sorted(found // 10) == [0, 1, 1, 1]
  assert batches.fingerprints['tokenizer'].value == 'f' * 16
  assert mixtures.vocabulary_sizes('mixture_tokens')['targets'] == 64
  gin.parse_config('token_cache_b/token_cache.path = None')
  with pytest.raises(
    UserError,
    match='--gin.token_cache_b/token_cache.path=',
  ):
    Batches('mixture_tokens', 'train', 4, TOKENS)
  gin.parse_config("mixture.sources = {'token_cache_a': 1, 'folder_b': 1}")
  with pytest.raises(UserError, match='folder_b .*tokens.*mixture_tokens'):
    Batches('mixture_tokens', 'train', 4, TOKENS)


@pytest.mark.parametrize(
  'other, message',
  [
    ({'tokenizer': 'e' * 16}, 'mixture.sources: .*/a0.*/b1'),
    ({'codebook_size': 65}, '/a0 .*codebook_size 64.*/b1 65'),
    ({'image_tokens': 5}, '/a0 .*image_tokens 4.*/b1 5'),
  ],
)
def test_incompatible_token_caches(caches, other, message):
  caches({}, other)
  with pytest.raises(UserError, match=message):
    Batches('mixture_tokens', 'train', 4, TOKENS)

"""Batches: order, epochs, resuming, sharing among processes, dropped text, errors."""

import collections
import json
import re

import gin
import numpy as np
import pytest

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.data import share
from parti_jax.data.batches import Batches

IMAGES = {'images': 8}
PAIRS = {'inputs': 16, 'images': 8}


def _numbers(batch):
  return batch['images'][:, 0, 0, 0].tolist()


def _assert_equal(batch, other):
  assert set(batch) == set(other)
  for name in batch:
    np.testing.assert_array_equal(batch[name], other[name])


def test_features(numbered):
  numbered(3)
  batch = next(Batches('folder_pairs', 'train', 2, PAIRS))
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    'images': ((2, 8, 8, 3), np.uint8),
    'encoder_input_tokens': ((2, 16), np.int32),
  }


def test_all_examples_once_per_epoch_and_nothing_dropped(numbered):
  numbered(10)
  batches = Batches('folder_images', 'train', 4, IMAGES, seed=1)
  read = [_numbers(next(batches)) for _ in range(10)]
  assert all(len(numbers) == 4 for numbers in read)
  stream = sum(read, [])
  epochs = [stream[i : i + 10] for i in range(0, 40, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4
  assert batches.state() == {
    'version': 2,
    'epoch': 3,
    'taken': 10,
    'lost': 0,
    'stream': {'position': 40},
    'skipped': {},
    'shortened': {},
    'reads': {'task': 'folder_images', 'split': 'train', 'train.seed': 1, 'examples': 10},
  }


def test_last_batch_may_be_short(numbered):
  numbered(5)
  batches = Batches('folder_images', 'train', 4, IMAGES, num_epochs=2, shuffle=False)
  assert [_numbers(batch) for batch in batches] == [[0, 1, 2, 3], [4, 0, 1, 2], [3, 4]]
  assert next(batches, None) is None


def test_seed_determines_the_order(numbered):
  numbered(12)
  first, same, other = (
    [next(batches) for _ in range(4)]
    for batches in (Batches('folder_pairs', 'train', 5, PAIRS, seed=seed) for seed in (1, 1, 2))
  )
  for batch, again in zip(first, same):
    _assert_equal(batch, again)
  assert [_numbers(batch) for batch in first] != [_numbers(batch) for batch in other]


@pytest.mark.parametrize('taken', range(6))
def test_resumes_as_if_uninterrupted(numbered, taken):
  numbered(7)
  gin.parse_config('drop_text.rate = 0.5')
  uninterrupted = Batches('folder_pairs', 'train', 3, PAIRS, seed=5, training=True)
  for _ in range(taken):
    next(uninterrupted)
  state = json.loads(json.dumps(uninterrupted.state()))
  resumed = Batches('folder_pairs', 'train', 3, PAIRS, seed=5, training=True)
  next(resumed)
  resumed.restore(state)
  for _ in range(4):
    _assert_equal(next(uninterrupted), next(resumed))
  assert uninterrupted.state() == resumed.state()


@pytest.mark.parametrize('shuffle', [True, False])
def test_shares_of_an_epoch(numbered, shuffle):
  numbered(11)
  read = []
  for index in range(3):
    batches = Batches(
      'folder_images',
      'train',
      2,
      IMAGES,
      seed=4,
      shuffle=shuffle,
      num_epochs=1,
      share=index,
      shares=3,
    )
    read.append(sum((_numbers(batch) for batch in batches), []))
  assert sorted(sum(read, [])) == list(range(11))
  assert all(3 <= len(numbers) <= 4 for numbers in read)


def test_text_is_dropped_for_a_tenth_by_default(numbered):
  numbered(200)
  batches = Batches('folder_pairs', 'train', 200, PAIRS, training=True)
  empty = [(next(batches)['encoder_input_tokens'][:, 0] == 1).sum() for _ in range(3)]
  assert 35 <= sum(empty) <= 85


def test_text_is_dropped_at_the_rate(numbered):
  numbered(200)
  gin.parse_config('drop_text.rate = 0.3')
  dropped = collections.Counter()
  batches = Batches('folder_pairs', 'train', 200, PAIRS, training=True)
  for _ in range(3):
    batch = next(batches)
    empty = (batch['encoder_input_tokens'] == [1] + [0] * 15).all(1)
    assert 35 <= empty.sum() <= 85
    dropped.update(np.asarray(_numbers(batch))[empty].tolist())
  # Another third in each epoch: most pictures keep their text at least once.
  assert len(dropped) > 90


@pytest.mark.parametrize('split', ['train', 'train2017', 'validation', 'test'])
@pytest.mark.parametrize('training', [True, False])
def test_text_is_dropped_in_training_regardless_of_the_split(numbered, split, training):
  numbered(20)
  gin.parse_config(f"folder.splits = {{'{split}': 'captions.jsonl'}}\ndrop_text.rate = 1.0")
  batch = next(Batches('folder_pairs', split, 20, PAIRS, training=training))
  empty = (batch['encoder_input_tokens'] == [1] + [0] * 15).all(1)
  assert empty.all() if training else not empty.any()


@pytest.mark.parametrize('rate', [-0.1, 1.1, float('nan'), '0.1', None, True])
def test_invalid_rates(numbered, rate):
  numbered(2)
  with gin.unlock_config():
    gin.bind_parameter('drop_text.rate', rate)
  with pytest.raises(UserError, match=re.escape(f'drop_text.rate={rate!r}')):
    Batches('folder_pairs', 'train', 2, PAIRS)


def test_long_captions_are_counted(numbered, caplog):
  numbered(4)
  batches = Batches('folder_pairs', 'train', 4, {'inputs': 2, 'images': 8}, num_epochs=1)
  (batch,) = batches
  assert (batch['encoder_input_tokens'][:, 1] == 1).all()
  assert batches.shortened == {'caption cut to 2 tokens': 4} and not batches.skipped
  assert '4 caption cut to 2 tokens' in caplog.text


def _with_bad_examples(folder, encode):
  """Twelve examples: four have a bad picture and one has no caption."""
  folder(
    [
      ('' if i == 7 else f'words {i}', b'bad' if i % 3 == 1 else encode((i, 0, 0)))
      for i in range(12)
    ]
  )


@pytest.mark.parametrize('taken', [0, 1, 3, 4, 6])
def test_skipped_counts_are_exact_at_all_positions(folder, encode, taken):
  _with_bad_examples(folder, encode)
  gin.parse_config('drop_text.rate = 0.5')
  arguments = ('folder_pairs', 'train', 2, {'inputs': 3, 'images': 8})
  uninterrupted = Batches(*arguments, seed=2)
  for _ in range(taken):
    next(uninterrupted)
  state = json.loads(json.dumps(uninterrupted.state()))
  resumed = Batches(*arguments, seed=2)
  resumed.restore(state)
  assert resumed.state() == state
  for _ in range(6):
    _assert_equal(next(resumed), next(uninterrupted))
    assert resumed.state() == uninterrupted.state()
    assert resumed.skipped == uninterrupted.skipped
    assert resumed.shortened == uninterrupted.shortened
  assert sum(resumed.skipped.values()) >= 4


def test_resuming_decodes_no_earlier_example(folder, encode, monkeypatch):
  _with_bad_examples(folder, encode)
  before = Batches('folder_pairs', 'train', 2, PAIRS, num_epochs=1)
  for _ in range(3):
    next(before)
  place = before.state()
  list(before)  # It must not decode ahead while it is counted.
  decoded, decode = [], image_decoding.decode_and_note
  monkeypatch.setattr(
    image_decoding,
    'decode_and_note',
    lambda *args, **kwargs: decoded.append(1) or decode(*args, **kwargs),
  )
  resumed = Batches('folder_pairs', 'train', 2, PAIRS, num_epochs=1)
  list(resumed)
  whole = len(decoded)
  decoded.clear()
  resumed.restore(place)
  rest = list(resumed)
  assert whole == 11 and len(decoded) <= 6 and len(rest) >= 1
  assert resumed.skipped == {'unknown picture format': 3, 'no caption': 1}


def test_a_state_of_an_older_version_is_refused_with_a_way_to_continue(numbered):
  numbered(5)
  batches = Batches('folder_images', 'train', 2, IMAGES)
  for old in ({'epoch': 0, 'taken': 4}, {'epoch': 0, 'taken': 4, 'read': 5, 'skipped': {}}):
    with pytest.raises(UserError, match='train.restart_data=True'):
      batches.restore(old)


def test_resuming_takes_no_longer_far_from_the_beginning(numbered, monkeypatch):
  numbered(7)
  read = []
  open_file = storage.open_file
  monkeypatch.setattr(
    storage, 'open_file', lambda path, *a: read.append(path) or open_file(path, *a)
  )
  settings = share.Settings(0, 0, 1)
  batches = Batches('folder_images', 'train', 2, IMAGES, settings=settings)
  del read[:]
  batches.seek(10**7, 3)
  first = next(batches)
  assert len(read) <= 4 and batches.place == (10**7, 5)
  again = Batches('folder_images', 'train', 2, IMAGES)
  again.seek(10**7, 0)
  assert (
    _numbers(first)
    == (_numbers(next(again)) + _numbers(next(again)))[3:] + _numbers(next(again))[:1]
  )


def test_nothing_is_read_once_closed(numbered):
  numbered(5)
  with Batches('folder_images', 'train', 2, IMAGES) as batches:
    next(batches)
    state = batches.state()
  assert batches.state() == state
  batches.restore(state)
  next(batches)
  batches.close()
  batches.close()


@pytest.mark.parametrize('threads', [0, 2])
def test_errors_while_reading_pass_through(numbered, monkeypatch, threads):
  numbered(5)
  gin.parse_config(f'loader.num_threads = {threads}')
  monkeypatch.setattr(image_decoding, 'decode_and_note', lambda *_, **__: 1 // 0)
  with pytest.raises(ZeroDivisionError):
    next(Batches('folder_images', 'train', 2, IMAGES))

  def decode(*_, **__):
    raise UserError('s3://bucket/a.png cannot be read: no credentials')

  monkeypatch.setattr(image_decoding, 'decode_and_note', decode)
  with pytest.raises(UserError, match='^s3://bucket/a.png cannot be read: no credentials$'):
    next(Batches('folder_images', 'train', 2, IMAGES))


@pytest.mark.parametrize('values', [(0, 0, 1), (3, 0, 1), (3, 0, 64), (1, 2, 8)])
def test_threads_and_processes_change_nothing(folder, encode, values):
  _with_bad_examples(folder, encode)
  gin.parse_config('drop_text.rate = 0.5')
  read = lambda settings: Batches(
    'folder_pairs', 'train', 4, PAIRS, seed=3, training=True, settings=settings
  )
  with read(share.Settings(0, 0, 1)) as expected, read(share.Settings(*values)) as found:
    for _ in range(6):
      _assert_equal(next(found), next(expected))
      assert found.state() == expected.state()


@pytest.mark.parametrize(
  'lengths, message',
  [
    ({'inputs': 8}, "folder_images .* images.* inputs; .* train.task = 'texts'$"),
    ({'inputs': 8, 'targets': 4}, "train.task = 'cached_tokens'$"),
    ({}, 'folder_images .* images.* none$'),
    ({'images': 0}, r"feature_lengths\['images'\] = 0"),
    ({'images': 8.0}, r"feature_lengths\['images'\] = 8\.0"),
  ],
)
def test_lengths_that_do_not_fit(numbered, lengths, message):
  numbered(1)
  with pytest.raises(UserError, match=message):
    Batches('folder_images', 'train', 1, lengths)


def test_batch_size(numbered):
  numbered(1)
  with pytest.raises(UserError, match='batch.* 0'):
    Batches('folder_images', 'train', 0, IMAGES)


@pytest.mark.parametrize('good, told', [(3, True), (5, False)])
def test_a_mostly_damaged_source_is_reported_as_an_error(folder, encode, caplog, good, told):
  folder([('words', encode((i, 0, 0)) if i < good else b'bad') for i in range(good + 4)])
  with caplog.at_level('ERROR', logger='absl'):
    list(Batches('folder_images', 'train', 1, IMAGES, num_epochs=1))
  loud = [line for line in caplog.messages if re.search(rf'\b4 .*\b{good + 4}\b', line)]
  assert bool(loud) == told

"""Shares of global batches: the same examples for any readers and any resuming."""

import json

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import datasets
from parti_jax.data.shared_batches import SharedBatches

IMAGES = {'images': 8}


def _open(rows=None, shares=4, batch_size=8, processes=1, seed=5, restart=False):
  return SharedBatches(
    'folder_images', 'train', batch_size, IMAGES, shares, processes, rows, seed, restart
  )


def _numbers(batch):
  return batch['images'][:, 0, 0, 0].tolist()


@pytest.mark.parametrize(
  'rows',
  [
    [[0, 1, 6, 7], [2, 3, 4, 5]],  # Not contiguous on the mesh.
    [[0, 1, 2], [3, 4], [4, 5, 6]],  # Shares that two processes read in part, rows that both need.
  ],
)
def test_global_batches_do_not_depend_on_the_processes(numbered, rows):
  numbered(23)
  alone, several = _open(), [_open(list(held)) for held in rows]
  for _ in range(7):
    whole = _numbers(next(alone))
    for held, batches in zip(rows, several):
      assert _numbers(next(batches)) == [whole[row] for row in held]


def test_each_share_supplies_its_own_rows(numbered):
  numbered(16)
  batches = _open()
  epoch = np.array([_numbers(next(batches)) for _ in range(2)])
  shares = [set(epoch[:, 2 * share : 2 * share + 2].ravel().tolist()) for share in range(4)]
  assert [len(share) for share in shares] == [4] * 4
  assert set.union(*shares) == set(range(16))


def test_resumed_by_other_processes(numbered):
  numbered(23)
  before = _open()
  for _ in range(4):
    next(before)
  state = json.loads(json.dumps(before.state()))
  # The shares have 6, 6, 6 and 5 examples, and 8 of each have been taken.
  reads = {'task': 'folder_images', 'split': 'train', 'train.seed': 5, 'examples': 23}
  assert state == {
    'shares': [
      {
        'version': 2,
        'epoch': 1,
        'taken': taken,
        'lost': 0,
        'stream': {'position': 8},
        'reads': reads,
        'skipped': {},
        'shortened': {},
      }
      for taken in (2, 2, 2, 3)
    ]
  }
  # None: as many shares as the checkpoint has, regardless of the current number of processes.
  resumed = [_open(list(range(start, start + 4)), None, processes=2) for start in (0, 4)]
  for batches in resumed:
    next(batches)
    batches.restore(state)
  for _ in range(4):
    assert _numbers(next(before)) == _numbers(next(resumed[0])) + _numbers(next(resumed[1]))


def test_a_checkpoint_of_another_program_has_no_position(numbered):
  numbered(8)
  fresh, restored = _open(shares=None, processes=2), _open(shares=None, processes=2)
  restored.restore({'from_t5x': 'checkpoint_7'})
  assert restored.shares == 2
  assert _numbers(next(restored)) == _numbers(next(fresh))


@pytest.mark.parametrize(
  'old', [{'epoch': 1, 'taken': 4}, {'places': [[0, 4]], 'shares': [{'read': 4, 'skipped': {}}]}]
)
def test_a_position_of_an_older_version_is_refused_or_ignored(numbered, old):
  numbered(8)
  with pytest.raises(UserError, match='train.restart_data=True'):
    _open(shares=None).restore(old)
  fresh, restarted = _open(shares=None), _open(shares=None, restart=True)
  restarted.restore(old)
  assert _numbers(next(restarted)) == _numbers(next(fresh))


def test_a_batch_may_have_grown_since(numbered):
  numbered(40)
  before = _open()
  next(before)
  resumed = _open(batch_size=16)
  resumed.restore(before.state())
  grown, twice = _numbers(next(resumed)), [_numbers(next(before)) for _ in range(2)]
  assert grown[:4] == twice[0][:2] + twice[1][:2]


def test_shares_that_do_not_fit(numbered):
  numbered(8)
  with pytest.raises(UserError, match='train.batch_size=8 .*train.data_shares=3'):
    _open(shares=3)
  with pytest.raises(UserError, match='train.batch_size=8 .*train.data_shares=3'):
    _open(shares=None, processes=3)
  with pytest.raises(UserError, match='train.data_shares=2.* 4 .*--model_dir'):
    _open(shares=2).restore({'shares': [{}] * 4})


def test_the_vocabulary_is_known_by_its_fingerprint(numbered):
  numbered(4)
  pairs = SharedBatches('folder_pairs', 'train', 2, {'inputs': 8, **IMAGES})
  found = pairs.fingerprints
  assert found['vocabulary'].value == datasets.get_vocabulary().fingerprint
  assert found['vocabulary'].name == f'vocabulary.path={datasets.get_vocabulary().path!r}'
  assert found['tokenizer'] is None


def test_a_share_without_examples_is_an_error(numbered):
  numbered(3)
  with pytest.raises(UserError, match='4 of 4 .*train.data_shares.*folder'):
    next(_open())


def test_skipped_examples_of_all_shares_are_counted(folder, encode):
  folder([('a', encode((i, 0, 0)) if i % 2 else b'bad') for i in range(8)])
  batches = _open(shares=2, batch_size=4)
  for _ in range(2):
    next(batches)
  # Each share has bad ones, and has been read at least once.
  assert batches.skipped['unknown picture format'] >= 4

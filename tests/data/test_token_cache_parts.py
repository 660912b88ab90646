"""A split that several processes write part by part, and that may be killed at any time."""

import json
import pathlib
import threading

import numpy as np
import pytest

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.data import token_cache_parts

INFO = {'codebook_size': 100, 'image_tokens': 4, 'tokenizer': 'abc', 'views': 1}
MADE_WITH = {'dtype': 'float32', 'files': ['a', 'b']}
# Examples of each part; the third has none.
EXAMPLES = (3, 2, 0, 4)


def _parts(folder, split='train', info=INFO, made_with=MADE_WITH, replaced=()):
  return token_cache_parts.SplitParts(str(folder), split, info, made_with, len(EXAMPLES), replaced)


def _write(parts, indices, add=0):
  for index in indices:
    records = (
      token_cache.serialized(
        f'{index} {number}', np.full(4, 10 * index + number + add), parts._info
      )
      for number in range(EXAMPLES[index])
    )
    parts.write(index, records, {'skipped': {'no caption': 1} if index else {}, 'shortened': {}})


def _begin(parts, overwrite=False):
  found = parts.check(overwrite)
  if found:
    parts.begin()
  else:
    parts.clean()
  return found


def _go_on(parts, add=0):
  """Does the work of a single process."""
  if _begin(parts):
    _write(parts, parts.unfinished(range(len(EXAMPLES))), add)
    while not parts.merge():
      _write(parts, parts.left(), add)


def _content(folder):
  """Returns {path within a folder: bytes}, on a disk or in a store, without unfinished files."""
  return {
    name: storage.read(storage.join(folder, name), 2**30)
    for name in storage.sizes(folder)
    if not name.endswith('.unfinished')
  }


@pytest.fixture(name='whole', scope='module')
def _whole(tmp_path_factory):
  """The result of one undisturbed process."""
  folder = tmp_path_factory.mktemp('whole')
  _go_on(_parts(folder))
  return _content(folder)


def test_parts_of_a_release_without_the_grid_are_kept(tmp_path):
  before = _parts(tmp_path)
  _begin(before)
  _write(before, [0, 1])
  after = _parts(tmp_path, info={**INFO, 'grid': [2, 2]})
  assert _begin(after) and after.unfinished(range(len(EXAMPLES))) == [2, 3]
  _go_on(after)
  assert token_cache_info.read_info(str(tmp_path))['grid'] == [2, 2]


def test_the_split(whole, tmp_path):
  assert sorted(whole) == ['info.json', *(f'train-0000{i}.array_record' for i in range(3))]
  for name, content in whole.items():
    (tmp_path / name).write_bytes(content)
  info = token_cache_info.read_info(str(tmp_path))
  assert info['splits']['train']['skipped'] == {'no caption': 3}
  assert info['splits']['train']['examples'] == 9
  found = token_cache.TokenCacheSource(str(tmp_path)).open('train').read(range(9))
  assert [example['caption'].decode() for example in found] == [
    f'{part} {number}' for part in range(4) for number in range(EXAMPLES[part])
  ]
  assert [example['tokens'][0] for example in found] == [0, 1, 2, 10, 11, 30, 31, 32, 33]
  assert not list(token_cache.TokenCacheSource(str(tmp_path)).damaged_shards('train'))


@pytest.mark.parametrize('order', [(3, 1, 2, 0), (0, 2, 1, 3)])
def test_any_order_and_any_number_of_processes(whole, tmp_path, order):
  for index in order:
    parts = _parts(tmp_path)  # Simulates a separate process.
    assert _begin(parts)
    assert parts.left() == [i for i in range(4) if i not in order[: order.index(index)]]
    _write(parts, parts.unfinished([index]))
  assert parts.left() == [] and parts.merge()
  assert _content(tmp_path) == whole
  assert not _begin(_parts(tmp_path))
  assert parts.summary() == {'examples': 9, 'skipped': {'no caption': 3}, 'shortened': {}}


class Killed(BaseException):
  pass


# Everything that changes the disk or the store.
STEPS = [(storage, name) for name in ('create', 'write', 'move', 'remove', 'remove_folder')] + [
  (token_cache, 'write_shard'),
  (token_cache_info, 'remove_folder'),
]


def _at_step(monkeypatch, number, act, after):
  """Calls `act` once, before or after the `number`-th step; returns the count of steps."""
  count = [0]

  def wrapped(function):

    def step(*arguments, **keywords):
      count[0] += 1
      here = count[0] == number
      if here and not after:
        act()
      found = function(*arguments, **keywords)
      if here and after:
        act()
      return found

    return step

  for module, name in STEPS:
    monkeypatch.setattr(module, name, wrapped(getattr(module, name)))
  # A lock whose holder was killed.
  monkeypatch.setattr(token_cache_info, '_LOCK_SECONDS', 0.05)
  monkeypatch.setattr(token_cache_info, '_LOCK_LOOK', 0.03)
  # In the order of the shards, so that the steps are ordered.
  monkeypatch.setattr(token_cache_info, '_MOVES_AT_ONCE', 1)
  return count


def _kill():
  raise Killed


@pytest.mark.parametrize('after', [False, True])
@pytest.mark.parametrize('replaces', [False, True])
def test_killed_at_any_step(whole, tmp_path, monkeypatch, after, replaces):
  number = steps = 0
  while number <= steps:
    number += 1
    folder = tmp_path / str(number)
    if replaces:
      token_cache.write_token_cache(
        str(folder), [(f'old {i}', np.full(4, 99)) for i in range(9)], INFO
      )
    with monkeypatch.context() as patch:
      count = _at_step(patch, number, _kill, after)
      try:
        parts = _parts(folder)
        _begin(parts, overwrite=True)
        _write(parts, parts.unfinished(range(4)))
        parts.merge()
      except Killed:
        # Never a mixture: the old split, the new one, or none.
        if (folder / 'info.json').exists():
          splits = token_cache_info.read_info(str(folder))['splits']
          if 'train' in splits:
            new = 'made_with' in splits['train']
            source = token_cache.TokenCacheSource(str(folder))
            assert not list(source.damaged_shards('train'))
            captions = [e['caption'] for e in source.open('train').read(range(9))]
            assert all(caption.startswith(b'old') != new for caption in captions)
      steps = max(steps, count[0])
    with monkeypatch.context() as patch:
      _at_step(patch, 0, _kill, after)
      parts = _parts(folder)
      if _begin(parts, overwrite=True):
        _write(parts, parts.unfinished(range(4)))
        assert parts.merge()
    # A process killed after its last change may leave its lock; the next one takes it.
    assert {
      name: content for name, content in _content(folder).items() if name != '.info.lock'
    } == whole, number
  assert steps > 10


def test_several_merge_at_once(whole, tmp_path, monkeypatch):
  """At each step of one merging process, another one does the complete merge."""
  number = steps = 0
  while number <= steps:
    number += 1
    folder = tmp_path / str(number)
    first, second = _parts(folder), _parts(folder)
    _begin(first)
    _write(first, range(4))
    with monkeypatch.context() as patch:
      count = _at_step(patch, number, second.merge, after=bool(number % 2))
      assert first.merge()
      steps = max(steps, count[0])
    assert _content(folder) == whole
  assert steps > 4


def test_two_commands_that_write_two_splits_at_once(whole, tmp_path, monkeypatch):
  number = steps = 0
  while number <= steps:
    number += 1
    folder = tmp_path / str(number)
    first, second = _parts(folder), _parts(folder, 'validation')
    for parts in (first, second):
      _begin(parts)
      _write(parts, range(4))
    other = threading.Thread(target=second.merge)

    def begin_other(other=other):
      other.start()
      other.join(0.3)  # Until it is done or waits.

    with monkeypatch.context() as patch:
      count = _at_step(patch, number, begin_other, after=False)
      patch.setattr(token_cache_info, '_LOCK_SECONDS', 60)
      assert first.merge()
      if number <= count[0]:
        other.join(60)
        steps = max(steps, number)
    if number <= steps:
      splits = token_cache_info.read_info(str(folder))['splits']
      assert splits['train'] == splits['validation'] and first.finished() and second.finished()
  assert steps > 4


@pytest.mark.parametrize(
  'damage',
  [
    lambda path: path.write_text(''),
    lambda path: path.write_text('{"part": 1}'),
    lambda path: path.write_text('[]'),
    lambda path: path.unlink(),
    lambda path: path.write_text(path.read_text().replace('"part": 1', '"part": 3')),
    lambda path: path.write_text(path.read_text().replace('"examples": 2', '"examples": -2')),
    lambda path: path.with_suffix('.array_record').unlink(),
    lambda path: path.with_suffix('.array_record').write_bytes(b'cut'),
  ],
)
@pytest.mark.parametrize('all_written', [False, True])
def test_a_damaged_part_is_written_again(whole, tmp_path, damage, all_written):
  parts = _parts(tmp_path)
  _begin(parts)
  _write(parts, range(4 if all_written else 3))
  (path,) = tmp_path.glob('.train.parts/*-00001.json')
  damage(path)
  if all_written and not path.exists():
    assert parts.left() == [1]
  if all_written:  # Another process wrote it.
    assert not parts.merge()
    assert parts.left() == [1]
  else:
    assert parts.unfinished(range(4)) == [1, 3]
  _go_on(_parts(tmp_path))
  assert _content(tmp_path) == whole


def test_a_shard_of_another_split_is_not_mistaken_for_a_part(whole, tmp_path):
  """All shards have the same size."""
  token_cache.write_token_cache(str(tmp_path), [('old', np.full(4, 99))], INFO)
  parts = _parts(tmp_path)
  _begin(parts, overwrite=True)
  _write(parts, range(4))
  (lost,) = tmp_path.glob('.train.parts/*-00000.array_record')
  lost.unlink()
  assert not parts.merge() and parts.left() == [0]
  _write(parts, [0])
  assert parts.merge() and _content(tmp_path) == whole


OTHERS = [
  ({**INFO, 'tokenizer': 'xyz'}, MADE_WITH, 'tokenizer abc.* xyz'),
  ({**INFO, 'views': 2}, MADE_WITH, 'views 1.* 2'),
  (INFO, {**MADE_WITH, 'dtype': 'bfloat16'}, 'dtype float32.* bfloat16'),
  (INFO, {**MADE_WITH, 'files': ['a']}, r"files \['a', 'b'\].*\['a'\]"),
]


@pytest.mark.parametrize('info, made_with, message', OTHERS)
@pytest.mark.parametrize('finished', [False, True])
def test_splits_made_differently_are_refused(tmp_path, info, made_with, message, finished):
  parts = _parts(tmp_path)
  _begin(parts)
  _write(parts, range(4 if finished else 2))
  if finished:
    parts.merge()
  before = _content(tmp_path)
  other = _parts(tmp_path, info=info, made_with=made_with)
  with pytest.raises(UserError, match=f"{tmp_path} .*'train'.*{message}.*--overwrite"):
    other.check(False)
  assert _content(tmp_path) == before


@pytest.mark.parametrize(
  'info, made_with', [other[:2] for other in OTHERS if other[0]['views'] == 1]
)  # Like the examples here.
@pytest.mark.parametrize('finished', [False, True])
def test_overwrite_starts_over(tmp_path, info, made_with, finished):
  parts = _parts(tmp_path / 'a')
  _begin(parts)
  _write(parts, range(4 if finished else 2), add=50)
  if finished:
    parts.merge()
  for folder in ('a', 'b'):
    other = _parts(tmp_path / folder, info=info, made_with=made_with)
    assert _begin(other, overwrite=True)
    assert other.unfinished(range(4)) == [0, 1, 2, 3]
    _write(other, range(4))
    assert other.merge()
  assert _content(tmp_path / 'a') == _content(tmp_path / 'b')


def test_processes_that_write_other_tokens_at_once_are_refused(tmp_path):
  first = _parts(tmp_path)
  _begin(first)
  _write(first, [0])
  second = _parts(tmp_path, made_with={**MADE_WITH, 'dtype': 'bfloat16'})
  _begin(second, overwrite=True)
  with pytest.raises(UserError, match="'train'.*dtype bfloat16.* float32"):
    _write(first, [1])
  assert second.left() == [0, 1, 2, 3]


def test_other_splits_stay_unless_they_use_another_tokenizer(tmp_path):
  _go_on(_parts(tmp_path))
  _go_on(_parts(tmp_path, 'validation'))
  splits = token_cache_info.read_info(str(tmp_path))['splits']
  assert list(splits) == ['train', 'validation']
  assert splits['train'] == splits['validation']
  other = {**INFO, 'tokenizer': 'xyz'}
  with pytest.raises(UserError, match='validation.*tokenizer abc.* xyz'):
    _begin(_parts(tmp_path, info=other), overwrite=True)
  both = [
    _parts(tmp_path, split, other, replaced=('train', 'validation'))
    for split in ('train', 'validation')
  ]
  for parts in both:
    assert _begin(parts, overwrite=True)
    _write(parts, range(4))
    assert parts.merge()
    info = token_cache_info.read_info(str(tmp_path))
    assert info['tokenizer'] == 'xyz'
  assert list(info['splits']) == ['train', 'validation']


def test_a_finished_split_that_lost_a_shard_is_made_again(whole, tmp_path):
  _go_on(_parts(tmp_path))
  (tmp_path / 'train-00001.array_record').unlink()
  _go_on(_parts(tmp_path))
  assert _content(tmp_path) == whole


def test_no_example_in_any_part(tmp_path):
  parts = _parts(tmp_path)
  _begin(parts)
  for index in range(4):
    parts.write(index, [], {'skipped': {'no caption': 2}, 'shortened': {}})
  with pytest.raises(UserError, match="'train'.*8 no caption"):
    parts.merge()


def test_a_folder_that_cannot_be_written(tmp_path):
  (tmp_path / '.train.parts').write_text('')
  with pytest.raises(UserError, match=f'{tmp_path} .*: '):
    _begin(_parts(tmp_path))


@pytest.mark.parametrize('kind', ['s3', 'gs'])
def test_to_a_store(whole, request, kind):
  folder = request.getfixturevalue(f'{kind}_bucket') + '/parts'
  first = _parts(folder)
  assert _begin(first)
  _write(first, [1, 2])
  second = _parts(folder)
  assert _begin(second) and second.unfinished([0, 1]) == [0]
  _write(second, [0, 3])
  assert second.merge() and first.merge()  # The other one finds it done.
  assert _content(folder) == whole
  assert not _begin(_parts(folder))


def test_killed_while_shards_are_moved_in_a_store(whole, s3_bucket, monkeypatch):
  folder = s3_bucket + '/moved'
  parts = _parts(folder)
  _begin(parts)
  _write(parts, range(4))
  with monkeypatch.context() as patch:
    move, moved = storage.move, []

    def one_is_moved(path, target):
      if moved:
        raise Killed
      moved.append(target)
      move(path, target)

    patch.setattr(storage, 'move', one_is_moved)
    patch.setattr(token_cache_info, '_MOVES_AT_ONCE', 1)
    with pytest.raises(Killed):
      parts.merge()
  _go_on(_parts(folder))
  assert _content(folder) == whole


def test_names_of_parts_depend_on_their_inputs(tmp_path):
  parts = _parts(tmp_path)
  _begin(parts)
  _write(parts, [0])
  names = sorted(path.name for path in pathlib.Path(tmp_path, '.train.parts').iterdir())
  key = names[0].split('-')[0]
  assert names == [f'{key}-00000.array_record', f'{key}-00000.json', 'made_with.json']
  made_with = json.loads((tmp_path / '.train.parts' / 'made_with.json').read_text())
  assert made_with == {**INFO, **MADE_WITH, 'parts': 4}

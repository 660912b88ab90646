"""Object stores that answer 503 and 429, break connections, lose responses, or never respond."""

import gzip
import io
import os
import tarfile
import threading

import misbehaving_store
import numpy as np
import pytest

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.core import store_systems
from parti_jax.data import token_cache
from parti_jax.data.readers import tar_shards
from parti_jax.data.readers import text_lines
from parti_jax.data.readers import tfrecords

# Longer than a slow response.
FAILURES = tuple(fault for fault in misbehaving_store.FAULTS if fault != 'slow')


def _counted(before):
  return sum(store_retries.counts().values()) - sum(before.values())


def _random(count, seed=0):
  return np.random.default_rng(seed).bytes(count)


def test_all_operations_work_if_each_request_fails_at_first(bad_store, tmp_path):
  folder, before = bad_store.folder, store_retries.counts()
  bad_store.faults = misbehaving_store.first(FAILURES)
  storage.write(f'{folder}/a', b'hello')
  assert storage.read(f'{folder}/a', 9) == b'hello'
  (tmp_path / 'large').write_bytes(_random(6 * 2**20))
  storage.upload(tmp_path / 'large', f'{folder}/within/large')
  storage.download(f'{folder}/within/large', tmp_path / 'copy')
  assert (tmp_path / 'copy').read_bytes() == (tmp_path / 'large').read_bytes()
  assert storage.names(folder) == ['a', 'within']
  assert storage.sizes(folder) == {'a': 5, 'within/large': 6 * 2**20}
  assert storage.glob(f'{folder}/*/l*') == [f'{folder}/within/large']
  assert storage.exists(f'{folder}/a') and not storage.exists(f'{folder}/b')
  assert storage.is_folder(f'{folder}/within') and not storage.is_folder(f'{folder}/a')
  storage.move(f'{folder}/a', f'{folder}/c')
  storage.move_folder(f'{folder}/within', f'{folder}/moved')
  assert storage.sizes(folder) == {'c': 5, 'moved/large': 6 * 2**20}
  storage.remove(f'{folder}/c')
  storage.remove_folder(f'{folder}/moved')
  assert storage.names(folder) == []
  assert _counted(before) == sum(bad_store.sent.values()) > 20
  assert store_retries.used() and store_retries.summary()
  store_retries.begin()
  assert not store_retries.used() and not store_retries.summary()


def test_an_object_is_created_once_if_the_response_is_lost(bad_store):
  for fault in ('lost', '503', 'cut'):
    path = f'{bad_store.folder}/{fault}'
    bad_store.faults = misbehaving_store.first((fault,))
    storage.create(path, b'mine')
    assert storage.read(path, 9) == b'mine' and bad_store.sent[fault]
    if path.startswith('s3'):  # The emulator of gs:// ignores the condition.
      bad_store.faults = misbehaving_store.first((fault,))
      with pytest.raises(FileExistsError):
        storage.create(path, b'of another process')
      assert storage.read(path, 9) == b'mine'


def test_a_removal_counts_if_its_response_is_lost(bad_store):
  storage.write(f'{bad_store.folder}/a', b'')
  bad_store.faults = misbehaving_store.first(('lost',))
  storage.remove(f'{bad_store.folder}/a')
  assert bad_store.sent['lost'] and not storage.exists(f'{bad_store.folder}/a')


@pytest.mark.parametrize('bad_store', ['gs'], indirect=True)  # At s3:// Orbax uses a disk.
def test_orbax_paths_share_the_retries(bad_store):
  path = f'{bad_store.folder}/a'
  for fault in ('lost', '503', 'cut'):
    bad_store.faults = misbehaving_store.first((fault,))
    storage.as_epath(path).write_text('hello')
    assert storage.as_epath(path).read_text() == 'hello'
    storage.as_epath(path).unlink()
    assert bad_store.sent[fault] and not storage.as_epath(path).exists()


def _tar(path, packed):
  with tarfile.open(path, 'w:gz' if packed else 'w') as tar:
    for number in range(30):
      for ending, content in (('png', _random(20_000, number)), ('txt', b'caption %d' % number)):
        member = tarfile.TarInfo(f'{number:03d}.{ending}')
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))


def _tfrecord(path):
  with open(path, 'wb') as file:
    for number in range(30):
      record = _random(20_000, number)
      length = len(record).to_bytes(8, 'little')
      file.write(length + tfrecords._checksum(length) + record + tfrecords._checksum(record))


def _text(path, opened=gzip.open):
  with opened(path, 'wb') as file:
    for number in range(30):
      file.write(_random(10_000, number).hex().encode() + b'\n')


def _zstd(path):
  pyarrow = pytest.importorskip('pyarrow')
  _text(path, lambda path, _: pyarrow.CompressedOutputStream(path, 'zstd'))


_READERS = {
  'tar': (lambda path: _tar(path, False), lambda path: tar_shards.samples(path, None)),
  'tar.gz': (lambda path: _tar(path, True), lambda path: tar_shards.samples(path, None)),
  'tfrecord': (_tfrecord, tfrecords.raw),
  'txt.gz': (_text, text_lines.lines),
  'txt.zst': (_zstd, text_lines.lines),
}


@pytest.mark.parametrize('kind', _READERS)
def test_a_broken_stream_continues_at_its_position(bad_store, tmp_path, monkeypatch, kind):
  write, read = _READERS[kind]
  write(str(tmp_path / f'file.{kind}'))
  url = f'{bad_store.folder}/file.{kind}'
  storage.upload(tmp_path / f'file.{kind}', url)
  wanted = list(read(str(tmp_path / f'file.{kind}')))
  assert len(wanted) == 30 and all(isinstance(example, dict) for example in wanted)
  monkeypatch.setattr(store_systems, 'PIECE', 2**16)
  before = store_retries.counts()
  faults = misbehaving_store.every(3, ('503', 'cut', *FAILURES))
  # gcsfs asks for an object's details twice at once and cancels the request that it doesn't need,
  # which is then never repeated.
  of_content = lambda path: not path.startswith('/storage/')
  bad_store.faults = lambda method, path, count: (
    faults(method, path, count) if of_content(path) else None
  )
  assert list(read(url)) == wanted
  assert bad_store.sent['cut'] and _counted(before) == sum(bad_store.sent.values())
  # Truncated bodies that claim to be complete are detected too, since sizes are known.
  bad_store.faults = misbehaving_store.every(2, ('short',))
  assert list(read(url)) == wanted
  assert bad_store.sent['short'] and store_retries.counts()[store_retries.SHORT]


@pytest.mark.parametrize('kind', ['tar', 'txt.zst', 'tfrecord'])
def test_a_failing_store_is_not_mistaken_for_a_damaged_file(bad_store, tmp_path, monkeypatch, kind):
  write, read = _READERS[kind]
  write(str(tmp_path / 'file'))
  url = f'{bad_store.folder}/file.{kind}'
  storage.upload(tmp_path / 'file', url)
  monkeypatch.setattr(store_systems, 'PIECE', 2**16)
  monkeypatch.setenv(store_retries.SECONDS_VARIABLE, '0.2')
  examples = read(url)
  next(examples)
  bad_store.faults = lambda *_: '503'
  with pytest.raises(
    errors.UserError, match=f'file.{kind}: the store failed: .*tried [0-9]+ times'
  ):
    list(examples)


def test_a_replaced_object_is_not_read_in_part(bad_store, monkeypatch):
  path = f'{bad_store.folder}/a'
  storage.write(path, bytes(2**17))
  monkeypatch.setattr(store_systems, 'PIECE', 2**16)
  with storage.open_file(path) as file:
    file.read(2**16)
    storage.write(path, bytes(2**17 - 1) + b'1')
    with pytest.raises(store_systems.Changed, match='/a: was replaced or removed during reading'):
      file.read(2**16)
  assert storage.read(path, 2**17)[-1:] == b'1'


@pytest.mark.parametrize('fault', ['503', 'refused', 'hang'])
def test_a_dead_store_gives_one_line_in_bounded_time(bad_store, monkeypatch, fault):
  folder = bad_store.folder
  storage.write(f'{folder}/a', b'hello')
  monkeypatch.setenv(store_retries.SECONDS_VARIABLE, '0.3')
  # Timeouts belong to a file system, so a new one is needed.
  type(storage._file_system(folder)).clear_instance_cache()
  bad_store.faults = lambda *_: fault
  calls = [
    lambda: storage.read(f'{folder}/a', 9),
    lambda: storage.write(f'{folder}/a', bytes(2**22)),
    lambda: storage.exists(f'{folder}/a'),
    lambda: storage.is_folder(folder),
    lambda: storage.names(folder),
    lambda: storage.glob(f'{folder}/*/*'),
    lambda: storage.sizes(folder),
    lambda: storage.create(f'{folder}/b', b''),
    lambda: storage.remove(f'{folder}/a'),
    lambda: storage.remove_folder(folder),
  ]
  for call in calls:
    with pytest.raises(errors.UserError, match='the store (failed|does not answer|cannot be)'):
      call()
  bad_store.faults = lambda *_: None
  assert storage.read(f'{folder}/a', 9) in (b'hello', bytes(2**22))


def test_a_time_that_is_not_a_number_is_refused(monkeypatch):
  for text in ('soon', '-1', 'nan', 'inf'):
    monkeypatch.setenv(store_retries.SECONDS_VARIABLE, text)
    with pytest.raises(errors.UserError, match=f'{store_retries.SECONDS_VARIABLE}={text} is not'):
      store_retries.patience()


def test_a_store_that_never_responded_is_given_up_sooner(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(store_retries.time, 'monotonic', lambda: now[0])
  for answered, end in ((False, 10), (True, 120), (False, 10)):
    if answered:
      store_retries.answered('abc')
    attempts = store_retries.Attempts('abc', 'GET abc://b/a')
    while (delay := attempts.delay(store_retries.NO_CONNECTION, 'refused')) is not None:
      assert 0 < delay <= 10
      now[0] += delay
    assert end - 1e-6 <= now[0] <= end + 0.011  # The last delay is at least 10 ms.
    now[0] = 0.0


def test_a_long_wait_is_reported_once(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr(store_retries.time, 'monotonic', lambda: now[0])
  store_retries.answered('abc')
  attempts = store_retries.Attempts('abc', 'GET abc://b/a')
  for now[0] in range(0, 100, 2):
    attempts.delay('status 503', 'SlowDown')
  assert capsys.readouterr().err == (
    'parti-jax: GET abc://b/a: SlowDown; retrying for 120 s in total\n'
  )


def test_a_token_cache_is_the_same_from_a_bad_store(bad_store, tmp_path, monkeypatch):
  info = {'codebook_size': 8, 'image_tokens': 4, 'tokenizer': 'none'}
  examples = [(f'words {i}', (np.arange(4) + i) % 8) for i in range(50)]
  monkeypatch.setattr(token_cache, 'EXAMPLES_PER_SHARD', 20)
  token_cache.write_token_cache(str(tmp_path / 'tokens'), examples, info)
  for path in (tmp_path / 'tokens').iterdir():
    storage.upload(path, f'{bad_store.folder}/{path.name}')
  bad_store.faults = misbehaving_store.every(4)
  read = token_cache.TokenCacheSource(bad_store.folder).examples('train')
  for example, (caption, tokens) in zip(read, examples, strict=True):
    assert example['caption'].decode() == caption
    np.testing.assert_array_equal(example['tokens'], tokens)
  assert len(bad_store.sent) > 2


def test_many_open_files_need_no_threads_and_few_connections(bad_store):
  for number in range(8):
    storage.write(f'{bad_store.folder}/{number}', b'hello')
  with storage.open_file(f'{bad_store.folder}/0') as file:
    file.read()
  threads, files = threading.active_count(), len(os.listdir('/proc/self/fd'))

  def read():
    for number in range(24):
      with storage.open_file(f'{bad_store.folder}/{number % 8}') as file:
        assert file.read(3) == b'hel'  # Abandoned in the middle.

  for _ in range(3):
    reader = threading.Thread(target=read)
    reader.start()
    reader.join()
  handlers = [thread for thread in threading.enumerate() if 'process_request' in thread.name]
  assert threading.active_count() - len(handlers) <= threads
  assert len(os.listdir('/proc/self/fd')) <= files + 10

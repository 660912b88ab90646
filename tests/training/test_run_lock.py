"""Tests the lock of a run's folder."""

import json
import os
import threading

import pytest

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.runs import run_lock


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
  monkeypatch.setattr(run_lock, 'PATIENCE', 0.2)


def _owner(folder):
  return json.loads((folder / 'lock.json').read_text(encoding='utf-8'))


def _leave(folder, **facts):
  """Writes the lock of another process, which no longer updates it."""
  owner = {
    'host': 'other',
    'pid': 7,
    'since': '2026-01-01 00:00:00 UTC',
    'id': 'theirs',
    'beat': 3,
    'started': '5',
    'boot': 'another',
    'pid_namespace': 'pid:[1]',
  }
  (folder / 'lock.json').write_text(json.dumps(owner | facts), encoding='utf-8')


def _facts_of_this_machine(**facts):
  me = run_lock._this_process()
  return {key: me[key] for key in ('host', 'boot', 'pid_namespace')} | facts


def test_a_second_run_is_refused_and_the_lock_goes_with_the_first(tmp_path):
  folder = tmp_path / 'new' / 'run'
  with run_lock.RunLock(folder) as lock:
    assert lock.replaced is None and _owner(folder)['pid'] == os.getpid()
    with pytest.raises(errors.UserError, match=f'process {os.getpid()} on host .*, since 2'):
      with run_lock.RunLock(folder):
        pass
    (folder / 'config.gin').write_text('')
    lock.beat()
    assert _owner(folder)['beat'] == 2
  assert [path.name for path in folder.iterdir()] == ['config.gin']


def test_a_run_that_writes_nothing_leaves_no_folder(tmp_path):
  with pytest.raises(ZeroDivisionError):
    with run_lock.RunLock(tmp_path / 'run'):
      raise ZeroDivisionError
  assert not (tmp_path / 'run').exists()


def _start_at_once(folder, count=8):
  """Starts runs in a folder in threads; returns the acquired locks and the refusals."""
  barrier, won, refused = threading.Barrier(count), [], []

  def start():
    barrier.wait()
    try:
      won.append(run_lock.RunLock(folder).__enter__())
    except errors.UserError as error:
      refused.append(str(error))

  threads = [threading.Thread(target=start) for _ in range(count)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  for lock in won:
    lock.release()
  return won, refused


def _without_flock(monkeypatch):
  def no_flock(*_):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr(run_lock.fcntl, 'flock', no_flock)


@pytest.mark.parametrize('flock', [True, False])
def test_one_of_many_simultaneous_starts_wins(tmp_path, monkeypatch, flock):
  if not flock:
    _without_flock(monkeypatch)
  monkeypatch.setattr(run_lock, 'SETTLE', 1e6)
  _leave(
    tmp_path, **_facts_of_this_machine(pid=2**22 + 1)
  )  # All starts find the lock of a dead owner.
  won, refused = _start_at_once(tmp_path)
  assert len(won) == 1 and len(refused) == 7
  assert 'process 4194305 on host' in won[0].replaced
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('before', [None, {'pid': 2**22 + 1, 'started': '5'}])
def test_one_of_many_wins_in_an_object_store_too(s3_bucket, monkeypatch, before):
  monkeypatch.setattr(run_lock, 'SETTLE', 1e6)
  folder = f'{s3_bucket}/{"dead" if before else "new"}'
  if before:
    storage.write(f'{folder}/{run_lock.FILE}', json.dumps(_facts_of_this_machine(**before)))
  won, refused = _start_at_once(folder, 4)
  assert len(won) == 1 and len(refused) == 3
  assert (won[0].replaced or '').startswith('process 4194305 on host') == bool(before)
  assert storage.names(folder) == []


def test_the_condition_of_exclusive_creation_is_sent_to_gs(gs_bucket, monkeypatch):
  kind = type(storage._file_system(gs_bucket))
  sent, call = [], kind._call

  async def recorded(system, method, *args, **kwargs):
    if method == 'POST':
      sent.append(kwargs.get('ifGenerationMatch'))
    return await call(system, method, *args, **kwargs)

  monkeypatch.setattr(kind, '_call', recorded)
  storage.create(f'{gs_bucket}/claims/new', b'{}')
  assert sent == ['0']
  with pytest.raises(FileExistsError):
    storage.create(f'{gs_bucket}/claims/new', b'{"other": 1}')


def test_a_store_that_ignores_the_condition_has_its_lock_read_again(gs_bucket, monkeypatch):
  monkeypatch.setattr(storage, 'create', lambda path, content: storage.write(path, content))
  slept = []
  monkeypatch.setattr(run_lock.time, 'sleep', slept.append)
  with run_lock.RunLock(f'{gs_bucket}/run'):
    assert storage.names(f'{gs_bucket}/run') == [run_lock.FILE]
  assert slept == [run_lock.SETTLE]


def test_a_claim_expires_like_a_lock(tmp_path, monkeypatch):
  _without_flock(monkeypatch)
  monkeypatch.setattr(run_lock, '_GUARD_TRIES', 1)
  claim = tmp_path / 'lock.json.claim'
  for dead in (
    _facts_of_this_machine(pid=2**22 + 1, started='5'),
    {'id': 'theirs', 'host': 'other'},
  ):
    claim.write_text(json.dumps(dead))
    with run_lock.RunLock(tmp_path):
      assert _owner(tmp_path)['pid'] == os.getpid() and not claim.exists()
  parent = os.getppid()
  alive = _facts_of_this_machine(pid=parent, started=run_lock._started(parent))
  claim.write_text(json.dumps(alive))
  with pytest.raises(errors.UserError, match='another run is starting in this folder'):
    with run_lock.RunLock(tmp_path):
      pass
  assert json.loads(claim.read_text()) == alive


@pytest.mark.parametrize('facts', [{'pid': 2**22 + 1}, {'pid': 1, 'started': 'before'}])
def test_a_dead_process_of_this_machine_is_replaced_at_once(tmp_path, monkeypatch, facts):
  monkeypatch.setattr(run_lock, 'PATIENCE', 1e6)
  _leave(tmp_path, **_facts_of_this_machine(**facts))
  with run_lock.RunLock(tmp_path) as lock:
    assert lock.replaced == (
      f'process {facts["pid"]} on host {_owner(tmp_path)["host"]}, since 2026-01-01 00:00:00 UTC'
    )


def test_a_live_process_of_this_machine_is_not_replaced(tmp_path):
  parent = os.getppid()
  _leave(tmp_path, **_facts_of_this_machine(pid=parent, started=run_lock._started(parent)))
  before = _owner(tmp_path)
  with pytest.raises(errors.UserError, match=f'process {parent} on host'):
    with run_lock.RunLock(tmp_path):
      pass
  assert _owner(tmp_path) == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('content', ['', '[1]'])
def test_a_broken_lock_is_replaced_after_a_while(tmp_path, capsys, content):
  (tmp_path / 'lock.json').write_text(content)
  with run_lock.RunLock(tmp_path):
    assert _owner(tmp_path)['pid'] == os.getpid()
  assert 'process ? on host ?, since ? has left its lock here; waiting up to 0.2 s' in (
    capsys.readouterr().err
  )


def test_a_lock_of_another_host_expires_without_updates(tmp_path, monkeypatch, capsys):
  _leave(tmp_path)
  with run_lock.RunLock(tmp_path) as lock:
    assert lock.replaced.startswith('process 7 on host other')
  assert 'process 7 on host other, since 2026-01-01 00:00:00 UTC has left its lock' in (
    capsys.readouterr().err
  )
  _leave(tmp_path)
  monkeypatch.setattr(run_lock.time, 'sleep', lambda _: _leave(tmp_path, beat=4))
  with pytest.raises(errors.UserError, match='process 7 on host other'):
    with run_lock.RunLock(tmp_path):
      pass


def test_a_lost_lock_stops_the_run_and_stays_with_its_new_owner(tmp_path):
  with run_lock.RunLock(tmp_path) as lock:
    lock.check()
    lock.confirm()
    _leave(tmp_path)
    with pytest.raises(errors.UserError, match='taken over by process 7 on host other'):
      lock.confirm()
    lock.beat()
    with pytest.raises(errors.UserError, match='nothing more is written here'):
      lock.check()
  assert _owner(tmp_path)['id'] == 'theirs'
  (tmp_path / 'lock.json').unlink()
  with run_lock.RunLock(tmp_path) as lock:
    (tmp_path / 'lock.json').unlink()
    lock.beat()
    with pytest.raises(errors.UserError, match='which has ended'):
      lock.check()


def test_without_exclusive_creation_the_last_writer_wins(tmp_path, monkeypatch):
  _without_flock(monkeypatch)
  monkeypatch.setattr(storage, 'create', storage.write)
  # Another start writes its lock right after this one.
  monkeypatch.setattr(run_lock.time, 'sleep', lambda _: _leave(tmp_path))
  with pytest.raises(errors.UserError, match='started in this folder at the same time'):
    with run_lock.RunLock(tmp_path):
      pass
  assert _owner(tmp_path)['id'] == 'theirs'


def test_a_folder_in_an_object_store(monkeypatch):
  monkeypatch.setattr(run_lock, 'SETTLE', 1e6)
  folder = 'memory://runs/locked'  # fsspec's own store, without a server.
  with run_lock.RunLock(folder) as lock:
    with pytest.raises(errors.UserError, match=f'process {os.getpid()} on host'):
      with run_lock.RunLock(folder):
        pass
    lock.beat()
    lock.confirm()
    storage.write(f'{folder}/{run_lock.FILE}', '{"id": "theirs", "pid": 7, "host": "other"}')
    with pytest.raises(errors.UserError, match='taken over by process 7 on host other'):
      lock.confirm()
  with run_lock.RunLock(folder) as lock:  # That owner never updates its lock.
    assert lock.replaced.startswith('process 7 on host other')
  assert not storage.exists(f'{folder}/{run_lock.FILE}')


def test_a_folder_that_cannot_be_written_is_reported_in_one_line(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(errors.UserError, match="run/lock.json: can't be written"):
    with run_lock.RunLock(tmp_path / 'file' / 'run'):
      pass

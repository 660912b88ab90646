"""Tests a disk that fills up while a run writes: one helpful line, and a whole last checkpoint."""

import builtins
import errno
import gc
import os
import resource
import shutil
import subprocess
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import verification
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop  # noqa: F401

MODEL = {'stage': 'tokenizer', 'config': {}}
# Threads of other tests in this process, such as fsspec's, may never end.
_threads_before = set()


@pytest.fixture(autouse=True)
def _threads():
  """Collects garbage only between the tests.

  Orbax's managers of failed checkpoints ask for their thread's state when they are collected.
  Until Python 3.13 that hangs in a thread that is just being started.
  """
  gc.collect()
  _threads_before.update(threading.enumerate())
  gc.disable()
  yield
  gc.enable()


def _save(manager, step, size=4000):
  draw = np.random.default_rng(step)
  manager.save(
    step,
    {'step': jnp.asarray(step), 'params': {'a': jnp.asarray(draw.normal(size=size), jnp.float32)}},
    {'place': step},
    MODEL,
  )
  manager.close()


def _wait_for(thread):
  for _ in range(600):
    try:
      # The manager's own wait would raise the failure again.
      return threading.Thread.join(thread, 60)
    except RuntimeError:  # The list includes threads that are still starting.
      time.sleep(0.1)
  raise AssertionError(f'{thread.name} never starts')


def _assert_goes_on(folder, steps=(1,)):
  """Asserts that the last checkpoint is whole, no failed one is left, and another can be written."""
  # A process would end after such a failure; here the threads of Orbax and TensorStore must end.
  for thread in set(threading.enumerate()) - _threads_before:
    if type(thread).__name__ == '_SignalingThread' or thread.name.startswith('asyncio'):
      _wait_for(thread)
  before = None
  while before != (before := sorted(os.walk(folder))):  # os.walk tolerates vanishing files.
    time.sleep(0.1)
  assert verification.newest_whole(epath.Path(folder / 'checkpoints')).step in steps
  manager = checkpoint_manager.Checkpoints(folder)
  # Orbax may complete a checkpoint whose metadata failed at the same time; it is moved aside.
  assert {damaged.step for damaged in manager.found.damaged} <= {2}
  _save(manager, 3)
  assert verification.newest_whole(epath.Path(folder / 'checkpoints')).step == 3
  assert set(os.listdir(folder / 'checkpoints')) <= {'1', '2', '2.damaged', '3'}


@pytest.fixture(name='run')
def _run(tmp_path):
  """Makes a run's folder with a checkpoint of step 1."""
  _save(checkpoint_manager.Checkpoints(tmp_path / 'run'), 1)
  return tmp_path / 'run'


@pytest.fixture(name='full')
def _full(monkeypatch):
  """Makes the n-th file that Python opens for writing in a folder `checkpoints` fail; counts files."""
  opened, wanted = builtins.open, {'count': 0, 'fails': None, 'code': errno.ENOSPC}

  def opens(file, mode='r', *args, **kwargs):
    if 'checkpoints' in str(file) and set(mode) & set('wax+'):
      wanted['count'] += 1
      if wanted['count'] == wanted['fails']:
        raise OSError(wanted['code'], os.strerror(wanted['code']), str(file))
    return opened(file, mode, *args, **kwargs)

  monkeypatch.setattr(builtins, 'open', opens)
  return wanted


def test_whichever_write_fills_the_disk_the_last_checkpoint_is_whole(run, full, tmp_path):
  shutil.copytree(run, tmp_path / 'counted')
  manager = checkpoint_manager.Checkpoints(tmp_path / 'counted')
  full['count'] = 0
  _save(manager, 2)
  writes = full['count']
  assert writes >= 4  # Metadata, the two JSON files, the manifest.
  for failing in {1, 2, writes // 2, writes - 1, writes}:
    folder = tmp_path / f'fails_{failing}'
    shutil.copytree(run, folder)
    manager = checkpoint_manager.Checkpoints(folder)
    full.update(count=0, fails=failing)
    with pytest.raises(UserError, match='no space left on device.*start again: it resumes') as told:
      _save(manager, 2)
    full['fails'] = None
    assert str(told.value).startswith(f'{folder}: ')
    assert 'are free and a checkpoint takes about' in str(told.value)
    _assert_goes_on(folder, (1, 2))  # 2 if only sealing the manifest was left.


@pytest.mark.parametrize(
  'code, advice',
  [
    (errno.EACCES, 'permission denied: the run has stopped; make the folder writable'),
    (errno.EROFS, 'read-only file system: the run has stopped; make the folder writable'),
    (errno.EIO, 'input/output error: the run has stopped; check the disk'),
  ],
)
def test_other_errors_of_writing_are_explained(run, full, code, advice):
  manager = checkpoint_manager.Checkpoints(run)
  full.update(count=0, fails=3, code=code)
  with pytest.raises(UserError, match=f'{advice}.*from its last whole checkpoint, step 1'):
    _save(manager, 2)
  full['fails'] = None
  _assert_goes_on(run)


@pytest.mark.parametrize('limit', [100, 3000, 12000])
def test_a_full_disk_in_the_background_is_explained(run, limit):
  manager = checkpoint_manager.Checkpoints(run)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
  try:
    with pytest.raises(UserError, match='file too large.*ulimit.*step 1'):
      _save(manager, 2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  _assert_goes_on(run)


def test_other_errors_are_unchanged(tmp_path):
  for error in (
    FileNotFoundError(errno.ENOENT, 'gone', str(tmp_path / 'x')),
    ValueError('else'),
    PermissionError(errno.EACCES, 'not allowed', '/elsewhere/picture.png'),
  ):
    with pytest.raises(type(error)):
      with disk_errors.reported(tmp_path):
        raise error


@pytest.mark.process
@pytest.mark.slow
def test_training_on_a_disk_that_fills_up(tmp_path, generator_bindings, capsys):
  """Tests that `train` on a full disk ends with one line and status 2, and resumes given space."""
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(
    ['mount', '-t', 'tmpfs', '-o', 'size=12m', 'tmpfs', disk], capture_output=True, check=False
  )
  if mounted.returncode:
    pytest.skip('mounting a small file system is not allowed here')
  try:
    argv = [
      'train',
      '--gin_file=gin_configs/runs/tiny_generator.gin',
      f'--model_dir={disk / "run"}',
      *(f'--gin.{line}' for line in generator_bindings),
      '--gin.train.eval_split=None',
      '--gin.train.pictures_every=0',
      '--gin.train.checkpoint_every=1',
      '--gin.train.keep_checkpoints=100',
    ]
    assert main.main([*argv, '--gin.train.steps=1000']) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if 'error' in line]
    assert len(told) == 1 and 'no space left on device' in told[0], told
    last = verification.newest_whole(epath.Path(disk / 'run' / 'checkpoints')).step
    assert f'step {last}' in told[0] and last >= 1
    subprocess.run(['mount', '-o', 'remount,size=200m', disk], check=True)
    assert main.main([*argv, f'--gin.train.steps={last + 2}']) == 0
    assert f'resuming at step {last}' in capsys.readouterr().err
    assert all(name.isdecimal() for name in os.listdir(disk / 'run' / 'checkpoints'))
  finally:
    subprocess.run(['umount', disk], check=True)

"""Tests runs with data, checkpoints, lock, journal and metrics in a misbehaving object store."""

import functools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import misbehaving_store
import numpy as np
import orbax.checkpoint as ocp
import pytest

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.runs import history
from parti_jax.runs import journal
from parti_jax.runs import run_lock
from parti_jax.training import reporting

REPOSITORY = pathlib.Path(run_checkpoints.__file__).parents[2]
PLACE, MODEL = {'epoch': 2}, {'stage': 'generator', 'config': {}}


def _arrays(path):
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(path / 'state').item_metadata.tree
    restored = checkpointer.restore(
      path / 'state',
      args=ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      ),
    )
  return {
    jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(restored)
  }


def test_checkpoints_are_restored_from_a_bad_store(bad_store):
  run, state = f'{bad_store.folder}/run', {'a': jnp.arange(4.0), 'b': jnp.ones((200, 300))}
  bad_store.faults = misbehaving_store.every(8)
  manager = checkpoint_manager.Checkpoints(run, keep=1)
  manager.save(1, state, PLACE, MODEL)
  manager.close()
  path = run_checkpoints.latest_checkpoint(run)
  assert path.name == '1' and run_checkpoints.read_place(path) == PLACE
  assert run_checkpoints.read_model(path) == MODEL
  for name, array in _arrays(path).items():
    np.testing.assert_array_equal(array, state[name[2]])
  assert len(bad_store.sent) > 4


def test_a_dead_store_under_a_checkpoint_is_reported_in_one_line(bad_store, monkeypatch):
  monkeypatch.setenv(store_retries.SECONDS_VARIABLE, '0.5')
  run = f'{bad_store.folder}/run'
  manager = checkpoint_manager.Checkpoints(run, keep=1)
  bad_store.faults = lambda method, path, count: (
    '503' if method in ('PUT', 'POST') and 'state' in path else None
  )
  with pytest.raises(errors.UserError, match='run: .*the store failed: .*503|503.*'):
    manager.save(1, {'a': jnp.arange(4.0)}, PLACE, MODEL)
    manager.close()
  bad_store.faults = lambda *_: None
  assert not run_checkpoints.has_checkpoint(run)


def test_one_of_several_starts_at_a_bad_store_wins(bad_store, monkeypatch):
  folder = f'{bad_store.folder}/run'
  monkeypatch.setattr(run_lock, 'SETTLE', 0.01)
  for fault in ('lost', '503', 'cut'):
    bad_store.faults = misbehaving_store.first((fault,))
    with run_lock.RunLock(folder) as lock:
      with pytest.raises(errors.UserError, match=f'process {os.getpid()} on host'):
        with run_lock.RunLock(folder):
          pass
      lock.beat()
      lock.confirm()
    assert storage.names(folder) == []
    assert bad_store.sent[fault]


def test_a_lock_update_waits_less_than_the_patience_of_others(bad_store, monkeypatch):
  monkeypatch.setattr(run_lock, 'SETTLE', 0.01)
  monkeypatch.setattr(run_lock, 'BEAT', 0.2)
  with run_lock.RunLock(f'{bad_store.folder}/run') as lock:
    bad_store.faults = lambda *_: '503'
    with pytest.raises(errors.UserError, match='tried'):
      lock.beat()  # Not only after the two minutes of other requests.
    bad_store.faults = lambda *_: None
    lock.confirm()


def test_journal_and_metrics_are_whole_in_a_bad_store(bad_store, tmp_path):
  run = f'{bad_store.folder}/run'
  bad_store.faults = misbehaving_store.every(3)
  with journal.Journal(run) as written:
    written.write('start', 'begins')
    written.checkpoint(3, {})
  reporter = reporting.Reporter(run, 4, 0)
  reporter.metrics(2, {'loss': 1.5})
  reporter.close({})
  (events,) = (start.records for start in history.read(run).starts)
  assert [event['event'] for event in events] == ['start', 'checkpoint', 'store retries', 'stop']
  assert sum(events[2]['counts'].values()) > 0
  content = b''.join(
    storage.read(f'{run}/tensorboard/{name}', 2**20) for name in storage.names(f'{run}/tensorboard')
  )
  assert b'loss' in content


def _train(run, tokens, logs, processes=1, env=None, seconds=900):
  """Trains the tiny generator in separate processes; returns their output and statuses."""
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    port = unused.getsockname()[1]
  bindings = [
    f"token_cache.path = '{tokens}'",
    "token_cache.shuffle = 'window'",
    "train.eval_split = 'validation'",
    'train.steps = 6',
    'train.checkpoint_every = 2',
    'train.log_every = 1',
    'train.pictures_every = 0',
    'PartiConfig.encoder_layers = 1',
    'PartiConfig.decoder_layers = 1',
  ]
  started = []
  for index in range(processes):
    command = [
      sys.executable,
      '-m',
      'parti_jax.cli.main',
      'train',
      '--gin_file=gin_configs/runs/tiny_generator.gin',
      f'--model_dir={run}',
      *(f'--gin.{binding}' for binding in bindings),
    ]
    if processes > 1:
      command += [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={processes}',
        f'--process_id={index}',
      ]
    devices = f'--xla_force_host_platform_device_count={2 // processes}'
    with open(logs / f'{index}.log', 'w', encoding='utf-8') as log:
      started.append(
        subprocess.Popen(
          command,
          cwd=REPOSITORY,
          stdout=log,
          stderr=log,
          env=os.environ | {'PYTHONPATH': str(REPOSITORY), 'XLA_FLAGS': devices} | (env or {}),
        )
      )
  try:
    statuses = [process.wait(seconds) for process in started]
  finally:
    for process in started:
      process.terminate()
  return [
    ((logs / f'{index}.log').read_text(encoding='utf-8'), status)
    for index, status in enumerate(statuses)
  ]


def _uploaded(tokens, url):
  for path in tokens.iterdir():
    storage.upload(path, f'{url}/{path.name}')
  return url


@pytest.fixture(scope='module')
def run_on_a_disk(tokens_folder, tmp_path_factory):
  """Trains in so many processes on a disk, once for each number; returns the run's folder."""

  @functools.cache
  def train(processes):
    folder = tmp_path_factory.mktemp('run')
    shown = _train(folder / 'run', tokens_folder, folder, processes)
    assert [status for _, status in shown] == [0] * processes, shown
    return folder / 'run'

  return train


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 2])
def test_a_run_at_a_bad_store_ends_as_on_a_disk(
  bad_store, tokens_folder, run_on_a_disk, tmp_path, processes
):
  run = f'{bad_store.folder}/run'
  tokens = _uploaded(tokens_folder, f'{bad_store.folder}/tokens')
  bad_store.faults = misbehaving_store.seeded(1, 0.05)
  shown = _train(run, tokens, tmp_path, processes)
  assert [status for _, status in shown] == [0] * processes, shown
  assert sum(bad_store.sent.values()) > 10 and 'requests to stores repeated: ' in shown[0][0]
  assert sum('store_retries' in line for line in shown[0][0].splitlines()) > 3
  bad_store.faults = lambda *_: None
  paths = [run_checkpoints.latest_checkpoint(folder) for folder in (run, run_on_a_disk(processes))]
  assert [path.name for path in paths] == ['6', '6']
  assert run_checkpoints.read_place(paths[0]) == run_checkpoints.read_place(paths[1])
  found, states = map(_arrays, paths)
  assert found.keys() == states.keys() and found
  for name, array in states.items():
    np.testing.assert_array_equal(found[name], array)
  assert 'lock.json' not in storage.names(run)


@pytest.mark.process
@pytest.mark.slow
@pytest.mark.parametrize('fault', ['refused', 'hang'])
def test_a_store_that_dies_ends_the_run_in_one_line(bad_store, tokens_folder, tmp_path, fault):
  run = f'{bad_store.folder}/run'
  tokens = _uploaded(tokens_folder, f'{bad_store.folder}/tokens')

  def dies(method, path, count):
    del count
    # Once the first checkpoint is being written.
    dies.dead |= method in ('PUT', 'POST') and 'checkpoints' in path and 'state' in path
    return fault if dies.dead else None

  dies.dead = False
  bad_store.faults = dies
  ((shown, status),) = _train(
    run, tokens, tmp_path, env={store_retries.SECONDS_VARIABLE: '3'}, seconds=240
  )
  told = [line for line in shown.splitlines() if 'parti-jax: error: ' in line]
  assert status == 2 and len(told) == 1 and 'store' in told[0], shown
  assert 'Traceback' not in shown, shown

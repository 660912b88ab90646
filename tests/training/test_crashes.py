"""Tests that a process whose training fails ends with the error and its status."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest
import xla_flags

pytestmark = pytest.mark.process

REPOSITORY = pathlib.Path(__file__).parents[2]
CHILD = pathlib.Path(__file__).with_name('crashing_child.py')
WHERE = (
  'step',
  'step_with_full_buffers',
  'step_of_jax',
  'evaluation',
  'pictures',
  'data_thread',
  'reader',
)
# Only reached if the process never ends; it should take about a second.
LONG = 300


@pytest.fixture(name='command')
def _command(tmp_path, tokenizer_bindings):
  """Returns the command line of a run that fails in a place, in one process or one of several."""

  def command(where, *flags, process=0, folder='run'):
    bindings = [
      *tokenizer_bindings,
      'train.steps = 1000',
      'train.evaluate_every = 3',
      'train.pictures_every = 3',
      'train.log_every = 1',
      'train.batch_size = 8',
    ]
    return [
      sys.executable,
      '-P',
      str(CHILD),
      where,
      str(process),
      'train',
      '--gin_file=gin_configs/runs/tiny_tokenizer.gin',
      f'--model_dir={tmp_path / folder}',
      *(f'--gin.{binding}' for binding in bindings),
      *flags,
    ]

  return command


def _environment(**more):
  return (
    os.environ
    | {
      'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
      'XLA_FLAGS': ' '.join(xla_flags.of(devices=1)),
    }
    | more
  )


def _run(command, **environment):
  return subprocess.run(
    command,
    cwd=REPOSITORY,
    env=_environment(**environment),
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    timeout=LONG,
    check=False,
  )


def _assert_crashed(done):
  assert done.returncode == 1, done.stdout
  assert 'Traceback (most recent call last)' in done.stdout
  assert 'RuntimeError: injected' in done.stdout, done.stdout


@pytest.mark.parametrize('where', ['step', 'data_thread'])
def test_a_crash_ends(command, where):
  _assert_crashed(_run(command(where)))


@pytest.mark.slow
@pytest.mark.parametrize('where', WHERE)
def test_each_crash_ends(command, where):
  for index in range(20):
    _assert_crashed(_run(command(where, folder=f'run_{index}')))


@pytest.mark.slow
def test_a_crash_is_started_again(tmp_path, command):
  script = str(REPOSITORY / 'launch' / 'keep_running.sh')
  done = _run([script, '--tries=3', *command('step')], KEEP_RUNNING_SECONDS='0')
  assert done.returncode == 1 and done.stdout.count('RuntimeError: injected') == 3
  assert '3 times without a new checkpoint: giving up' in done.stdout
  assert len(list((tmp_path / 'run' / 'journal').iterdir())) == 3


@pytest.mark.slow
@pytest.mark.parametrize('where', ['step', 'data_thread'])
@pytest.mark.parametrize('process', [0, 1])
def test_a_crash_of_one_process_ends_both(tmp_path, command, where, process):
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    port = taken.getsockname()[1]
  both, logs = [], [tmp_path / f'{index}.log' for index in range(2)]
  try:
    for index, log in enumerate(logs):
      with open(log, 'w', encoding='utf-8') as file:
        both.append(
          subprocess.Popen(
            command(
              where,
              f'--coordinator=127.0.0.1:{port}',
              '--num_processes=2',
              f'--process_id={index}',
              process=process,
            ),
            cwd=REPOSITORY,
            env=_environment(),
            stdout=file,
            stderr=file,
          )
        )
    statuses = [each.wait(LONG) for each in both]
  finally:
    for each in both:
      each.kill()
      each.wait()
  said = [log.read_text(encoding='utf-8') for log in logs]
  assert statuses == [1, 1], said
  assert 'RuntimeError: injected' in said[process] and 'injected' not in said[1 - process]
  assert (
    said[1 - process]
    .strip()
    .splitlines()[-1]
    .startswith(f'parti-jax: error: process {process} of this run')
  ), said[1 - process]

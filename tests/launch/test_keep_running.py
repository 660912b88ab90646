"""launch/keep_running.sh, with a command that stands in for `parti-jax train`."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from parti_jax.runs import preemption

pytestmark = pytest.mark.process

SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'keep_running.sh'

# Ends with the first status of the file `statuses`, which it takes away; `+` before it stands for a
# checkpoint. With none left it waits for a signal: it saves after TERM.
_COMMAND = """#!/bin/bash
trap 'exit 75' TERM
trap 'exit 130' INT
echo "$*" >>calls
status=$(head -n 1 statuses)
sed -i 1d statuses
[[ $status != +* ]] || mkdir -p "run/checkpoints/$(wc -l <calls)"
[[ -z $status ]] || exit "${status#+}"
touch waits
while true; do sleep 0.05; done
"""


@pytest.fixture(name='start')
def _start(tmp_path):
  def start(statuses, *flags, command=('train', '--model_dir=run')):
    (tmp_path / 'command').write_text(_COMMAND)
    (tmp_path / 'command').chmod(0o755)
    (tmp_path / 'statuses').write_text(''.join(f'{status}\n' for status in statuses))
    return subprocess.Popen(
      [SCRIPT, *flags, './command', *command],
      cwd=tmp_path,
      text=True,
      env=os.environ | {'KEEP_RUNNING_SECONDS': '0'},
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      # What runs in the background of a shell without jobs ignores it.
      preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )

  return start


def _ended(process):
  said, _ = process.communicate(timeout=30)
  return process.returncode, said


def _calls(folder):
  return (folder / 'calls').read_text().splitlines()


def test_it_starts_again_until_the_run_is_finished(tmp_path, start):
  stop = preemption.STATUS
  status, said = _ended(start([stop, stop, stop, stop, 143, 0]))
  assert status == 0 and _calls(tmp_path) == ['train --model_dir=run'] * 6
  assert said.count('was asked to stop; it is started again') == 5


@pytest.mark.parametrize(
  'statuses, calls', [([137, 1, 139, 0], 3), ([137, 1, '+1', 1, 134, 0], 5), ([1, 75, 1, 1, 0], 4)]
)
def test_after_crashes_without_a_checkpoint_it_gives_up(tmp_path, start, statuses, calls):
  status, said = _ended(start(statuses, command=('train', '--model_dir', 'run')))
  assert status == statuses[calls - 1] and len(_calls(tmp_path)) == calls
  assert '3 times without a new checkpoint: giving up' in said


def test_one_try(tmp_path, start):
  assert _ended(start([1, 0], '--tries=1'))[0] == 1 and len(_calls(tmp_path)) == 1


@pytest.mark.parametrize('status', [0, 2, 130])
def test_these_ends_are_final(tmp_path, start, status):
  assert _ended(start([status, 1])) == (status, '') and len(_calls(tmp_path)) == 1


@pytest.mark.parametrize(
  'number, status', [(signal.SIGTERM, preemption.STATUS), (signal.SIGINT, 130)]
)
def test_a_signal_is_handed_on_and_ends_both(tmp_path, start, number, status):
  process = start([])
  end = time.monotonic() + 20
  while not (tmp_path / 'waits').exists():
    assert time.monotonic() < end
    time.sleep(0.02)
  process.send_signal(number)
  assert _ended(process)[0] == status and len(_calls(tmp_path)) == 1


@pytest.mark.parametrize(
  'flags, command, message',
  [
    (['--tries=0'], ['--model_dir=run'], '--tries=0: not a number from 1'),
    ([], [], 'the command needs --model_dir=FOLDER'),
  ],
)
def test_bad_input_is_named(start, flags, command, message):
  status, said = _ended(start([0], *flags, command=command))
  assert status == 2 and said.startswith(f'keep_running.sh: error: {message}')

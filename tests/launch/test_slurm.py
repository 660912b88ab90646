"""launch/slurm/train.sbatch, with srun and scontrol that stand in for Slurm's."""

import os
import pathlib
import signal
import subprocess
import time

import pytest

from parti_jax.runs import preemption

pytestmark = pytest.mark.process

SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'slurm' / 'train.sbatch'

# One task, which ends with the status in `end`, or, when scancel sends it TERM, with 75. srun
# itself kills the tasks when it gets TERM.
_SRUN = """#!/bin/bash
trap 'kill -KILL $task; exit 137' TERM
(
  trap 'echo task saved; exit 75' TERM
  until [[ -f end ]]; do sleep 0.05; done
  exit "$(cat end)"
) &
task=$!
echo "$task" >task
printf '<%s>\\n' "$@" >arguments.new && mv arguments.new arguments
wait "$task"
"""
_SCANCEL = """#!/bin/bash
[[ $* == '--signal=TERM 7' ]] && kill -TERM "$(cat task)"
"""
_SQUEUE = """#!/bin/bash
[[ $* == '--noheader --format=%T --jobs=7' ]] && cat state
"""


@pytest.fixture(name='job')
def _job(tmp_path):
  """Returns a function that starts the script as Slurm does: a copy of it, elsewhere."""
  folder = tmp_path / 'checkout'
  for path, text in (
    (folder / '.venv' / 'bin' / 'parti-jax', ''),
    (tmp_path / 'bin' / 'srun', _SRUN),
    (tmp_path / 'bin' / 'scontrol', '#!/bin/bash\necho "scontrol $*"\n'),
    (tmp_path / 'bin' / 'scancel', _SCANCEL),
    (tmp_path / 'bin' / 'squeue', _SQUEUE),
    (folder / 'state', 'RUNNING\n'),
    (tmp_path / 'spool' / 'slurm_script', SCRIPT.read_text()),
  ):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  def start(*arguments, **variables):
    environment = {
      'PATH': f'{tmp_path / "bin"}:{os.environ["PATH"]}',
      'HOME': str(tmp_path),
      'SLURM_JOB_ID': '7',
      'SLURM_SUBMIT_DIR': str(folder),
      'SLURM_CPUS_PER_TASK': '8',
      **variables,
    }
    return subprocess.Popen(
      [tmp_path / 'spool' / 'slurm_script', *arguments],
      cwd=folder,
      env=environment,
      text=True,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
    )

  start.folder = folder
  return start


def _wait_for_arguments(folder):
  end = time.monotonic() + 20
  while not (folder / 'arguments').exists():
    assert time.monotonic() < end, 'srun was not called'
    time.sleep(0.05)
  return (folder / 'arguments').read_text().splitlines()


@pytest.mark.parametrize('status', [0, 1])
def test_arguments_and_status_are_handed_on(job, status):
  (job.folder / 'end').write_text(str(status))
  done = job('--model_dir=runs/x', "--gin.train.task='two  words'")
  said, _ = done.communicate(timeout=30)
  assert done.returncode == status and 'scontrol' not in said
  assert _wait_for_arguments(job.folder) == [
    '<--label>',
    '<--kill-on-bad-exit=1>',
    '<--cpus-per-task=8>',
    f'<{job.folder}/.venv/bin/parti-jax>',
    '<train>',
    '<--multi_host>',
    '<--gin.train.grace_seconds=220>',
    '<--model_dir=runs/x>',
    "<--gin.train.task='two  words'>",
  ]


def test_time_limit_lets_the_tasks_save_and_requeues(job):
  running = job('--model_dir', 'runs/x')
  _wait_for_arguments(job.folder)
  time.sleep(0.2)
  running.send_signal(signal.SIGUSR1)
  said, _ = running.communicate(timeout=30)
  assert running.returncode == 0
  assert said.index('task saved') < said.index('scontrol requeue 7')


def test_a_run_that_ends_just_before_the_time_limit_is_not_queued_again(job):
  running = job('--model_dir', 'runs/x')
  _wait_for_arguments(job.folder)
  (job.folder.parent / 'bin' / 'scancel').write_text('#!/bin/bash\necho 0 >end\n')
  time.sleep(0.2)
  running.send_signal(signal.SIGUSR1)
  said, _ = running.communicate(timeout=30)
  assert running.returncode == 0 and 'time limit is near' in said and 'scontrol' not in said


@pytest.mark.parametrize('state, status', [('RUNNING', 0), ('COMPLETING', 75)])
def test_what_was_told_to_stop_is_queued_again_unless_slurm_ends_the_job(job, state, status):
  (job.folder / 'end').write_text(str(preemption.STATUS))
  (job.folder / 'state').write_text(state + '\n')
  done = job('--model_dir=runs/x')
  said, _ = done.communicate(timeout=30)
  assert done.returncode == status
  assert ('scontrol requeue 7' in said) == (status == 0)


@pytest.mark.parametrize(
  'arguments, variables, message',
  [
    ([], {}, 'use --model_dir=FOLDER'),
    (['--model_dir=x'], {'SLURM_JOB_ID': ''}, 'submit it: sbatch'),
    (['--model_dir=x'], {'PARTI_JAX_VENV': '/nowhere'}, 'no parti-jax in /nowhere'),
  ],
)
def test_bad_input_is_named(job, arguments, variables, message):
  done = job(*arguments, **variables)
  said, _ = done.communicate(timeout=30)
  assert done.returncode == 2
  assert said.startswith('train.sbatch: error: ') and message in said and said.count('\n') == 1


def test_slurm_reads_its_options_before_the_first_command():
  lines = SCRIPT.read_text().splitlines()
  first = next(i for i, line in enumerate(lines) if line and not line.startswith('#'))
  options = [line for line in lines if line.startswith('#SBATCH')]
  assert options == [line for line in lines[:first] if line.startswith('#SBATCH')]
  assert {
    '#SBATCH --requeue',
    '#SBATCH --signal=B:USR1@300',
    '#SBATCH --open-mode=append',
    '#SBATCH --gpus-per-node=8',
    '#SBATCH --ntasks-per-node=8',
  } <= set(options)

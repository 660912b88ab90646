"""launch/scenes_demo.sh: its steps with a stand-in for `parti-jax`, and tiny ones for real."""

import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

REPOSITORY = pathlib.Path(__file__).parents[2]
STEPS = [
  'vocabulary',
  'tokenizer',
  'second_phase',
  'tokens_names',
  'tokens_scenes',
  'generator',
  'ranker',
  'super_resolution',
  'export',
  'evaluation_names',
  'evaluation_scenes',
]
# Writes down its arguments. It fails once, with the status in the file `fails`, when an argument ends
# in the word in there, and waits for SIGTERM if that status is `waits`. As a training run it says how
# fast it is: 64 examples per second, in batches of 32.
_STAND_IN = """#!/bin/bash
cd "$(dirname "$0")"
printf '%s\\n' "$(printf '%q ' "$@")" >>calls
for argument in "$@"; do
  [[ $argument != --model_dir=* ]] || folder=${argument#*=}
  if [[ -f fails ]] && read -r word status <fails && [[ $argument == *"$word" ]]; then
    rm fails
    if [[ $status == waits ]]; then
      trap 'echo stopped >>calls; exit 75' TERM
      touch waiting
      while true; do sleep 0.05; done
    fi
    exit "$status"
  fi
done
if [[ $1 == train ]]; then
  mkdir -p "$folder/checkpoints/7"
  echo 'train.batch_size = 32' >"$folder/config.gin"
  echo 'step 20: examples_per_second 1.0 loss 2' >&2
  echo 'step 30: examples_per_second 64 loss 2' >&2
fi
"""


@pytest.fixture(name='checkout')
def _checkout(tmp_path):
  """A checkout with the launch scripts, whose environment only has stand-ins."""
  checkout = tmp_path / 'checkout'
  shutil.copytree(REPOSITORY / 'launch', checkout / 'launch')
  for folder in ('parti_jax', 'gin_configs'):
    (checkout / folder).mkdir()
  for name in ('setup.cfg', 'pyproject.toml'):
    (checkout / name).write_text('')
  binaries = checkout / '.venv' / 'bin'
  binaries.mkdir(parents=True)
  for name, content in (
    ('python', '#!/bin/sh\n'),
    ('pip', '#!/bin/sh\n'),
    ('parti-jax', _STAND_IN),
  ):
    (binaries / name).write_text(content)
    (binaries / name).chmod(0o755)
  return checkout


def _start(checkout, *flags, **variables):
  environment = {
    name: value for name, value in os.environ.items() if name not in ('PARTI_JAX_VENV', 'PYTHON')
  }
  return subprocess.Popen(
    [checkout / 'launch' / 'scenes_demo.sh', f'--output_dir={checkout / "out"}', *flags],
    env=environment | {'KEEP_RUNNING_SECONDS': '0'} | variables,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _run(checkout, *flags, **variables):
  process = _start(checkout, *flags, **variables)
  process.out, process.err = process.communicate(timeout=900)
  return process


def _calls(checkout):
  """The arguments of each call since the last time, without the output folder's path."""
  file = checkout / '.venv' / 'bin' / 'calls'
  lines = file.read_text().splitlines() if file.exists() else []
  file.unlink(missing_ok=True)
  return [
    [word.replace(f'{checkout / "out"}/', 'OUT/') for word in shlex.split(line)] for line in lines
  ]


def _fail_at(checkout, word, status):
  (checkout / '.venv' / 'bin' / 'fails').write_text(f'{word} {status}\n')


def _gin(call):
  """The gin values of a call."""
  pairs = [word.removeprefix('--gin.').split('=', 1) for word in call if word.startswith('--gin.')]
  return dict(pairs)


def test_all_steps_in_order_and_none_twice(checkout):
  done = _run(checkout)
  assert done.returncode == 0, done.err
  started = [line.split()[1].strip(',') for line in done.out.splitlines() if line.startswith('[')]
  assert started == STEPS
  calls = _calls(checkout)
  assert [call[0] for call in calls] == (
    ['vocabulary', 'train', 'train', 'tokenize', 'tokenize', 'train', 'train', 'train']
    + ['export', 'evaluate', 'evaluate']
  )
  tokenizer, decoder, generator, ranker, upscaling = (call for call in calls if call[0] == 'train')
  assert '--gin_file=gin_configs/runs/scenes_tokenizer.gin' in tokenizer and not _gin(tokenizer)
  assert '--gin_file=gin_configs/runs/scenes_tokenizer_decoder.gin' in decoder
  assert _gin(decoder) == {'TokenizerObjective.first_phase': "'OUT/tokenizer'"}
  assert _gin(generator) == {
    'vocabulary.path': "'OUT/vocabulary.model'",
    'token_cache_names/token_cache.path': "'OUT/tokens_names'",
    'token_cache_scenes/token_cache.path': "'OUT/tokens_scenes'",
    'GeneratorObjective.tokenizer': "'OUT/second_phase'",
  }
  assert _gin(ranker)['RankerObjective.tokenizer'] == "'OUT/second_phase'"
  assert _gin(upscaling) == {'SuperResolutionObjective.tokenizer': "'OUT/second_phase'"}
  assert [_gin(call)['data.source'] for call in calls if call[0] == 'tokenize'] == [
    "'openmoji'",
    "'openmoji_scenes'",
  ]
  export = calls[8]
  assert {'--tokenizer=OUT/second_phase', '--ranker=OUT/ranker'} < set(export)
  assert '--of_seen_names' in calls[10] and '--of_seen_names' not in calls[9]
  assert 'generate' in done.out and str(checkout / 'out' / 'model') in done.out
  # Again: nothing is left to do.
  assert _run(checkout).returncode == 0 and not _calls(checkout)


@pytest.mark.parametrize(
  'word, step', [('generator', 'generator'), ('tokens_names', 'tokens_names')]
)
def test_a_failed_step_is_named_and_repeated(checkout, word, step):
  _fail_at(checkout, word, 2)
  done = _run(checkout)
  assert done.returncode == 2
  assert f'{step} ended with status 2; the same command resumes it' in done.err
  assert len(_calls(checkout)) == STEPS.index(step) + 1
  done = _run(checkout)
  assert done.returncode == 0
  assert len(_calls(checkout)) == len(STEPS) - STEPS.index(step)


def test_a_crash_of_a_training_run_is_repeated_at_once(checkout):
  _fail_at(checkout, 'ranker', 1)
  done = _run(checkout)
  assert done.returncode == 0, done.err
  assert 'keep_running.sh: the command ended with status 1' in done.err
  assert len(_calls(checkout)) == len(STEPS) + 1


def test_sigterm_stops_the_run_that_is_training(checkout):
  _fail_at(checkout, 'generator', 'waits')
  process = _start(checkout)
  waiting = checkout / '.venv' / 'bin' / 'waiting'
  while not waiting.exists():
    assert process.poll() is None
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=60)
  assert process.returncode == 75 and 'generator ended with status 75' in err
  assert _calls(checkout)[-1] == ['stopped']
  assert _run(checkout).returncode == 0
  assert len(_calls(checkout)) == len(STEPS) - STEPS.index('generator')


def test_minutes_become_steps_by_timing_and_stay_so(checkout):
  _fail_at(checkout, 'second_phase', 2)
  assert _run(checkout, '--minutes=100').returncode == 2
  calls = _calls(checkout)
  assert [call[-1] for call in calls if call[0] == 'train'] == [
    '--model_dir=OUT/timing',
    '--model_dir=OUT/tokenizer',
    '--model_dir=OUT/timing',
    '--model_dir=OUT/second_phase',
  ]
  timing, tokenizer = [_gin(call) for call in calls if call[0] == 'train'][:2]
  assert timing['train.steps'] == '30' and timing['train.log_every'] == '10'
  # A quarter of 100 minutes at two steps per second.
  assert tokenizer['train.steps'] == '3000'
  assert tokenizer['TokenizerObjective.revive_until'] == '2250'
  assert tokenizer['warmup_cosine.warmup_steps'] == '200'
  assert _run(checkout, '--minutes=100').returncode == 0
  steps = {
    call[-1].rpartition('/')[2]: _gin(call).get('train.steps')
    for call in _calls(checkout)
    if call[0] == 'train'
  }
  del steps['timing']
  assert steps == {
    'second_phase': '1200',  # Not timed again.
    'generator': '5400',
    'ranker': '1440',
    'super_resolution': '960',
  }


def test_flags_reach_the_steps_that_they_are_of(checkout):
  done = _run(
    checkout,
    '--tokenizer=vqgan',
    '--second_phase=none',
    '--generator_steps=70',
    '--gin.NAMES_RATE=0.5',
    '--gin.make_mesh.data=1',
  )
  assert done.returncode == 0, done.err
  calls = _calls(checkout)
  trained = {call[-1].rpartition('/')[2]: _gin(call) for call in calls if call[0] == 'train'}
  assert list(trained) == ['tokenizer', 'generator', 'ranker', 'super_resolution']
  assert trained['tokenizer']['TokenizerObjective.model'] == '@VQGANConfig()'
  assert [part['train.steps'] for part in trained.values() if 'train.steps' in part] == ['70']
  assert all(part['make_mesh.data'] == '1' for part in trained.values())
  assert trained['ranker']['RankerObjective.tokenizer'] == "'OUT/tokenizer'"
  assert any('--tokenizer=OUT/tokenizer' in call for call in calls if call[0] == 'export')
  for call in calls:
    if call[0] in ('train', 'tokenize', 'vocabulary'):
      assert _gin(call)['NAMES_RATE'] == '0.5'
    if call[0] in ('tokenize', 'vocabulary'):
      assert 'make_mesh.data' not in _gin(call)


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--minute=3'], '--minute=3: unknown flag'),
    (['runs/scenes'], 'runs/scenes: unknown flag'),
    (['--minutes=0'], '--minutes=0: not a whole number from 1'),
    (['--minutes=1.5'], '--minutes=1.5: not a whole number from 1'),
    (['--ranker_steps=-1'], '--ranker_steps=-1: not a number of steps'),
    (['--minutes=9', '--ranker_steps=1'], 'give either --minutes or numbers of steps'),
    (['--tokenizer=vqvae'], '--tokenizer=vqvae: choose vit_vqgan or vqgan'),
    (['--second_phase=gan'], '--second_phase=gan: choose decoder, adversarial or none'),
    (['--gin.train.steps'], '--gin.train.steps: unknown flag'),
  ],
)
def test_bad_flags_are_refused_before_the_first_step(checkout, flags, message):
  done = _run(checkout, *flags)
  assert done.returncode == 2 and done.err.count('\n') == 1
  assert done.err.startswith('scenes_demo.sh: error: ') and message in done.err
  assert not _calls(checkout) and not (checkout / 'out').exists()


def test_a_folder_that_was_begun_with_other_flags_is_refused(checkout):
  assert _run(checkout, '--generator_steps=50').returncode == 0
  _calls(checkout)
  for flags in ([], ['--generator_steps=60']):
    done = _run(checkout, *flags)
    assert done.returncode == 2 and not _calls(checkout)
    assert "was begun with the flags '--generator_steps=50'; give the same ones" in done.err


@pytest.mark.slow
@pytest.mark.parametrize('tokenizer', ['vit_vqgan', 'vqgan'])
def test_the_whole_chain_for_real(checkout, tmp_path, tokenizer):
  """With tiny networks; the second time it finds everything done."""
  command = checkout / '.venv' / 'bin' / 'parti-jax'
  command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m parti_jax.cli.main "$@"\n')
  shutil.rmtree(checkout / 'gin_configs')
  shutil.copytree(REPOSITORY / 'gin_configs', checkout / 'gin_configs')
  flags = [
    '--smoke',
    f'--tokenizer={tokenizer}',
    '--second_phase=adversarial' if tokenizer == 'vqgan' else '--second_phase=decoder',
    f"--gin.openmoji.data_dir='{tmp_path / 'data'}'",
    f"--gin.openmoji_scenes.data_dir='{tmp_path / 'data'}'",
  ]
  (checkout / 'parti_jax').rmdir()  # The installed package is meant.
  (checkout / 'parti_jax').symlink_to(REPOSITORY / 'parti_jax')
  done = _run(checkout, *flags, XLA_FLAGS='', JAX_PLATFORMS='cpu')
  assert done.returncode == 0, done.err[-3000:]
  out = checkout / 'out'
  config = json.loads((out / 'model' / 'config.json').read_text())
  assert {'parti', 'tokenizer', 'ranker', 'super_resolution'} < set(config)
  assert config['parti']['text_length'] == 40 and config['parti']['grid'] == [4, 4]
  for name in ('names', 'scenes'):
    report = json.loads((out / f'evaluation_{name}' / 'report.json').read_text())
    assert [split['split'] for split in report['splits']] == ['validation']
    assert (out / f'evaluation_{name}' / 'validation.png').is_file()
  again = _run(checkout, *flags)
  assert again.returncode == 0 and '[1/' not in again.out

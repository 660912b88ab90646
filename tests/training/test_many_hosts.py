"""Tests training by several processes with emulated devices on this machine."""

import argparse
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import optax
import pytest
import xla_flags
from etils import epath
from PIL import Image

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.runs import distributed
from parti_jax.runs import preemption
from parti_jax.runs import supervisor
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import reporting
from parti_jax.training import train_loop
from parti_jax.training import trainer
from parti_jax.training.objectives import tokenizer_objective

pytestmark = pytest.mark.process

GENERATOR = 'gin_configs/runs/tiny_generator.gin'
# These processes spend most of their time compiling.
REPOSITORY = pathlib.Path(train_loop.__file__).parents[2]


def _free_port():
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    return taken.getsockname()[1]


@pytest.fixture(name='start')
def _start(tmp_path):
  """Starts `count` processes, with records in `name.I.jsonl` and output in `name.I.log`."""
  everyone = []

  def start(name, count, devices, bindings, dies=(-1, 'KILL', 0), flags=()):
    environment = os.environ | {
      'XLA_FLAGS': ' '.join(xla_flags.of(devices)),
      'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
    }
    child = pathlib.Path(__file__).with_name('many_hosts_child.py')
    port, started = _free_port(), []
    for index in range(count):
      command = [
        sys.executable,
        str(child),
        str(tmp_path / f'{name}.{index}.jsonl'),
        *map(str, dies),
        'train',
        f'--gin_file={GENERATOR}',
        f'--model_dir={tmp_path / "run"}',
        *(f'--gin.{binding}' for binding in bindings),
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={count}',
        f'--process_id={index}',
        *flags,
      ]
      with open(tmp_path / f'{name}.{index}.log', 'w', encoding='utf-8') as log:
        started.append(
          subprocess.Popen(command, stdout=log, stderr=log, env=environment, cwd=REPOSITORY)
        )
    everyone.extend(started)
    return started

  yield start
  for process in everyone:
    process.kill()
    process.wait()


def _ended(processes, seconds=600):
  """Waits for processes and returns their statuses."""
  end = time.monotonic() + seconds
  return [process.wait(max(0.1, end - time.monotonic())) for process in processes]


def _records(folder, name, index=0):
  lines = (folder / f'{name}.{index}.jsonl').read_text(encoding='utf-8').splitlines()
  return [json.loads(line) for line in lines]


def _losses(records):
  return {record['step']: record['loss'] for record in records if 'loss' in record}


def _alone(folder, bindings, monkeypatch):
  """Trains in this process on its 8 devices; returns the metrics by step."""
  shown = []
  monkeypatch.setattr(
    reporting.Reporter, 'metrics', lambda _, step, values: shown.append({'step': step, **values})
  )
  gin_config.parse([GENERATOR], bindings)
  train_loop.train(str(folder))
  return shown


@pytest.fixture(name='bindings')
def _bindings(generator_bindings):
  return [
    *generator_bindings,
    'train.log_every = 1',
    'train.data_shares = 4',
    'train.seed = 3',
    'drop_text.rate = 0.3',
    'PartiConfig.encoder_layers = 1',
    'PartiConfig.decoder_layers = 1',
  ]


@pytest.fixture(name='tokenizer_run')
def _tokenizer_run(tmp_path):
  """A run of the tiny tokenizer at step 0."""
  objective = tokenizer_objective.TokenizerObjective(
    vit_vqgan.ViTVQGANConfig(
      image_size=16,
      patch_size=4,
      encoder_layers=1,
      encoder_width=16,
      encoder_mlp_width=16,
      encoder_heads=2,
      decoder_layers=1,
      decoder_width=16,
      decoder_mlp_width=16,
      decoder_heads=2,
      codebook_size=64,
      code_dim=4,
      dtype='float32',
    )
  )
  untrained = trainer.Trainer(objective, optax.sgd(0.1), mesh_lib.make_mesh())
  saved = checkpoint_manager.Checkpoints(tmp_path / 'tokenizer')
  saved.save(0, untrained.create_state(), {}, run_checkpoints.describe(objective))
  saved.close()
  return tmp_path / 'tokenizer'


_READS_ALONE = """
import pathlib, sys, time
import jax
from parti_jax.training.objectives import frozen_tokenizer
port, index, run, done = sys.argv[1:]
jax.distributed.initialize('127.0.0.1:' + port, 2, int(index))
assert jax.process_count() == 2
done = pathlib.Path(done)
if index == '0':
  device = jax.local_devices()[1]
  found = frozen_tokenizer.load(run, device)
  assert all(leaf.devices() == {device} for leaf in jax.tree.leaves(found.params))
  done.write_text(str(found.config.codebook_size))
while not done.exists():
  time.sleep(0.1)
"""


def test_one_process_of_two_may_read_a_tokenizer(tmp_path, tokenizer_run):
  # With Orbax's defaults it would wait for the other process forever.
  environment = os.environ | {
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'PYTHONPATH': str(REPOSITORY),
  }
  port, done = str(_free_port()), tmp_path / 'done'
  started = [
    subprocess.Popen(
      [sys.executable, '-c', _READS_ALONE, port, str(index), str(tokenizer_run), str(done)],
      env=environment,
    )
    for index in range(2)
  ]
  try:
    assert _ended(started, 120) == [0, 0]
  finally:
    for process in started:
      process.kill()
      process.wait()
  assert done.read_text(encoding='utf-8') == '64'


def test_four_processes_then_two_train_as_one_does(
  initialized, tmp_path, monkeypatch, start, bindings, tokenizer_run
):
  # Four processes. Both processes of a pair hold the same rows, since `tensor` spans them.
  four = start(
    'four',
    4,
    2,
    dies=(2, 'KILL', 4),
    bindings=[
      *bindings,
      'train.steps = 1000',
      'train.checkpoint_every = 3',
      'train.eval_split = None',
      'make_mesh.data = 2',
      'make_mesh.tensor = 4',
    ],
  )
  whole = _alone(
    tmp_path / 'alone',
    [*bindings, 'train.steps = 6', 'train.checkpoint_every = 0', 'train.evaluate_every = 4'],
    monkeypatch,
  )
  # Process 2 is killed after step 4: the others end and say why.
  statuses = _ended(four)
  assert statuses == [1, 1, 137, 1]
  for index in (0, 1, 3):
    shown = (tmp_path / f'four.{index}.log').read_text(encoding='utf-8').strip()
    assert shown.splitlines()[-1].startswith(
      "parti-jax: error: process 2 of this run died or can't be reached; start all"
    ), shown
  four_records = _records(tmp_path, 'four')
  expected, losses = _losses(whole), _losses(four_records)
  assert len(expected) == 6 and set(losses) >= {1, 2, 3, 4}
  for step in losses:
    assert losses[step] == pytest.approx(expected[step], rel=1e-5), step
  saved = next(record for record in four_records if record.get('saves') == 3)
  assert saved['places'] == [[1, 1]] * 4  # Six of five in each.

  # One process resumes from a copy of their checkpoint, on another mesh.
  one_folder = tmp_path / 'one'
  shutil.copytree(tmp_path / 'run', one_folder)
  # Two processes resume from it, on a third mesh, until one of them gets SIGTERM.
  drawing = [
    f"GeneratorObjective.tokenizer = '{tokenizer_run}'",
    'train.pictures_every = 5',
    'train.num_pictures = 3',
    'train.evaluate_every = 4',
    'train.allow_mismatch = True',
  ]
  two = start(
    'two',
    2,
    4,
    dies=(1, 'TERM', 5),
    bindings=[
      *(binding for binding in bindings if 'data_shares' not in binding),
      *drawing,
      'train.steps = 1000',
      'train.checkpoint_every = 1000',
      'make_mesh.fsdp = 2',
      'make_mesh.tensor = 2',
    ],
  )
  one = _alone(
    one_folder,
    [*bindings, *drawing, 'train.steps = 5', 'train.checkpoint_every = 0', 'make_mesh.fsdp = 8'],
    monkeypatch,
  )
  assert _ended(two) == [preemption.STATUS] * 2, (tmp_path / 'two.0.log').read_text(
    encoding='utf-8'
  )
  two_records = _records(tmp_path, 'two')
  assert two_records[0] == {'begins': 3, 'digest': saved['digest'], 'places': saved['places']}
  for records in (one, two_records):
    losses = _losses(records)
    assert set(losses) >= {4, 5} and 3 not in losses
    for step in set(losses) & set(expected):
      assert losses[step] == pytest.approx(expected[step], rel=1e-5), step
    measured = next(record['validation/loss'] for record in records if 'validation/loss' in record)
    assert measured == pytest.approx(
      next(record['validation/loss'] for record in whole if 'validation/loss' in record), rel=1e-5
    )
  last = [record for record in two_records if 'saves' in record][-1]
  checkpoint = epath.Path(tmp_path / 'run' / 'checkpoints' / str(last['saves']))
  assert manifest.fault(checkpoint) is None
  written = checkpoint / 'state' / 'ocdbt.process_1' / 'manifest.ocdbt'
  assert written.exists() and 'ocdbt.process_1' in (checkpoint / manifest.NAME).read_text()
  assert f'a checkpoint of step {last["saves"]} is written' in (tmp_path / 'two.0.log').read_text()
  drawn = [
    np.asarray(Image.open(folder / 'pictures' / 'samples_00000005.png'), np.int32)
    for folder in (tmp_path / 'run', one_folder)
  ]
  assert drawn[0].shape == drawn[1].shape and drawn[0].min() < 255
  # The real pictures, left in each pair, don't depend on the samples.
  np.testing.assert_allclose(drawn[0][:16, :16], drawn[1][:16, :16], atol=1)


def test_a_missing_coordinator_is_named(tmp_path, start, bindings):
  port = _free_port()
  # The last flags override those of `start`.
  started = start(
    'lost',
    1,
    1,
    bindings,
    flags=[
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      '--process_id=1',
      '--connect_timeout=3',
    ],
  )
  assert _ended(started) == [1]
  shown = (tmp_path / 'lost.0.log').read_text(encoding='utf-8').strip()
  assert shown.startswith(
    f'parti-jax: error: the coordinator 127.0.0.1:{port} did not answer within 3 s'
  ), shown
  assert '\n' not in shown and not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
  'flags, words',
  [
    (['--num_processes=2'], ['--coordinator and --process_id not given']),
    (['--coordinator=a:1', '--num_processes=2'], ['--process_id not given']),
    (['--coordinator=a', '--num_processes=2', '--process_id=0'], ['--coordinator=a', 'HOST:PORT']),
    (['--coordinator=a:99999', '--num_processes=2', '--process_id=0'], ['a:99999', 'HOST:PORT']),
    (['--coordinator=a:1', '--num_processes=2', '--process_id=2'], ['--process_id=2', '0 to 1']),
    (['--coordinator=a:1', '--num_processes=0', '--process_id=0'], ['--num_processes=0']),
    (
      ['--coordinator=a:1', '--num_processes=1', '--process_id=0', '--multi_host'],
      ['--multi_host', '--coordinator'],
    ),
    (['--connect_timeout=0'], ['--connect_timeout=0']),
  ],
)
def test_invalid_flags(tmp_path, capsys, flags, words):
  run = f'--model_dir={tmp_path / "run"}'
  status = main.main(['train', f'--gin_file={GENERATOR}', run, *flags])
  shown = capsys.readouterr().err.strip()
  assert status == 2 and '\n' not in shown and all(word in shown for word in words), shown


@pytest.mark.parametrize(
  'environment, several',
  [
    ({}, False),
    ({'SLURM_STEP_NUM_TASKS': '1'}, False),
    ({'SLURM_STEP_NUM_TASKS': '8'}, True),
    ({'TPU_WORKER_HOSTNAMES': 'localhost'}, False),
    ({'TPU_WORKER_HOSTNAMES': 'a-0,a-1'}, True),
  ],
)
def test_the_environment_names_other_processes(monkeypatch, environment, several):
  for name in ('SLURM_STEP_NUM_TASKS', 'TPU_WORKER_HOSTNAMES'):
    monkeypatch.delenv(name, raising=False)
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  parser = argparse.ArgumentParser()
  distributed.add_arguments(parser)
  found = distributed.processes(parser.parse_args([]))
  assert found == (distributed.Processes(None, None, None, 300) if several else None)
  assert distributed.processes(parser.parse_args(['--multi_host'])) is not None


@pytest.mark.parametrize(
  'connected, process, words, expected',
  [
    (False, 1, 'absl::Status: ALREADY_EXISTS: Aborted', 'has the same --process_id=1'),
    (False, 1, 'absl::Status: INVALID_ARGUMENT: Unexpected task registered', 'fewer processes'),
    (
      False,
      0,
      'absl::Status: DEADLINE_EXCEEDED: Deadline',
      'not all of the 4 processes connected to',
    ),
    (False, 1, 'absl::Status: UNKNOWN: no\nroute\n\nRPC: x', 'refused this process: UNKNOWN: no r'),
    (
      True,
      1,
      'UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n2, 3\n'
      'The tasks have crashed',
      "process 2, 3 of this run died or can't be reached; start all",
    ),
    (True, 1, 'Failed to send RPC to coordination service', 'process 0 of this run, the coord'),
  ],
)
def test_the_runtimes_messages_are_explained(connected, process, words, expected):
  watched = supervisor.WatchedProcess()
  if connected:
    watched.connect()
  line = distributed.explanation(distributed.Processes('a:1', 4, process, 300), watched, words)
  assert expected in line and '\n' not in line


def test_shares_that_do_not_fit_are_reported_in_one_line(tmp_path, capsys, generator_bindings):
  given = [f'--gin.{binding}' for binding in [*generator_bindings, 'train.data_shares=3']]
  status = main.main(['train', f'--gin_file={GENERATOR}', f'--model_dir={tmp_path / "r"}', *given])
  shown = capsys.readouterr().err.strip()
  assert status == 2 and 'train.batch_size=8 is not divisible by train.data_shares=3' in shown
  assert not (tmp_path / 'r').exists()

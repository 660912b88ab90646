"""Tests `parti-jax tokenize` in several processes that are killed at random."""

import io
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

import parti_jax
from parti_jax.data import token_cache_info
from parti_jax.runs import preemption

pytestmark = pytest.mark.process

REPOSITORY = pathlib.Path(parti_jax.__file__).parents[1]
DEMO = REPOSITORY / 'parti_jax' / 'demo'
WORKERS, KILLS = 4, 20


def _make_tars(folder, count, examples):
  rng = np.random.default_rng(0)
  folder.mkdir()
  for number in range(count):
    with tarfile.open(folder / f'{number:03d}.tar', 'w') as tar:
      for index in range(examples):
        data = io.BytesIO()
        pixels = rng.integers(0, 256, (8, 8, 3), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(pixels).save(data, 'jpeg')
        picture = b'none' if (number, index) == (3, 3) else data.getvalue()
        for ending, content in (('jpg', picture), ('txt', f'{number} {index}'.encode())):
          member = tarfile.TarInfo(f'{index:04d}.{ending}')
          member.size = len(content)
          tar.addfile(member, io.BytesIO(content))


@pytest.fixture(name='start')
def _start(tmp_path):
  """Starts the command on the tars; appends its output to the file `log`."""
  started = []

  def start(folder, *flags, devices=1):
    environment = os.environ | {
      'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}',
      'PYTHONPATH': os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')]),
    }
    with open(tmp_path / 'log', 'a', encoding='utf-8') as log:
      started.append(
        subprocess.Popen(
          [
            sys.executable,
            '-m',
            'parti_jax.cli.main',
            'tokenize',
            '--gin_file=gin_configs/tasks/webdataset.gin',
            f"--gin.webdataset.path='{tmp_path}/tars'",
            "--gin.webdataset.splits={'train': '*.tar'}",
            '--gin.loader.num_threads=2',
            f'--tokenizer={DEMO}',
            f'--output_dir={folder}',
            *flags,
          ],
          stdout=log,
          stderr=log,
          env=environment,
          cwd=REPOSITORY,
        )
      )
    return started[-1]

  yield start
  for process in started:
    process.kill()
    process.wait()


def _content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def _said(tmp_path):
  return (tmp_path / 'log').read_text(encoding='utf-8')


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_change_no_byte(start, tmp_path):
  _make_tars(tmp_path / 'tars', 24, 100)
  whole = start(tmp_path / 'whole')
  assert whole.wait(600) == 0, _said(tmp_path)
  expected, random_ = _content(tmp_path / 'whole'), random.Random(0)
  kills = rounds = 0
  while kills < KILLS:  # Needs more than one round if everything is done before that many kills.
    rounds += 1
    folder = tmp_path / f'round{rounds}'
    flags = [f'--worker={worker}/{WORKERS}' for worker in range(WORKERS)]
    running = [start(folder, flag) for flag in flags]
    began = time.monotonic()
    while any(process.poll() is None for process in running):
      time.sleep(random_.uniform(0.5, 5))
      alive = [worker for worker, process in enumerate(running) if process.poll() is None]
      if alive and kills < KILLS and (folder / '.train.parts').exists():
        victim = random_.choice(alive)
        running[victim].kill()
        if running[victim].wait(60) == -signal.SIGKILL:
          kills += 1
        running[victim] = start(folder, flags[victim])
      assert time.monotonic() - began < 900, _said(tmp_path)
    statuses = [process.wait() for process in running]
    assert statuses == [0] * WORKERS, _said(tmp_path)
    assert _content(folder) == expected
  split = token_cache_info.read_info(str(folder))['splits']['train']
  assert split['examples'] == 2399 and split['skipped'] == {'unknown picture format': 1}


@pytest.mark.slow
def test_connected_processes_write_the_same(start, tmp_path):
  """Tests processes connected like a slice's hosts, with more devices than the single process."""
  _make_tars(tmp_path / 'tars', 5, 30)
  whole = start(tmp_path / 'whole')
  assert whole.wait(600) == 0, _said(tmp_path)
  with socket.socket() as taken:
    taken.bind(('127.0.0.1', 0))
    port = taken.getsockname()[1]
  flags = [f'--coordinator=127.0.0.1:{port}', '--num_processes=2']
  running = [
    start(tmp_path / 'two', *flags, f'--process_id={process}', devices=2) for process in range(2)
  ]
  assert [process.wait(600) for process in running] == [0, 0], _said(tmp_path)
  assert _content(tmp_path / 'two') == _content(tmp_path / 'whole')


@pytest.mark.slow
def test_sigterm_ends_it_at_once_and_it_resumes_later(start, tmp_path):
  _make_tars(tmp_path / 'tars', 8, 200)
  first = start(tmp_path / 'tokens')
  end = time.monotonic() + 300
  while not list((tmp_path / 'tokens').glob('.train.parts/*-00001.json')):
    assert first.poll() is None and time.monotonic() < end, _said(tmp_path)
    time.sleep(0.05)
  first.send_signal(signal.SIGTERM)
  assert first.wait(60) == preemption.STATUS, _said(tmp_path)
  assert 'asked to stop by SIGTERM; finished parts are kept; start' in _said(tmp_path)
  finished = {
    path.name: path.stat().st_mtime_ns for path in (tmp_path / 'tokens').glob('.train.parts/*.json')
  }
  assert len(finished) > 2  # Files of two parts, and the file with their settings.
  assert not (tmp_path / 'tokens' / 'info.json').exists()
  assert start(tmp_path / 'tokens').wait(600) == 0, _said(tmp_path)
  assert token_cache_info.read_info(str(tmp_path / 'tokens'))['splits']['train']['examples'] == 1599

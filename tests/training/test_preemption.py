"""Tests how a listening process reacts to SIGTERM and to notices, without a model."""

import http.server
import os
import pathlib
import re
import signal
import subprocess
import sys
import textwrap
import threading

import pytest
import xla_flags

from parti_jax.checkpoints import run_checkpoints as run_checkpoints
from parti_jax.cli import main
from parti_jax.runs import gce_notice
from parti_jax.runs import preemption
from parti_jax.runs import run_lock
from parti_jax.training import configurables  # noqa: F401

# Fakes a run's journal and its newest checkpoint; each test has its own loop.
_BEGINNING = """
import os, signal, sys, time
from parti_jax.runs import preemption
preemption._TOGETHER = 0.5
class Journal:
  def write(self, event, text='', **facts):
    print('journal:', event, text, file=sys.stderr)
term = lambda: os.kill(os.getpid(), signal.SIGTERM)
def steps(seconds, newest):
  preemption.begin(seconds, Journal(), newest)
  preemption._listener.reach(0)
  preemption._listener.reach(1)
with preemption.listening():
"""


def _run(body):
  """Runs `body` within `listening`; returns the exit status and the lines on stderr."""
  program = _BEGINNING + textwrap.indent(textwrap.dedent(body), '  ')
  done = subprocess.run(
    [sys.executable, '-c', program], capture_output=True, text=True, check=False, timeout=60
  )
  return done.returncode, done.stderr.splitlines()


def test_status_asks_for_another_start():
  assert preemption.STATUS == os.EX_TEMPFAIL == 75


@pytest.mark.process
def test_during_the_start_it_ends_at_once():
  # stderr is redirected, as during the import of TensorFlow.
  status, said = _run('os.dup2(os.open(os.devnull, os.O_WRONLY), 2); term(); time.sleep(30)')
  assert status == 75 and said == [
    'parti-jax: asked to stop before the first step was done; the run is unchanged; '
    'start again to resume'
  ]


@pytest.mark.process
def test_while_it_trains_the_loop_is_asked_to_stop_and_ends_by_itself():
  status, said = _run("""
      steps(20, lambda: 5)
      assert not preemption._listener.stopping
      term(); term()  # A process group gets two signals: its own and the parent's.
      while not preemption._listener.stopping:
        time.sleep(0.01)
      time.sleep(0.3)
      sys.exit(preemption.STATUS)""")
  assert status == 75 and said == ['journal: asked to stop asked to stop by SIGTERM, 20 s to save']


@pytest.mark.process
def test_after_the_grace_period_it_ends_regardless_of_the_main_thread():
  status, said = _run("""
      steps(0.4, lambda: 5)
      term()
      try:
        time.sleep(30)
      finally:
        print('never')""")
  assert status == 75 and said[-1] == (
    'parti-jax: asked to stop, but the step and its checkpoint took more than the 0.4 s of '
    'train.grace_seconds; the last whole checkpoint is the one of step 5; '
    'start again to resume'
  )
  assert said[-2].startswith('journal: stop asked to stop, but') and 'never' not in said


@pytest.mark.process
def test_a_second_signal_ends_at_once_even_if_the_disk_hangs():
  status, said = _run("""
      preemption._LAST_SECONDS = 0.2
      steps(60, lambda: time.sleep(60))
      term(); time.sleep(1); term(); time.sleep(30)""")
  assert status == 75 and said[-1] == (
    'parti-jax: asked to stop a second time: ended at once; the last whole checkpoint is kept; '
    'start again to resume'
  )


@pytest.mark.process
def test_without_the_command_line_the_signal_ends_a_process_as_usual():
  done = subprocess.run(
    [
      sys.executable,
      '-c',
      textwrap.dedent("""
      import os, signal
      from parti_jax.runs import preemption
      before = signal.getsignal(signal.SIGTERM)
      with preemption.listening():
        pass
      assert signal.getsignal(signal.SIGTERM) == before
      preemption.end_process(2, 'not said')
      os.kill(os.getpid(), signal.SIGTERM)"""),
    ],
    capture_output=True,
    check=False,
    timeout=60,
  )
  assert done.returncode == -signal.SIGTERM and not done.stderr


@pytest.mark.process
def test_a_run_saves_at_sigterm_and_refuses_a_second_run(tmp_path, capsys, generator_bindings):
  folder = tmp_path / 'run'
  arguments = [
    'train',
    '--gin_file=gin_configs/runs/tiny_generator.gin',
    f'--model_dir={folder}',
    *(
      f'--gin.{binding}'
      for binding in (
        *generator_bindings,
        'train.steps = 100000',
        'train.log_every = 1',
        'PartiConfig.encoder_layers = 1',
        'PartiConfig.decoder_layers = 1',
      )
    ),
  ]
  repository = pathlib.Path(preemption.__file__).parents[2]
  with subprocess.Popen(
    [sys.executable, '-m', 'parti_jax.cli.main', *arguments],
    cwd=repository,
    text=True,
    env=os.environ | {'XLA_FLAGS': ' '.join(xla_flags.of(devices=1))},
    stderr=subprocess.PIPE,
  ) as running:
    for line in running.stderr:
      if line.startswith('step 2:'):
        break
    assert main.main(arguments) == 2
    shown = capsys.readouterr().err
    assert f'another run trains in this folder: process {running.pid} on host' in shown, shown
    running.send_signal(signal.SIGTERM)
    said = [line for line in running.stderr if not line.startswith('step ')]
  assert running.returncode == preemption.STATUS, said
  step = int(
    re.fullmatch(
      r'asked to stop: a checkpoint of step (\d+) is written; start again to resume\n', said[-1]
    )[1]
  )
  assert step >= 2 and run_checkpoints.latest_checkpoint(folder).name == str(step)
  assert not (folder / run_lock.FILE).exists()
  assert 'asked to stop by SIGTERM, 25 s to save' in ''.join(
    path.read_text(encoding='utf-8') for path in (folder / 'journal').iterdir()
  )


@pytest.fixture(name='metadata_server')
def _metadata_server(monkeypatch):
  """A fake metadata server of Google Compute Engine; `change` preempts the machine."""
  changed, asked = threading.Event(), []

  class Handler(http.server.BaseHTTPRequestHandler):
    """Answers FALSE; answers requests that wait for a change with TRUE after it."""

    def do_GET(self):
      asked.append((self.path, self.headers['Metadata-Flavor']))
      waits = 'wait_for_change=true' in self.path
      if waits:
        changed.wait(10)
      body = b'TRUE' if waits else b'FALSE'
      self.send_response(200)
      self.send_header('ETag', 'tag1')
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *_):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  monkeypatch.setenv('GCE_METADATA_HOST', f'127.0.0.1:{server.server_port}')
  server.change, server.asked = changed.set, asked
  yield server
  server.shutdown()
  server.server_close()


def test_the_notice_of_google_compute_engine(metadata_server):
  told, sources = threading.Event(), []
  gce_notice.watch(lambda source: (sources.append(source), told.set()))
  assert not told.wait(0.3)
  metadata_server.change()
  assert told.wait(10) and sources == ['the notice of Google Compute Engine']
  first, second = metadata_server.asked
  assert first == ('/computeMetadata/v1/instance/preempted', 'Google')
  assert 'wait_for_change=true' in second[0] and second[0].endswith('last_etag=tag1')


def test_outside_of_gce_it_does_not_wait_for_a_notice(monkeypatch, tmp_path):
  monkeypatch.delenv('GCE_METADATA_HOST', raising=False)
  monkeypatch.setattr(gce_notice, '_PRODUCT', tmp_path / 'product_name')
  before = threading.active_count()
  gce_notice.watch(lambda source: None)
  (tmp_path / 'product_name').write_text('KVM\n')
  gce_notice.watch(lambda source: None)
  assert threading.active_count() == before

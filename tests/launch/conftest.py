"""A checkout with a commit, and a cloud of two hosts that run what the scripts send them."""

import os
import pathlib
import shutil
import subprocess
import types

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]
SLICE = ('--name=parti', '--zone=us-central2-b', '--project=pictures')

# What a host's environment has: pip has nothing to do, and a run lasts until it is told a status.
_PARTI_JAX = """#!/bin/bash
printf '<%s>\\n' "$@" >"$HOME/written" && mv "$HOME/written" "$HOME/arguments"
echo 'loss 9.0'
until [[ -f $HOME/end ]]; do sleep 0.05; done
exit "$(cat "$HOME/end")"
"""


def _write_program(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


class Cloud:
  """The folder of fake_gcloud.sh."""

  def __init__(self, folder, checkout):
    self.folder, self.checkout = folder, checkout
    for name, text in (('account', 'me\n'), ('next_state', 'ACTIVE\n'), ('calls', '')):
      folder.mkdir(exist_ok=True)
      (folder / name).write_text(text)
    _write_program(
      folder / 'bin' / 'gcloud', (pathlib.Path(__file__).parent / 'fake_gcloud.sh').read_text()
    )
    _write_program(folder / 'host_bin' / 'hostname', '#!/bin/sh\necho "$HOST"\n')
    binaries = folder / 'new_host' / 'parti_jax' / 'venv' / 'bin'
    _write_program(binaries / 'python', '#!/bin/sh\necho "Installing $*"\n')
    _write_program(binaries / 'pip', '#!/bin/sh\n')
    _write_program(binaries / 'parti-jax', _PARTI_JAX)

  def environment(self, **variables):
    return {
      'PATH': f'{self.folder / "bin"}:{os.environ["PATH"]}',
      'HOME': str(self.folder),
      'FAKE_CLOUD': str(self.folder),
      'TPU_POLL_SECONDS': '0.2',
      **variables,
    }

  def run(self, script, *arguments, **variables):
    """Runs one of the scripts of launch/tpu_vm as on a computer that can reach the cloud."""
    return subprocess.run(
      [self.checkout / 'launch' / 'tpu_vm' / script, *arguments],
      capture_output=True,
      text=True,
      check=False,
      timeout=60,
      env=self.environment(**variables),
    )

  def must(self, script, *arguments, **variables):
    """The same of a script that has to succeed; returns what it prints."""
    done = self.run(script, *SLICE, *arguments, **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout

  def hosts(self):
    return sorted((self.folder / 'hosts').glob('*'))

  def calls(self, word):
    return [line for line in (self.folder / 'calls').read_text().splitlines() if word in line]


@pytest.fixture(name='write_program')
def _program_writer():
  return _write_program


@pytest.fixture(name='checkout')
def _checkout(tmp_path):
  folder = tmp_path / 'checkout'
  shutil.copytree(REPOSITORY / 'launch', folder / 'launch')
  for name in ('parti_jax', 'gin_configs'):
    (folder / name).mkdir()
    (folder / name / 'file').write_text('1')
  for name in ('setup.cfg', 'pyproject.toml'):
    (folder / name).write_text('')
  git = ('git', '-C', folder, '-c', 'user.name=me', '-c', 'user.email=me')
  for command in (('init', '-q'), ('add', '.'), ('commit', '-q', '-m', 'All')):
    subprocess.run([*git, *command], check=True)
  return folder


@pytest.fixture(name='cloud')
def _cloud(tmp_path, checkout):
  cloud = Cloud(tmp_path / 'cloud', checkout)
  yield cloud
  for host in cloud.hosts():
    (host / 'end').write_text('0')
    lock = host / 'parti_jax' / 'lock'
    if lock.exists():
      subprocess.run(['flock', '--timeout', '10', lock, 'true'], check=True)


@pytest.fixture(name='head')
def _head(checkout):
  return subprocess.run(
    ['git', '-C', checkout, 'rev-parse', 'HEAD'], check=True, text=True, capture_output=True
  ).stdout.strip()


@pytest.fixture(name='started')
def _started(cloud):
  """A cloud with a run on both hosts."""
  arguments = (
    '--gin_file=a.gin',
    '--model_dir=gs://pictures/run',
    "--gin.train.task='cached_tokens'",
  )
  cloud.must('create.sh', '--type=v4-16', '--spot')
  cloud.must('install.sh')
  cloud.must('run.sh', *arguments)
  return types.SimpleNamespace(cloud=cloud, arguments=arguments)

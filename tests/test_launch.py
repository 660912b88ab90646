"""What shellcheck says of all scripts, and what those at the top of launch/ do with arguments."""

import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

pytestmark = pytest.mark.process

REPOSITORY = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted(
  path
  for path in [
    *(REPOSITORY / 'launch').rglob('*'),
    *(REPOSITORY / 'benchmarks').rglob('*'),
    *(REPOSITORY / '.ci').iterdir(),
  ]
  if path.suffix in ('.sh', '.sbatch') or path == REPOSITORY / '.ci' / 'run'
)


@pytest.fixture(name='checkout')
def _checkout(tmp_path):
  """A small checkout, and an environment whose pip and parti-jax only say what they are given."""
  checkout = tmp_path / 'checkout'
  shutil.copytree(REPOSITORY / 'launch', checkout / 'launch')
  for folder in ('parti_jax', 'gin_configs'):
    (checkout / folder).mkdir()
    (checkout / folder / 'file').write_text('1')
  for name in ('setup.cfg', 'pyproject.toml'):
    (checkout / name).write_text('')
  binaries = checkout / '.venv' / 'bin'
  binaries.mkdir(parents=True)
  for name, says in (('python', 'Installing'), ('pip', 'pip'), ('parti-jax', 'command')):
    (binaries / name).write_text(f'#!/bin/sh\nprintf "%s" "{says}"\nprintf " <%s>" "$@"\necho\n')
    (binaries / name).chmod(0o755)
  return checkout


def _run(checkout, script, *arguments, **variables):
  environment = {
    name: value for name, value in os.environ.items() if name not in ('PARTI_JAX_VENV', 'PYTHON')
  }
  return subprocess.run(
    [checkout / 'launch' / script, *arguments],
    capture_output=True,
    text=True,
    env={**environment, **variables},
    check=False,
  )


def test_shellcheck_finds_nothing():
  assert {'run', 'quickstart.sh', 'create.sh', 'train.sbatch'} <= {path.name for path in SCRIPTS}
  shellcheck = pathlib.Path(sysconfig.get_path('scripts')) / 'shellcheck'
  done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True, check=False)
  assert done.returncode == 0, done.stdout + done.stderr


def test_quickstart_installs_once_and_passes_arguments_on(checkout):
  first = _run(checkout, 'quickstart.sh', 'a  "quoted" prompt', '--seed=3')
  assert first.returncode == 0, first.stderr
  assert 'Installing <-m> <pip>' in first.stdout and '<.>' in first.stdout
  called = 'command <generate> <a  "quoted" prompt> <--seed=3>'
  assert first.stdout.splitlines()[-1] == called
  assert _run(checkout, 'quickstart.sh', 'a  "quoted" prompt', '--seed=3').stdout == called + '\n'


@pytest.mark.parametrize('changed', ['parti_jax/new', 'gin_configs/file', 'setup.cfg'])
def test_quickstart_installs_again_after_a_change(checkout, changed):
  _run(checkout, 'quickstart.sh', 'x')
  (checkout / changed).write_text('2')
  assert 'Installing' in _run(checkout, 'quickstart.sh', 'x').stdout


def test_quickstart_without_a_prompt_takes_the_examples(checkout):
  done = _run(checkout, 'quickstart.sh')
  assert done.stdout.splitlines()[-1].endswith('<woman firefighter: dark skin tone>')


def test_quickstart_fails_when_pip_fails(checkout):
  (checkout / '.venv' / 'bin' / 'python').write_text('#!/bin/sh\necho no network >&2\nexit 1\n')
  for _ in range(2):
    done = _run(checkout, 'quickstart.sh', 'x')
    assert done.returncode == 2
    assert 'no network' in done.stderr and 'pip could not install' in done.stderr
    assert 'command' not in done.stdout


def test_a_public_model_is_fetched_imported_and_drawn_once(checkout):
  done = _run(checkout, 'public_model.sh', 'dalle_mini', 'a  cat', '--seed=3', EXTRAS='gpu')
  assert done.returncode == 0, done.stderr
  model = checkout / 'runs' / 'public' / 'dalle_mini'
  files = checkout / 'runs' / 'public' / 'files'
  # The line that names the extras is cut.
  assert list((checkout / '.venv').glob('parti_jax_installed_*_hub_tokenizers_gpu_'))
  fetch = f'Installing <{checkout}/launch/fetch_from_hub.py>'
  draw = f'command <generate> <a  cat> <--seed=3> <--model={model}>'
  *fetched, imported, drawn = done.stdout.splitlines()[-4:]
  assert fetched == [
    f'{fetch} <dalle-mini/dalle-mini> <{files}/dalle_mini> <flax_model.msgpack> <config.json> '
    '<vocab.json> <merges.txt>',
    f'{fetch} <dalle-mini/vqgan_imagenet_f16_16384> <{files}/vqgan> <flax_model.msgpack>',
  ]
  assert imported.startswith(
    f'command <import> <generator> <{files}/dalle_mini/flax_model.msgpack> <--format=dalle-mini> '
    f'<--tokenizer={files}/vqgan/flax_model.msgpack>'
  )
  assert drawn == draw
  model.mkdir(parents=True)
  (model / 'config.json').write_text('{}')
  again = _run(checkout, 'public_model.sh', 'dalle_mini', 'a  cat', '--seed=3', EXTRAS='gpu')
  assert again.stdout == draw + '\n'
  other = _run(checkout, 'public_model.sh', 'dalle_maxi', 'a cat')
  assert other.returncode == 2
  assert other.stderr == (
    'public_model.sh: error: dalle_maxi is not one of dalle_mini, dalle_mega\n'
  )


_FETCH = REPOSITORY / 'launch' / 'fetch_from_hub.py'


def _fetch(*arguments, **variables):
  return subprocess.run(
    [sys.executable, _FETCH, *arguments],
    capture_output=True,
    text=True,
    env={**os.environ, **variables},
    check=False,
  )


def test_without_a_connection_one_line_says_so(tmp_path):
  pytest.importorskip('huggingface_hub')
  variables = {'HF_ENDPOINT': 'http://127.0.0.1:9', 'HF_HOME': str(tmp_path / 'home')}
  done = _fetch('dalle-mini/dalle-mini', str(tmp_path / 'files'), 'config.json', **variables)
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith(
    'fetch_from_hub.py: error: dalle-mini/dalle-mini cannot be fetched; is there a connection to '
    'huggingface.co?'
  )
  assert not (tmp_path / 'files' / 'config.json').exists()


@pytest.mark.parametrize(
  'digest, file, says',
  [
    ('as published', 'a.bin', ''),
    ('of another', 'a.bin', "a.bin doesn't have the SHA-256 that owner/name publishes"),
    ('as published', 'b.bin', 'owner/name has no b.bin'),
  ],
)
def test_files_are_compared_with_the_digests_of_the_hub(tmp_path, digest, file, says):
  """With a stand-in for the library, whose repository has one file."""
  published = hashlib.sha256(b'1' if digest == 'as published' else b'2').hexdigest()
  (tmp_path / 'huggingface_hub.py').write_text(
    'import os\nimport types\n'
    f'lfs = types.SimpleNamespace(sha256={published!r})\n'
    "known = [types.SimpleNamespace(path='a.bin', lfs=lfs)]\n"
    'class HfApi:\n'
    '  def get_paths_info(self, repository, files):\n'
    '    return [found for found in known if found.path in files]\n'
    'def hf_hub_download(repository, file, local_dir):\n'
    '  os.makedirs(local_dir)\n'
    '  path = os.path.join(local_dir, file)\n'
    "  open(path, 'w').write('1')\n"
    '  return path\n'
  )
  done = _fetch('owner/name', str(tmp_path / 'files'), file, PYTHONPATH=str(tmp_path))
  assert done.returncode == (1 if says else 0)
  assert says in done.stderr
  assert bool(done.stderr) == bool(says)


def test_test_installs_the_extra_and_passes_arguments_on(checkout):
  done = _run(checkout, 'test.sh', '-m', 'slow')
  assert done.returncode == 0, done.stderr
  assert '<.[test]>' in done.stdout
  assert done.stdout.splitlines()[-1].endswith(
    '<pytest> <--numprocesses=auto> <--maxprocesses=4> <--dist=loadfile> <--no-loadscope-reorder> '
    '<-m> <slow>'
  )


def test_test_takes_the_lowest_versions_in_an_environment_of_their_own(checkout):
  (checkout / '.venv').rename(checkout / '.venv_lowest')
  done = _run(checkout, 'test.sh', '--lowest', 'tests/cli/test_main.py')
  assert done.returncode == 0, done.stderr
  installing = [line for line in done.stdout.splitlines() if 'Installing <' in line]
  assert installing[0].endswith(' <uv>')
  assert '<uv> <pip> <install> <--upgrade> <--resolution> <lowest-direct>' in installing[1]
  assert done.stdout.splitlines()[-1].endswith('<--no-loadscope-reorder> <tests/cli/test_main.py>')
  assert not (checkout / '.venv').exists()


def test_a_python_that_will_not_do_is_named(checkout):
  done = _run(
    checkout,
    'quickstart.sh',
    'x',
    PARTI_JAX_VENV=str(checkout / 'new'),
    PYTHON='/nonexistent/python3.11',
  )
  assert done.returncode == 2
  assert done.stderr.count('\n') == 1 and 'PYTHON=/nonexistent/python3.11' in done.stderr
  assert not (checkout / 'new').exists()


def test_no_python_at_all(checkout, tmp_path):
  tools = tmp_path / 'tools'
  tools.mkdir()
  for name in ('bash', 'dirname', 'basename', 'tr', 'env', 'cksum', 'find', 'sort'):
    (tools / name).symlink_to(shutil.which(name))
  done = _run(checkout, 'quickstart.sh', 'x', PARTI_JAX_VENV=str(checkout / 'new'), PATH=str(tools))
  assert done.returncode == 2
  assert 'quickstart.sh: error: needs Python 3.11, 3.12 or 3.13' in done.stderr


def test_makes_the_environment(checkout, tmp_path):
  """With a stand-in for Python that makes an environment of stand-ins."""
  stand_in = tmp_path / 'python3.11'
  stand_in.write_text(
    f'#!/bin/sh\ncase "$1 $2" in\n  "-m venv") cp -R "{checkout}/.venv" "$3" ;;\n'
    f'  *) exec "{sys.executable}" "$@" ;;\nesac\n'
  )
  stand_in.chmod(0o755)
  done = _run(
    checkout, 'quickstart.sh', 'x', PARTI_JAX_VENV=str(checkout / 'a new one'), PYTHON=str(stand_in)
  )
  assert done.returncode == 0, done.stderr
  assert 'Making a virtual environment' in done.stdout
  assert done.stdout.splitlines()[-1] == 'command <generate> <x>'


@pytest.mark.parametrize(
  'says, status, closing',
  [
    ('== 3 passed in 1.20s ==', 0, '== 3 passed in 1.20s =='),
    ('1 failed, 2 passed in 70.31s (0:01:10)', 1, '1 failed, 2 passed in 70.31s (0:01:10)'),
    ('no network', 2, 'pytest did not finish'),
  ],
)
def test_ci_gives_the_tests_status_and_closing_line(checkout, says, status, closing):
  shutil.copytree(REPOSITORY / '.ci', checkout / '.ci')
  (checkout / 'launch' / 'check.sh').write_text('#!/bin/sh\n')
  (checkout / 'launch' / 'test.sh').write_text(
    f'#!/bin/sh\nmkdir "$PARTI_JAX_VENV"\necho "$PARTI_JAX_VENV"\necho "{says}"\n'
    f'echo later\nexit {status}\n'
  )
  done = subprocess.run([checkout / '.ci' / 'run'], capture_output=True, text=True, check=False)
  assert done.returncode == status
  lines = done.stdout.splitlines()
  assert lines[-1] == f'tests: {closing}'
  assert not pathlib.Path(lines[0]).exists()  # Its environment is removed.


def test_ci_fails_with_the_checks_and_still_runs_the_tests(checkout):
  shutil.copytree(REPOSITORY / '.ci', checkout / '.ci')
  (checkout / 'launch' / 'check.sh').write_text('#!/bin/sh\nexit 2\n')
  (checkout / 'launch' / 'test.sh').write_text('#!/bin/sh\necho "3 passed in 1.20s"\n')
  done = subprocess.run([checkout / '.ci' / 'run'], capture_output=True, text=True, check=False)
  assert done.returncode == 2
  assert done.stdout.splitlines()[-2:] == ['checks: failed', 'tests: 3 passed in 1.20s']


def _write_tool(checkout, name, status=0):
  tool = checkout / '.venv' / 'bin' / name
  tool.write_text(f'#!/bin/sh\nprintf "%s" "{name}"\nprintf " <%s>" "$@"\necho\nexit {status}\n')
  tool.chmod(0o755)


def test_check_runs_every_check_and_names_those_that_fail(checkout):
  for name in ('ruff', 'mypy', 'codespell', 'mkdocs'):
    _write_tool(checkout, name)
  passed = _run(checkout, 'check.sh')
  assert passed.returncode == 0, passed.stderr
  assert '<.[dev]>' in passed.stdout
  _write_tool(checkout, 'codespell', status=65)
  failed = _run(checkout, 'check.sh')
  assert failed.returncode == 2
  assert failed.stderr == 'check.sh: error: these checks failed: codespell\n'
  _write_tool(checkout, 'mkdocs', status=1)
  failed = _run(checkout, 'check.sh')
  assert failed.returncode == 2
  assert failed.stderr == 'check.sh: error: these checks failed: codespell, mkdocs\n'
  called = failed.stdout.splitlines()
  assert called[-1] == 'mkdocs <build> <--strict>'
  assert 'ruff <check> <.>' in called and 'ruff <format> <--check> <.>' in called


def test_installations_with_other_extras_stay_valid(checkout):
  for name in ('ruff', 'mypy', 'codespell', 'mkdocs'):
    _write_tool(checkout, name)
  _run(checkout, 'check.sh')
  assert 'Installing' in _run(checkout, 'quickstart.sh', 'x').stdout
  assert 'Installing' not in _run(checkout, 'check.sh').stdout
  # The tests need less than the checks.
  assert 'Installing <-m> <pip>' not in _run(checkout, 'test.sh').stdout
  (checkout / 'setup.cfg').write_text('2')
  assert 'Installing <-m> <pip>' in _run(checkout, 'test.sh').stdout
  assert 'Installing' in _run(checkout, 'quickstart.sh', 'x').stdout
  assert 'Installing' in _run(checkout, 'check.sh').stdout

"""The package as a whole: what is installed, and which way its imports run."""

import ast
import configparser
import importlib.metadata
import importlib.util
import pathlib
import re
import subprocess
import sys

import pytest

import parti_jax
from parti_jax import config
from parti_jax import main
from parti_jax import optional_packages

PACKAGE = pathlib.Path(parti_jax.__file__).parent
REPOSITORY = pathlib.Path(__file__).parents[1]

# What each part of the package may import of the package, besides itself. `None`: anything.
_LEAVES = {'errors', 'checks', 'config', 'optional_packages', 'storage', 'compilation_cache',
           'native_notes', 'fingerprints', 'numerics', 'store_errors',
           'store_retries'}
_MAY_IMPORT = {
    'partitioning': {'checks', 'errors'},
    'models': {'partitioning', 'checks', 'errors', 'numerics'},
    'data': {'partitioning', *_LEAVES},
    'sampling': {'models', 'data', 'partitioning', *_LEAVES},
    'preparation': {'data', *_LEAVES},
    'planning': {'models', 'partitioning', 'sampling', 'training', *_LEAVES},
    'training': {'models', 'data', 'partitioning', 'sampling', *_LEAVES},
    'evaluation': {'models', 'data', 'partitioning', 'sampling', *_LEAVES},
    # For t5x' own commands; only the table of commands names it.
    't5x': {'training', 'evaluation', 'sampling', 'models', 'data', 'partitioning', *_LEAVES},
    'cli': {'training', 'evaluation', 'sampling', 'models', 'data', 'partitioning', 'main', *_LEAVES},
    'errors': set(),
    'checks': {'errors'},
    'optional_packages': set(),
    'compilation_cache': set(),
    'native_notes': set(),
    'fingerprints': set(),
    'numerics': {'errors'},
    'storage': {'errors', 'store_errors', 'store_retries', 'store_systems'},
    'store_errors': {'errors', 'optional_packages', 'store_retries'},
    'store_retries': {'errors'},
    'store_systems': {'errors', 'store_retries'},
    'config': {'checks', 'errors', 'optional_packages'},
    '__init__': {'sampling'},
    'main': {'config', 'errors', 'optional_packages', 'storage'},
    'train': {'main'},
}
_TENSORFLOW = {'tensorflow', 'tensorflow_datasets', 'tensorflow_text', 'seqio', 'clu'}


def _modules():
  return sorted(PACKAGE.rglob('*.py'))


def _imports(path):
  """Returns the full names of all modules and names that a file imports, wherever it does."""
  names = []
  for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
    if isinstance(node, ast.Import):
      names += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      names += [f'{node.module}.{alias.name}' for alias in node.names]
  return names


def _part(path):
  return path.relative_to(PACKAGE).with_suffix('').parts[0]


@pytest.mark.parametrize('path', _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
  part = _part(path)
  assert part in _MAY_IMPORT, 'a new part: say above what it may import'
  imported = {name.split('.')[1] for name in _imports(path)
              if name.startswith('parti_jax.')} - {'__version__'}
  assert imported - {part} <= _MAY_IMPORT[part]


@pytest.mark.parametrize('path', [path for path in _modules()
                                  if _part(path) in ('models', 'partitioning', 'planning',
                                                          'sampling')],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_models_and_sampling_know_no_tensorflow(path):
  assert not {name.split('.')[0] for name in _imports(path)} & _TENSORFLOW


@pytest.mark.parametrize('path', [path for path in _modules() if _part(path) != 't5x'],
                         ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_its_own_part_knows_t5x(path):
  assert not {name.split('.')[0] for name in _imports(path)} & {'t5x', 'airio', 'jestimator'}
  # Not as text either, which could be imported later; the table of commands is where it may stand.
  assert path.name == 'main.py' or 'parti_jax.t5x' not in path.read_text(encoding='utf-8')


def _requirements(extra):
  """Returns the distributions that setup.cfg names for everybody, or for an extra."""
  setup = configparser.ConfigParser()
  setup.read(REPOSITORY / 'setup.cfg')
  lines = (setup['options.extras_require'][extra] if extra
           else setup['options']['install_requires']).splitlines()
  return {re.split(r'[\[<>= ]', line)[0].lower().replace('_', '-')
          for line in lines if line.strip() and not line.startswith('#')}


@pytest.mark.parametrize('path', _modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_import_is_of_a_declared_package(path):
  declared = _requirements(None)
  if _part(path) in ('data', 'preparation', 'training', 'evaluation', 't5x'):
    declared |= _requirements('data')
  if _part(path) == 'data':
    declared |= _requirements('hf')
  if _part(path) == 'store_systems':
    declared |= _requirements('gcs') | _requirements('s3')
  if _part(path) == 'preparation':
    declared |= _requirements('beam')
  if _part(path) == 'training':
    declared |= _requirements('lpips')
  if _part(path) == 'evaluation':
    declared |= _requirements('fidelity')
  if _part(path) == 't5x':
    declared |= _requirements('t5x')
  owners = importlib.metadata.packages_distributions()
  for name in {name.split('.')[0] for name in _imports(path)} - {'parti_jax'}:
    if name not in sys.stdlib_module_names:
      # An optional package that isn't installed is taken to be named as it is imported.
      found = {owner.lower().replace('_', '-') for owner in owners.get(name, [name])}
      assert found & declared, f'{name} is not among the requirements in setup.cfg'


def test_optional_packages_are_the_extras():
  owners = importlib.metadata.packages_distributions()
  for package, extra in optional_packages.EXTRAS.items():
    if extra == 'data':
      found = {owner.lower().replace('_', '-') for owner in owners[package]}
      assert found & _requirements(extra), package
      assert not found & _requirements(None), package
  # These may not be installed where tests run: they are several hundred megabytes.
  assert _requirements(optional_packages.EXTRAS['torch']) == {'torch'}
  assert _requirements(optional_packages.EXTRAS['torch_fidelity']) == {'torch', 'torch-fidelity'}


@pytest.mark.parametrize('name', ['parti_jax', 'parti_jax.main', 'parti_jax.config',
                                  'parti_jax.storage', 'parti_jax.training.info_command',
                                  'parti_jax.training.manifest'])
def test_these_import_no_jax(name):
  assert not _loaded_by(name) & {'jax', 'flax', 'gin', 'tensorflow'}


@pytest.mark.parametrize('name', ['parti_jax.sampling.pipeline', 'parti_jax.sampling.command',
                                  'parti_jax.data', 'parti_jax.data.vocabulary',
                                  'parti_jax.data.openmoji', 'parti_jax.models.parti',
                                  'parti_jax.training.configurables',
                                  'parti_jax.planning.plan', 'parti_jax.planning.command',
                                  'parti_jax.t5x.checkpoint_command'])
def test_these_import_no_tensorflow(name):
  assert not _loaded_by(name) & _TENSORFLOW


def _loaded_by(name):
  """Returns the top-level packages in a fresh process that has imported a module."""
  code = f'import sys, {name}; print(*{{name.split(".")[0] for name in sys.modules}})'
  return set(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            check=True).stdout.split())


@pytest.mark.parametrize('name', sorted(main.COMMANDS))
def test_every_command_has_its_module(name):
  assert importlib.util.find_spec(main.COMMANDS[name][0]) is not None


def test_load_is_the_pipelines():
  from parti_jax.sampling import pipeline  # pylint: disable=import-outside-toplevel
  assert parti_jax.load is pipeline.load
  assert 'load' in dir(parti_jax)
  with pytest.raises(AttributeError, match='nothing'):
    getattr(parti_jax, 'nothing')


def test_every_folder_is_installed():
  setup = configparser.ConfigParser()
  setup.read(REPOSITORY / 'setup.cfg')
  listed = setup['options']['packages'].split()
  folders = {'.'.join(path.parent.relative_to(REPOSITORY).parts)
             for path in (REPOSITORY / 'parti_jax').rglob('__init__.py')}
  assert sorted(listed) == sorted(folders | {'parti_jax.gin_configs'})


def test_files_that_are_not_code_are_there():
  demo = PACKAGE / 'demo'
  assert {'ATTRIBUTION.md', 'vocabulary.model'} <= {path.name for path in demo.iterdir()}
  repository = {path.relative_to(REPOSITORY / 'gin_configs')
                for path in (REPOSITORY / 'gin_configs').rglob('*.gin')}
  assert repository and repository == {path.relative_to(config.folder())
                                       for path in config.folder().rglob('*.gin')}


def test_demo_is_small_enough():
  assert sum(path.stat().st_size for path in (PACKAGE / 'demo').iterdir()) <= 20e6

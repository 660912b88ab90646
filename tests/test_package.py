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
from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core import optional_packages

PACKAGE = pathlib.Path(parti_jax.__file__).parent
REPOSITORY = pathlib.Path(__file__).parents[1]

# What each part of the package may import of the package, besides itself. Each part is allowed
# what those before it are: cli -> t5x, planning, tokenization, serving -> training -> runs,
# evaluation, preparation -> sampling, checkpoints, importers -> exported_model -> data, models ->
# partitioning -> core.
_MAY_IMPORT = {
  'core': set(),
  'partitioning': {'core'},
  'models': {'partitioning', 'core'},
  'data': {'partitioning', 'core'},
  'preparation': {'sampling', 'data', 'core'},
  'exported_model': {'models', 'data', 'core'},
  'checkpoints': {'exported_model', 'models', 'partitioning', 'core'},
  'importers': {'exported_model', 'models', 'data', 'core'},
  'sampling': {'exported_model', 'models', 'data', 'partitioning', 'core'},
  'evaluation': {
    'sampling',
    'importers',
    'exported_model',
    'models',
    'data',
    'partitioning',
    'core',
  },
  'serving': {'sampling', 'exported_model', 'data', 'core'},
  'runs': {'checkpoints', 'core'},
  'training': {
    'runs',
    'checkpoints',
    'sampling',
    'importers',
    'exported_model',
    'models',
    'data',
    'partitioning',
    'core',
  },
  'tokenization': {'training', 'runs', 'data', 'core'},
  'planning': {'training', 'sampling', 'exported_model', 'models', 'partitioning', 'core'},
  't5x': {
    'training',
    'evaluation',
    'sampling',
    'checkpoints',
    'exported_model',
    'models',
    'data',
    'partitioning',
    'core',
  },
  'cli': {
    'serving',
    't5x',
    'planning',
    'tokenization',
    'training',
    'runs',
    'evaluation',
    'sampling',
    'checkpoints',
    'exported_model',
    'models',
    'importers',
    'preparation',
    'data',
    'partitioning',
    'core',
  },
  '__init__': set(),  # Its public names are imported on first use.
  'train': {'cli'},
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


def test_imports_run_one_way():
  wrong = []
  for path in _modules():
    part = _part(path)
    assert part in _MAY_IMPORT, f'{path}: a new part; add what it may import'
    imported = {name.split('.')[1] for name in _imports(path) if name.startswith('parti_jax.')} - {
      '__version__',
      part,
    }
    wrong += [f'{path}: {name}' for name in sorted(imported - _MAY_IMPORT[part])]
  assert not wrong


def test_modules_keep_their_names():
  """A module is imported by its name, or as NAME_lib where a variable has the name.

  t5x has modules of the same names as ours, which are then our_NAME there and t5x_NAME elsewhere.
  """
  wrong = []
  for path in _modules():
    prefix = 'our' if _part(path) == 't5x' else 't5x'
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
      if isinstance(node, ast.ImportFrom) and (node.module or '').startswith('parti_jax'):
        wrong += [
          f'{path}: {alias.name} as {alias.asname}'
          for alias in node.names
          if alias.name.islower()
          and alias.asname not in (None, f'{alias.name}_lib', f'{prefix}_{alias.name}')
        ]
  assert not wrong


def test_the_order_of_the_parts_has_no_circle():
  settled = set()
  while ready := {part for part, others in _MAY_IMPORT.items() if others <= settled} - settled:
    settled |= ready
  assert settled == set(_MAY_IMPORT)


def test_the_architecture_page_has_the_same_order():
  page = (REPOSITORY / 'docs' / 'architecture.md').read_text(encoding='utf-8')
  table = page.split('| package | may import |\n|---|---|\n')[1].split('\n\n')[0]
  rows = [re.findall(r'`(\w+)`', line) for line in table.splitlines()]
  modules = {'__init__', 'train'}  # These two are not packages.
  assert {part: set(others) for part, *others in rows} == {
    part: others for part, others in _MAY_IMPORT.items() if part not in modules
  }


def test_models_and_sampling_know_no_tensorflow():
  parts = ('models', 'partitioning', 'exported_model', 'planning', 'sampling')
  assert not [
    path
    for path in _modules()
    if _part(path) in parts and {name.split('.')[0] for name in _imports(path)} & _TENSORFLOW
  ]


def test_only_its_own_part_knows_t5x():
  for path in _modules():
    if _part(path) == 't5x':
      continue
    assert not {name.split('.')[0] for name in _imports(path)} & {'t5x', 'airio', 'jestimator'}, (
      path
    )
    # Not as text either, which could be imported later. Commands may name it.
    assert _part(path) == 'cli' or 'parti_jax.t5x' not in path.read_text(encoding='utf-8'), path


def _requirements(extra):
  """Returns the distributions that setup.cfg names for everybody, or for an extra."""
  setup = configparser.ConfigParser()
  setup.read(REPOSITORY / 'setup.cfg')
  lines = (
    setup['options.extras_require'][extra] if extra else setup['options']['install_requires']
  ).splitlines()
  return {
    re.split(r'[\[<>= ]', line)[0].lower().replace('_', '-')
    for line in lines
    if line.strip() and not line.startswith('#')
  }


# Part -> the extras that it may import, besides what everybody installs.
_EXTRAS = {
  'core': ('gcs', 's3'),
  'data': ('data', 'hf', 'tokenizers'),
  'preparation': ('data', 'beam'),
  'training': ('data',),
  'tokenization': ('data',),
  'runs': ('data',),
  'serving': ('serve', 'ui'),
  'evaluation': ('data',),
  't5x': ('data', 't5x'),
  'cli': ('data', 't5x'),
}


def test_every_import_is_of_a_declared_package():
  owners = importlib.metadata.packages_distributions()
  wrong = []
  for path in _modules():
    declared = _requirements(None).union(*map(_requirements, _EXTRAS.get(_part(path), ())))
    for name in {name.split('.')[0] for name in _imports(path)} - {'parti_jax'}:
      # An optional package that isn't installed is taken to be named as it is imported.
      found = {owner.lower().replace('_', '-') for owner in owners.get(name, [name])}
      if name not in sys.stdlib_module_names and not found & declared:
        wrong.append(f'{path}: {name}')
  assert not wrong


def test_optional_packages_are_the_extras():
  owners = importlib.metadata.packages_distributions()
  for package, extra in optional_packages.EXTRAS.items():
    if extra == 'data':
      found = {owner.lower().replace('_', '-') for owner in owners[package]}
      assert found & _requirements(extra), package
      assert not found & _requirements(None), package


def test_every_optional_import_has_its_extra():
  """Otherwise an installation without the extra says only that there is no such module."""
  owners = importlib.metadata.packages_distributions()
  found = {name.split('.')[0] for path in _modules() for name in _imports(path)}
  optional = {
    name
    for name in found - set(sys.stdlib_module_names) - {'parti_jax'}
    if not {owner.lower().replace('_', '-') for owner in owners.get(name, [])} & _requirements(None)
  }
  assert 'grain' in optional
  # Both gcs and s3 install aiohttp, and what is missed first is gcsfs or s3fs.
  assert optional <= {*optional_packages.EXTRAS, 'aiohttp'}


_WITHOUT_JAX = (
  'parti_jax',
  'parti_jax.cli.main',
  'parti_jax.core.gin_config',
  'parti_jax.core.storage',
  'parti_jax.cli.info',
  'parti_jax.checkpoints.manifest',
)
_WITHOUT_TENSORFLOW = (
  'parti_jax.sampling.text_to_image',
  'parti_jax.cli.generate',
  'parti_jax.serving.image_service',
  'parti_jax.data',
  'parti_jax.data.vocabulary',
  'parti_jax.data.openmoji',
  'parti_jax.models.parti',
  'parti_jax.training.configurables',
  'parti_jax.planning.plan',
  'parti_jax.cli.plan',
  'parti_jax.cli.t5x_checkpoint',
)
# Drawing, editing and serving need only what everybody installs, and the extra `serve`.
_WITHOUT_THE_EXTRA_DATA = (
  *_WITHOUT_TENSORFLOW[:3],
  'parti_jax.data.image_decoding',
  'parti_jax.sampling.editing',
  'parti_jax.sampling.upscaling',
  'parti_jax.serving.http_server',
  'parti_jax.cli.serve',
  'parti_jax.cli.upscale',
)
# JAX and optax import the other two.
_OF_THE_EXTRA_DATA = {
  package for package, extra in optional_packages.EXTRAS.items() if extra == 'data'
} - {'absl', 'scipy'}
_IMPORT_ONE_AFTER_ANOTHER = """
import importlib, sys
unwanted = set(sys.argv[1].split(','))
for name in sys.argv[2:]:
  importlib.import_module(name)
  found = unwanted & {loaded.split('.')[0] for loaded in sys.modules}
  assert not found, f'{name} imports {found}'
"""


@pytest.mark.process
@pytest.mark.parametrize(
  'names, unwanted',
  [
    (_WITHOUT_JAX, {'jax', 'flax', 'gin', 'tensorflow'}),
    (_WITHOUT_TENSORFLOW, _TENSORFLOW),
    (_WITHOUT_THE_EXTRA_DATA, _OF_THE_EXTRA_DATA),
  ],
)
def test_these_do_without(names, unwanted):
  command = [sys.executable, '-c', _IMPORT_ONE_AFTER_ANOTHER, ','.join(unwanted), *names]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr


# These belong to other commands, which import them.
_OTHER_GIN_NAMES = {'parti_jax.preparation.settings'}
_REGISTERS = re.compile(r'^@(gin|checks|config_checks)\.configurable|^gin\.external', re.MULTILINE)


@pytest.mark.process
def test_all_gin_names_are_registered_before_gin_is_parsed():
  """A module that registers a name later fails: gin is locked then."""
  registering = {
    '.'.join(('parti_jax', *path.relative_to(PACKAGE).with_suffix('').parts)).removesuffix(
      '.__init__'
    )
    for path in _modules()
    if _part(path) != 't5x' and _REGISTERS.search(path.read_text(encoding='utf-8'))
  }
  assert 'parti_jax.partitioning.compiler_options' in registering
  code = (
    'import sys; import parti_jax.data.datasets, parti_jax.training.configurables; '
    'print(*sys.modules)'
  )
  loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert registering <= {*loaded.stdout.split(), *_OTHER_GIN_NAMES}


@pytest.mark.parametrize('name', sorted(main.COMMANDS))
def test_every_command_has_its_module(name):
  assert importlib.util.find_spec(main.COMMANDS[name][0]) is not None


@pytest.mark.parametrize('name', parti_jax.__all__)
def test_every_public_name_is_there(name):
  value = getattr(parti_jax, name)
  assert value.__name__ == name
  assert value.__module__.startswith('parti_jax.')
  assert name in dir(parti_jax)


@pytest.mark.process
def test_public_names_load_no_tensorflow():
  code = 'import sys; from parti_jax import *; print(*sys.modules)'
  loaded = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
  assert not {name.split('.')[0] for name in loaded.stdout.split()} & _TENSORFLOW


def test_other_names_are_refused():
  with pytest.raises(AttributeError, match='nothing'):
    _ = parti_jax.nothing


def test_the_reference_names_every_public_name():
  reference = (REPOSITORY / 'docs' / 'api' / 'index.md').read_text(encoding='utf-8')
  assert set(re.findall(r'`(\w+)`\]\[parti_jax\.', reference)) == set(parti_jax.__all__)


def test_every_folder_of_modules_is_a_package():
  # Others are not installed.
  folders = {path.parent for path in (REPOSITORY / 'parti_jax').rglob('*.py')}
  assert len(folders) > 10 and all((folder / '__init__.py').is_file() for folder in folders)


def test_files_that_are_not_code_are_there():
  demo = PACKAGE / 'demo'
  assert {'ATTRIBUTION.md', 'vocabulary.model'} <= {path.name for path in demo.iterdir()}
  repository = {
    path.relative_to(REPOSITORY / 'gin_configs')
    for path in (REPOSITORY / 'gin_configs').rglob('*.gin')
  }
  assert repository and repository == {
    path.relative_to(gin_config.folder()) for path in gin_config.folder().rglob('*.gin')
  }


def test_demo_is_small_enough():
  assert sum(path.stat().st_size for path in (PACKAGE / 'demo').iterdir()) <= 20e6

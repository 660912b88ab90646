"""What files from elsewhere could do: the package's own sources name nothing that lets them."""

import ast
import dataclasses
import json
import pathlib
import shutil

import optax
import pytest
import tiny_configs

import parti_jax
from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import tokenizer_objective

SOURCES = sorted(pathlib.Path(parti_jax.__file__).parent.rglob('*.py'))
# Calls by which the content of a file becomes code, or files outside of a folder.
FORBIDDEN = {
  'eval',
  'exec',
  'compile',
  'pickle.load',
  'pickle.loads',
  'pickle.Unpickler',
  'marshal.load',
  'marshal.loads',
  'shelve.open',
  'dill.load',
  'dill.loads',
  'cloudpickle.load',
  'cloudpickle.loads',
  'joblib.load',
  'yaml.load',
  'yaml.unsafe_load',
  'os.system',
  'os.popen',
  'shutil.unpack_archive',
}
METHODS = {'extractall'}


def _calls(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Call):
      yield ast.unparse(node.func), {word.arg: word.value for word in node.keywords}


def _is(value, wanted):
  return isinstance(value, ast.Constant) and value.value is wanted


def faults(text):
  """The calls in a source that take more from a file than data."""
  for name, words in _calls(ast.parse(text)):
    short = name.rpartition('.')[2]
    if (
      name in FORBIDDEN
      or short in METHODS
      or (name.endswith('np.load') and not _is(words.get('allow_pickle'), False))
      or (name == 'torch.load' and not _is(words.get('weights_only'), True))
      or ('shell' in words and not _is(words['shell'], False))
    ):
      yield name


def test_no_source_takes_more_from_a_file_than_data():
  assert len(SOURCES) > 100
  found = {str(path): list(faults(path.read_text(encoding='utf-8'))) for path in SOURCES}
  assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
  'text',
  [
    'torch.load(path)',
    'torch.load(path, weights_only=False)',
    'np.load(path)',
    'eval(text)',
    'pickle.loads(data)',
    'tar.extractall(folder)',
    'subprocess.run(words, shell=True)',
  ],
)
def test_such_a_call_would_be_found(text):
  assert list(faults(text))


@pytest.fixture(name='saved', scope='module')
def _saved(tmp_path_factory):
  """A checkpoint's folder, and the trainer that it is of."""
  folder = tmp_path_factory.mktemp('run')
  objective = tokenizer_objective.TokenizerObjective(
    dataclasses.replace(tiny_configs.TOKENIZER, encoder_width=16, decoder_width=16)
  )
  trainer = trainer_lib.Trainer(objective, optax.sgd(0.1), mesh_lib.make_mesh())
  manager = checkpoint_manager.Checkpoints(folder)
  manager.save(0, trainer.create_state(), {}, run_checkpoints.describe(objective))
  manager.close()
  return folder, trainer


@pytest.fixture(name='copy')
def _copy(saved, tmp_path):
  """A copy without a manifest, as of a stranger who may write what he likes."""
  shutil.copytree(saved[0], tmp_path / 'outer' / 'run')
  (tmp_path / 'outer' / 'run' / 'checkpoints' / '0' / manifest.NAME).unlink()
  return tmp_path / 'outer' / 'run' / 'checkpoints' / '0'


def _restore(path, trainer):
  path = run_checkpoints.folder(path.parents[1]) / path.name
  run_checkpoints.check_same_model(
    path, run_checkpoints.read_model(path), run_checkpoints.describe(trainer.objective)
  )
  run_checkpoints.check_same_shapes(path, trainer.abstract)


@pytest.mark.parametrize('name', ['../../../../escaped', '/escaped', 'params/../../escaped'])
def test_a_checkpoints_names_lead_nowhere(copy, saved, tmp_path, name):
  before = sorted(path.name for path in tmp_path.rglob('*'))
  metadata = json.loads((copy / 'state' / '_METADATA').read_text())
  tree = metadata['tree_metadata']
  key = next(key for key in tree if 'codebook' in key)
  tree[str(('params', name))] = tree.pop(key) | {
    'key_metadata': [{'key': 'params', 'key_type': 2}, {'key': name, 'key_type': 2}]
  }
  (copy / 'state' / '_METADATA').write_text(json.dumps(metadata))
  with pytest.raises(UserError, match='not a finished checkpoint|codebook'):
    _restore(copy, saved[1])
  assert sorted(path.name for path in tmp_path.rglob('*')) == before


def test_a_checkpoints_metadata_is_bounded(copy, saved, monkeypatch):
  monkeypatch.setattr(run_checkpoints.storage, 'MAX_JSON', 100_000)
  _restore(copy, saved[1])
  with open(copy / 'state' / '_METADATA', 'a', encoding='utf-8') as file:
    file.write(' ' * 100_000)
  with pytest.raises(
    UserError, match='_METADATA: has 1.* bytes, but such a file may have at most 100,000;'
  ):
    _restore(copy, saved[1])


def test_a_manifest_names_no_file_outside(copy):
  copy = run_checkpoints.folder(copy.parents[1]) / copy.name
  manifest._write(copy / manifest.NAME, {'../../../secret': [1, '0' * 32]})
  assert manifest.fault(copy) == 'manifest.json is damaged'


def test_gin_values_in_a_runs_folder_are_not_read(copy, saved, tmp_path, capsys):
  run = copy.parents[1]
  harmful = f"import pathlib\ntrain.model_dir = {{'a': 1}}\ninclude '{tmp_path}/no_such.gin'\n"
  for place in (run / 'config.gin', run / 'configs' / 'a.gin'):
    place.parent.mkdir(exist_ok=True)
    place.write_text(harmful)
  assert main.main(['info', str(run)]) == 0
  assert 'tokenizer' in capsys.readouterr().out
  status = main.main(
    [
      'export',
      f'--tokenizer={run}',
      f'--generator={run}',
      f'--vocabulary={tmp_path}/no',
      f'--output_dir={tmp_path}/out',
    ]
  )
  shown = capsys.readouterr().err
  assert status == 2 and 'no_such.gin' not in shown and '.gin' not in shown

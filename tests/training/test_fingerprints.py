"""Parts of different vocabularies or tokenizers are never put together without a word."""

import dataclasses
import shutil

import jax
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.partitioning import mesh
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import tokenizer_objective

SIZES = dataclasses.replace(
  tiny_configs.TOKENIZER, image_size=16, codebook_size=64, code_dim=4, dtype='bfloat16'
)
GENERATOR = [
  '--gin_file=gin_configs/runs/tiny_generator.gin',
  '--gin.train.batch_size=8',
  '--gin.train.eval_split=None',
  '--gin.PartiConfig.grid=(4,4)',
  '--gin.PartiConfig.codebook_size=64',
]


def _write_tokenizer(folder, seed, change=lambda params: params):
  """A run of a tokenizer that was not trained."""
  objective = tokenizer_objective.TokenizerObjective(SIZES)
  trainer = trainer_lib.Trainer(objective, optax.sgd(0.1), mesh.make_mesh(8, 1, 1, 1), seed)
  state = trainer.create_state()
  run = checkpoint_manager.Checkpoints(folder)
  run.save(1, state.replace(params=change(state.params)), {}, run_checkpoints.describe(objective))
  run.close()
  return str(folder)


def _another_decoder(params):
  return params | {'decoder': jax.tree.map(lambda leaf: leaf + 1, params['decoder'])}


@pytest.fixture(scope='module')
def parts(tmp_path_factory):
  """Tokenizers A, A2 (A after its second phase) and B, token caches of A and B, another vocabulary,
  and a generator that was trained on A's tokens."""
  folder = tmp_path_factory.mktemp('parts')
  found = {
    'A': _write_tokenizer(folder / 'A', 0),
    'B': _write_tokenizer(folder / 'B', 1),
    'A2': _write_tokenizer(folder / 'A2', 0, _another_decoder),
  }
  rng = np.random.default_rng(0)
  for name in 'AB':
    found[f'tokens_{name}'] = str(folder / f'tokens_{name}')
    token_cache.write_token_cache(
      found[f'tokens_{name}'],
      [(f'square {i}', rng.integers(0, 64, 16)) for i in range(16)],
      {
        'codebook_size': 64,
        'image_tokens': 16,
        'tokenizer': frozen_tokenizer.load(found[name]).fingerprint,
      },
    )
  found['vocabulary'] = str(folder / 'other.model')
  vocabulary.train_vocabulary([f'a red square {i}' for i in range(200)], 40, found['vocabulary'])
  found['generator'] = str(folder / 'generator')
  assert (
    main.main(
      [
        'train',
        *GENERATOR,
        f"--gin.token_cache.path='{found['tokens_A']}'",
        '--gin.train.steps=1',
        f'--model_dir={found["generator"]}',
      ]
    )
    == 0
  )
  return found


def _demo_vocabulary():
  return str(text_to_image.DEMO_FOLDER / 'vocabulary.model')


def _export(parts, output, *flags, **changed):
  given = {
    'tokenizer': parts['A'],
    'generator': parts['generator'],
    'vocabulary': _demo_vocabulary(),
  } | changed
  return main.main(
    [
      'export',
      *(f'--{name}={value}' for name, value in given.items()),
      f'--output_dir={output}',
      *flags,
    ]
  )


def _fingerprint(path):
  return frozen_tokenizer.load(path).fingerprint


@pytest.mark.parametrize('tokenizer', ['A', 'A2'])
def test_parts_that_fit_are_exported(parts, tmp_path, capsys, tokenizer):
  assert _export(parts, tmp_path / 'model', tokenizer=parts[tokenizer]) == 0
  assert 'warning' not in capsys.readouterr().err
  model = model_folder.load(tmp_path / 'model')
  ours = {
    'vocabulary': vocabulary.TextVocabulary(_demo_vocabulary()).fingerprint,
    'tokenizer': _fingerprint(parts['A']),
  }
  assert model.made_with == {'generator': ours, 'tokenizer': {'tokenizer': ours['tokenizer']}}
  # Stored in float16, it is still known as the tokenizer of these tokens.
  assert _fingerprint(tmp_path / 'model') == _fingerprint(parts['A'])


def test_a_generator_is_not_exported_with_another_tokenizer(parts, tmp_path, capsys):
  assert _export(parts, tmp_path / 'model', tokenizer=parts['B']) == 2
  error = capsys.readouterr().err
  assert (
    f'the generator {parts["generator"]} was made with the tokenizer '
    f'{_fingerprint(parts["A"])}, but the tokenizer {parts["B"]} has '
    f'{_fingerprint(parts["B"])}; give the tokenizer'
  ) in error
  assert not (tmp_path / 'model').exists()


def test_a_generator_is_not_exported_with_another_vocabulary(parts, tmp_path, capsys):
  assert _export(parts, tmp_path / 'model', vocabulary=parts['vocabulary']) == 2
  error = capsys.readouterr().err
  assert f'the generator {parts["generator"]} was made with the vocabulary ' in error
  assert f'but the vocabulary {parts["vocabulary"]} has ' in error
  assert not (tmp_path / 'model').exists()


def test_a_mismatch_that_is_meant_is_exported_and_warned_of(parts, tmp_path, capsys):
  folder = tmp_path / 'model'
  assert _export(parts, folder, '--allow_mismatch', tokenizer=parts['B']) == 0
  capsys.readouterr()
  assert model_folder.load(folder).made_with['tokenizer'] == {'tokenizer': _fingerprint(parts['B'])}
  assert 'warning' in capsys.readouterr().err


def test_a_base_keeps_its_tokenizer_and_vocabulary(parts, tmp_path, capsys):
  base, other = tmp_path / 'base', tmp_path / 'other'
  assert _export(parts, base) == 0
  export = ['export', f'--base={base}', f'--output_dir={other}']
  assert main.main([*export, f'--tokenizer={parts["A2"]}']) == 0
  assert model_folder.load(other).made_with == model_folder.load(base).made_with
  shutil.rmtree(other)
  assert main.main([*export, f'--tokenizer={parts["B"]}']) == 2
  assert f'the generator {base} was made with the tokenizer' in capsys.readouterr().err
  assert main.main([*export, f'--vocabulary={parts["vocabulary"]}']) == 2
  assert f'the generator {base} was made with the vocabulary' in capsys.readouterr().err
  assert not other.exists()


def test_an_older_base_is_taken_for_what_it_was_exported_with(parts, tmp_path, capsys):
  base, other = tmp_path / 'base', tmp_path / 'other'
  assert _export(parts, base) == 0
  for name in ('generator', 'tokenizer'):  # Files of before say nothing.
    file = base / model_folder.parameter_file(name)
    arrays = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file(arrays, file)
  assert model_folder.load(base).made_with == {'generator': {}, 'tokenizer': {}}
  export = ['export', f'--base={base}', f'--output_dir={other}']
  assert main.main([*export, f'--tokenizer={parts["B"]}']) == 2
  assert f'the generator {base} was made with the tokenizer' in capsys.readouterr().err
  assert main.main(export) == 0
  assert set(model_folder.load(other).made_with['generator']) == {'vocabulary', 'tokenizer'}


@pytest.mark.parametrize(
  'file, kind',
  [
    ('tokenizer.safetensors', 'tokenizer'),
    ('generator.safetensors', 'tokenizer'),
    ('vocabulary.model', 'vocabulary'),
  ],
)
def test_files_of_two_models_are_not_taken_for_one(parts, tmp_path, file, kind):
  folder = tmp_path / 'model'
  assert _export(parts, folder) == 0
  if file == 'vocabulary.model':
    shutil.copyfile(parts['vocabulary'], folder / file)
  else:
    assert _export(parts, tmp_path / 'other', '--allow_mismatch', tokenizer=parts['B']) == 0
    shutil.copyfile(tmp_path / 'other' / 'tokenizer.safetensors', folder / 'tokenizer.safetensors')
  with pytest.raises(UserError, match=f'model: the generator was made with the {kind}'):
    model_folder.load(folder)


def _train(parts, folder, *bindings, tokens='tokens_A'):
  return main.main(
    [
      'train',
      *GENERATOR,
      f"--gin.token_cache.path='{parts[tokens]}'",
      f'--model_dir={folder}',
      *(f'--gin.{binding}' for binding in bindings),
    ]
  )


def test_a_run_does_not_go_on_with_tokens_of_another_tokenizer(parts, tmp_path, capsys):
  folder = tmp_path / 'generator'
  shutil.copytree(parts['generator'], folder)
  assert _train(parts, folder, 'train.steps=2', tokens='tokens_B') == 2
  error = capsys.readouterr().err
  assert (
    f'the run {folder} was made with the tokenizer {_fingerprint(parts["A"])}, but the token '
    f'cache {parts["tokens_B"]} has {_fingerprint(parts["B"])}; set token_cache.path'
  ) in error
  assert run_checkpoints.latest_checkpoint(folder).name == '1'
  assert _train(parts, folder, 'train.steps=2', 'train.allow_mismatch=True', tokens='tokens_B') == 0
  assert 'warning: the run' in capsys.readouterr().err


def test_a_run_does_not_go_on_with_another_vocabulary(parts, tmp_path, capsys):
  folder = tmp_path / 'generator'
  shutil.copytree(parts['generator'], folder)
  assert _train(parts, folder, 'train.steps=2', f"vocabulary.path='{parts['vocabulary']}'") == 2
  error = capsys.readouterr().err
  assert f'the run {folder} was made with the vocabulary ' in error
  assert f"but vocabulary.path='{parts['vocabulary']}' has " in error


def test_pictures_are_not_drawn_by_another_tokenizer(parts, tmp_path, capsys):
  drawing = ('train.steps=1', 'train.pictures_every=1', 'train.num_pictures=2')
  assert (
    _train(parts, tmp_path / 'run', *drawing, f"GeneratorObjective.tokenizer='{parts['B']}'") == 2
  )
  error = capsys.readouterr().err
  assert f'the token cache {parts["tokens_A"]} was made with the tokenizer ' in error
  assert f"but GeneratorObjective.tokenizer='{parts['B']}' has " in error
  assert not (tmp_path / 'run').exists()
  assert (
    _train(parts, tmp_path / 'run', *drawing, f"GeneratorObjective.tokenizer='{parts['A2']}'") == 0
  )
  assert [file.name for file in (tmp_path / 'run' / 'pictures').iterdir()] == [
    'samples_00000001.png'
  ]


def test_a_tokenizer_that_pictures_need_is_looked_for_before_the_first_step(
  parts, tmp_path, capsys
):
  missing = "GeneratorObjective.tokenizer='nowhere'"
  assert _train(parts, tmp_path / 'run', 'train.steps=1', missing) == 2
  error = capsys.readouterr().err
  assert "GeneratorObjective.tokenizer='nowhere': nowhere: no training run there" in error
  assert 'set it to None' in error and not (tmp_path / 'run').exists()
  # Without pictures nobody needs it.
  assert _train(parts, tmp_path / 'run', 'train.steps=1', missing, 'train.pictures_every=0') == 0


def test_a_run_starts_from_a_model_of_the_same_inputs_alone(parts, tmp_path, capsys):
  assert _export(parts, tmp_path / 'model') == 0
  start = f"train.initial_model='{tmp_path / 'model'}'"
  assert _train(parts, tmp_path / 'run', 'train.steps=1', start, tokens='tokens_B') == 2
  error = capsys.readouterr().err
  assert f'{start} was made with the tokenizer ' in error
  assert _train(parts, tmp_path / 'run', 'train.steps=1', start) == 0


def test_what_is_trained_on_a_tokenizers_pictures_keeps_to_it(parts, tmp_path, pictures_folder):
  bindings = [
    f"folder.path = '{pictures_folder}'",
    "folder.splits = {'train': 'train.jsonl'}",
    'train.eval_split = None',
    'train.batch_size = 8',
    'train.steps = 1',
    'CoCaConfig.image_size = 16',
    'CoCaConfig.patch_size = 8',
  ]
  tokenizer = lambda name: f"RankerObjective.tokenizer = '{parts[name]}'"

  def train(*more):
    gin_config.parse(['gin_configs/runs/tiny_ranker.gin'], [*bindings, *more])
    train_loop.train(str(tmp_path / 'ranker'))

  train(tokenizer('A'))
  train(tokenizer('A2'), 'train.steps = 2')
  with pytest.raises(UserError, match=f"RankerObjective.tokenizer='{parts['B']}' has "):
    train(tokenizer('B'), 'train.steps = 3')

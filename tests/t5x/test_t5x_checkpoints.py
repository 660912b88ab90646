"""Checkpoints of runs and of t5x: the same arrays by other names, bit for bit."""

import dataclasses
import errno
import functools
import shutil

import flax.serialization
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import old_moments
import pytest
import tiny_configs
from etils import epath

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.cli import t5x_checkpoint
from parti_jax.core.errors import UserError
from parti_jax.data import tasks  # noqa: F401
from parti_jax.data import token_cache
from parti_jax.exported_model import model_folder
from parti_jax.models import discriminator
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import text_to_image
from parti_jax.t5x import checkpoints as t5x_checkpoints
from parti_jax.training import optimizers
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

# As gin_configs/runs/tiny_generator.gin.
PARTI = parti_config.PartiConfig(
  encoder_layers=2,
  decoder_layers=2,
  width=32,
  mlp_width=64,
  heads=4,
  text_vocabulary=2000,
  text_length=32,
  codebook_size=64,
  grid=(4, 4),
  dtype='float32',
)
TOKENIZER = dataclasses.replace(tiny_configs.TOKENIZER, encoder_width=16, decoder_width=16)
GIN = ['--gin_file=gin_configs/runs/tiny_generator.gin']


def _generator(**changes):
  return generator_objective.GeneratorObjective(dataclasses.replace(PARTI, **changes))


def _adversarial_tokenizer():
  return tokenizer_objective.TokenizerObjective(
    TOKENIZER,
    adversarial_weight=0.1,
    ema=0.9,
    discriminator=discriminator.DiscriminatorConfig(channels=64, max_channels=8),
    discriminator_optimizer=optimizers.adamw(0.1),
  )


STATES = {
  'adafactor': (_generator, optimizers.adafactor),
  'adamw': (_generator, optimizers.adamw),
  'tokenizer': (lambda: tokenizer_objective.TokenizerObjective(TOKENIZER), optimizers.adafactor),
  'adversarial': (_adversarial_tokenizer, optimizers.adamw),
  'average': (lambda: dataclasses.replace(_generator(), ema=0.9), optimizers.muon),
}


@functools.cache
def _trainer(name, *mesh):
  """A trainer with a learning rate schedule, so that the optimizer's state counts steps.

  On one device, where Orbax compiles nothing to save, unless axes of a mesh are given.
  """
  make_objective, optimizer = STATES[name]
  mesh = mesh or (1, 1, 1, 1, tuple(jax.devices()[:1]))
  return trainer_lib.Trainer(
    make_objective(), optimizer(optimizers.parti_schedule()), mesh_lib.make_mesh(*mesh)
  )


def _filled(trainer, step=7):
  """A state on the trainer's mesh in which every number is another."""
  draw = np.random.default_rng(0)

  def fill(plan):
    values = (
      draw.integers(1, 100, plan.shape)
      if jnp.issubdtype(plan.dtype, jnp.integer)
      else (draw.uniform(0.01, 0.1, plan.shape))
    )
    return jax.device_put(np.asarray(values).astype(plan.dtype), plan.sharding)

  state = jax.tree.map(fill, trainer.abstract)
  return state.replace(step=jax.device_put(np.int32(step), trainer.abstract.step.sharding))


def _save(folder, trainer, state):
  manager = checkpoint_manager.Checkpoints(folder)
  manager.save(
    int(state.step), state, {'epoch': 2, 'taken': 5}, run_checkpoints.describe(trainer.objective)
  )
  manager.close()
  return run_checkpoints.latest_checkpoint(folder)


def _assert_same_bits(a, b):
  def same(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.tobytes() == other.tobytes()

  jax.tree.map(same, jax.device_get(a), jax.device_get(b))


@pytest.fixture(scope='module', name='run')
def _run(tmp_path_factory):
  """A generator's run with a checkpoint of step 7, its state, and that checkpoint for t5x."""
  folder = tmp_path_factory.mktemp('runs')
  trainer = _trainer('adafactor', 2, 2, 2)
  state = _filled(trainer)
  _save(folder / 'run', trainer, state)
  t5x_checkpoint.run_to_t5x(folder / 'run', folder / 't5x')
  return folder / 'run', state, folder / 't5x' / 'checkpoint_7'


@pytest.mark.parametrize('name', STATES)
def test_the_names_are_those_of_flax(name):
  """What t5x's OptaxWrapper and TrainState make of the same state, by flax.serialization."""
  state = _trainer(name).abstract
  ours = flax.traverse_util.flatten_dict(t5x_checkpoints.state_dict(state), sep='/')
  plain = flax.serialization.to_state_dict(state)
  theirs = {
    'target': plain['params'],
    'state': {'step': plain['step'], 'param_states': plain['optimizer_state']},
  }
  if plain['statistics']:
    theirs['flax_mutables'] = {'statistics': plain['statistics'] | {'step': plain['step']}}
  theirs = flax.traverse_util.flatten_dict(theirs, sep='/')  # Without what is empty, as t5x does.
  assert ours == theirs
  assert t5x_checkpoints.train_state(t5x_checkpoints.state_dict(state), state) == state


@pytest.mark.parametrize('name', STATES)
def test_ours_to_t5x_to_ours_bit_for_bit(name, tmp_path):
  trainer = _trainer(name)
  state = _filled(trainer)
  path = _save(tmp_path / 'run', trainer, state)
  written = t5x_checkpoints.write(tmp_path / 't5x', t5x_checkpoints.read_run(path))
  assert written == epath.Path(tmp_path) / 't5x' / 'checkpoint_7'
  # By Orbax alone, as anybody would read it.
  saved = run_checkpoints.by_path(
    t5x_checkpoints.ocp.PyTreeCheckpointer().restore(written / 'state')
  )
  _assert_same_bits(saved, run_checkpoints.by_path(t5x_checkpoints.state_dict(state)))
  dtypes = {str(leaf.dtype) for name, leaf in saved.items() if 'param_states' in name}
  assert ('bfloat16' in dtypes) == (STATES[name][1] is optimizers.adafactor)
  # On another mesh than it was saved from.
  other = _trainer(name, 1, 4, 2).abstract
  tree = t5x_checkpoints.read(written, t5x_checkpoints.state_dict(other))
  restored = t5x_checkpoints.train_state(tree, other)
  _assert_same_bits(restored, state)
  assert all(
    leaf.sharding == plan.sharding
    for leaf, plan in zip(jax.tree.leaves(restored), jax.tree.leaves(other))
  )


def test_a_run_of_a_checkpoint_of_t5x(run, tmp_path, capsys):
  _, state, written = run
  again = ['t5x_checkpoint', f'--from_t5x={written}', *GIN, f'--model_dir={tmp_path}/again']
  assert main.main(again) == 0
  printed = capsys.readouterr().out
  assert "objective 'generator' at step 7" in printed and 'data start from the beginning' in printed
  path = run_checkpoints.latest_checkpoint(tmp_path / 'again')
  assert (path / 'manifest.json').exists() and not (tmp_path / 'again' / 'lock.json').exists()
  assert run_checkpoints.read_place(path) == {'from_t5x': str(written)}
  trainer = _trainer('adafactor')
  manager = checkpoint_manager.Checkpoints(tmp_path / 'again')
  restored, _ = manager.restore(7, trainer.abstract, run_checkpoints.describe(trainer.objective))
  manager.close()
  _assert_same_bits(restored, state)
  # A run that has begun is not written over.
  assert main.main(again) == 2
  assert 'again: has checkpoints already; choose another --model_dir' in capsys.readouterr().err


def test_whole_second_moments_of_earlier_versions_are_factored_both_ways(tmp_path, caplog):
  trainer = trainer_lib.Trainer(
    _generator(width=128),
    optimizers.adafactor(optimizers.parti_schedule()),
    mesh_lib.make_mesh(1, 1, 1, 1, jax.devices()[:1]),
  )
  whole, right = old_moments.whole_and_factored(
    t5x_checkpoints.state_dict(jax.device_get(_filled(trainer)))
  )
  state = t5x_checkpoints.train_state(whole, trainer.abstract)
  _save(tmp_path / 'run', trainer, jax.tree.map(jnp.asarray, state))
  t5x_checkpoint.run_to_t5x(tmp_path / 'run', tmp_path / 't5x')
  assert 'second moments of 7 attention kernels' in caplog.text
  saved = t5x_checkpoints.ocp.PyTreeCheckpointer().restore(
    tmp_path / 't5x' / 'checkpoint_7' / 'state'
  )
  old_moments.assert_same(saved, right)
  written = t5x_checkpoints.write(tmp_path / 'old', whole)
  t5x_checkpoint.to_run(written, tmp_path / 'again', trainer)
  manager = checkpoint_manager.Checkpoints(tmp_path / 'again')
  restored, _ = manager.restore(7, trainer.abstract, run_checkpoints.describe(trainer.objective))
  manager.close()
  assert manager.factored == 0
  old_moments.assert_same(t5x_checkpoints.state_dict(restored), right)


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint_of_t5x(run, tmp_path, capsys):
  """`parti-jax train` takes the folder that the command makes, and writes the next checkpoint."""
  draw = np.random.default_rng(0)
  token_cache.write_token_cache(
    str(tmp_path / 'tokens'),
    [(f'number {i}', draw.integers(0, 64, 16)) for i in range(20)],
    {'codebook_size': 64, 'image_tokens': 16, 'tokenizer': 'none'},
    'train',
  )
  where = [*GIN, f'--model_dir={tmp_path}/run']
  assert main.main(['t5x_checkpoint', f'--from_t5x={run[2]}', *where]) == 0
  assert (
    main.main(
      ['train', *where, '--gin.train.steps=9', f"--gin.token_cache.path='{tmp_path}/tokens'"]
    )
    == 0
  )
  assert 'resuming at step 7' in capsys.readouterr().err
  path = run_checkpoints.latest_checkpoint(tmp_path / 'run')
  assert path.name == '9' and run_checkpoints.read_place(path)['places'] == [[0, 16]]


def test_an_exported_model_has_parameters_alone(tmp_path, capsys):
  assert (
    main.main(
      [
        't5x_checkpoint',
        f'--model={text_to_image.DEMO_FOLDER}',
        f'--output_dir={tmp_path}',
        '--network=tokenizer',
      ]
    )
    == 0
  )
  assert '--gin.CHECKPOINT_PATH=' in capsys.readouterr().out
  params = model_folder.load(text_to_image.DEMO_FOLDER).tokenizer_params
  found = t5x_checkpoints.ocp.PyTreeCheckpointer().restore(tmp_path / 'checkpoint_0' / 'state')
  _assert_same_bits(found, {'target': params, 'state': {'step': np.int32(0)}})


def test_the_optimizer_may_begin_anew(run, tmp_path, capsys):
  _, state, written = run
  adamw = [*GIN, '--gin.train.optimizer=@adamw', f'--model_dir={tmp_path}/run']
  command = ['t5x_checkpoint', f'--from_t5x={written}', *adamw]
  assert main.main(command) == 2
  error = capsys.readouterr().err
  assert 'state/param_states/' in error and '--parameters_only' in error
  assert not (tmp_path / 'run').exists()
  assert main.main([*command, '--parameters_only']) == 0
  assert 'the optimizer starts again' in capsys.readouterr().out
  trainer = _trainer('adamw')
  manager = checkpoint_manager.Checkpoints(tmp_path / 'run')
  restored, _ = manager.restore(7, trainer.abstract, run_checkpoints.describe(trainer.objective))
  manager.close()
  _assert_same_bits(restored.params, state.params)
  assert int(restored.step) == 7
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(jax.device_get(restored.optimizer_state)))


def test_what_does_not_fit_is_named_with_both_shapes(run):
  wanted = t5x_checkpoints.state_dict(
    trainer_lib.Trainer(
      _generator(width=64), optimizers.adafactor(optimizers.parti_schedule()), mesh_lib.make_mesh()
    ).abstract
  )
  with pytest.raises(UserError, match='checkpoint_7: does not match the gin files') as caught:
    t5x_checkpoints.read(run[2], {'target': wanted['target']}, within=('target/',))
  for words in (
    'target/',
    'is [32] instead of [64]',
    ' more; ',
    'give the gin files of the model',
  ):
    assert words in str(caught.value)


def test_a_narrower_dtype_is_refused_and_a_wider_one_is_exact(tmp_path):
  value = jnp.linspace(0.0, 1.0, 7, dtype=jnp.bfloat16)
  tree = {'target': {'a': value}, 'state': {'step': jnp.int32(3)}}
  written = t5x_checkpoints.write(tmp_path, tree)
  wider = tree | {'target': {'a': value.astype(jnp.float32)}}
  found = t5x_checkpoints.read(written, t5x_checkpoints.in_host_memory(wider))
  _assert_same_bits(found, wider)
  narrower = tree | {'target': {'a': value.astype(jnp.float8_e5m2)}}
  with pytest.raises(UserError, match='target/a is bfloat16 instead of float8_e5m2'):
    t5x_checkpoints.read(written, t5x_checkpoints.in_host_memory(narrower))
  with pytest.raises(UserError, match=r'target/b \[7\] is missing; target/a \[7\] is not in'):
    t5x_checkpoints.read(written, t5x_checkpoints.in_host_memory(tree | {'target': {'b': value}}))


def test_what_is_no_checkpoint_of_t5x_is_named(run, tmp_path):
  wanted = {'state': {'step': jax.ShapeDtypeStruct((), jnp.int32)}}
  with pytest.raises(UserError, match='t5x: not a checkpoint of t5x.*such as .*t5x/checkpoint_7'):
    t5x_checkpoints.read(run[2].parent, wanted)
  with pytest.raises(UserError, match='nowhere: not a checkpoint of t5x'):
    t5x_checkpoints.read(tmp_path / 'nowhere', wanted)
  (tmp_path / 'old').mkdir()
  (tmp_path / 'old' / 'checkpoint').write_bytes(b'')
  with pytest.raises(UserError, match="old: .* t5x's older format.*use_orbax=True"):
    t5x_checkpoints.read(tmp_path / 'old', wanted)
  (tmp_path / 'torn' / 'state').mkdir(parents=True)
  with pytest.raises(UserError, match='torn: its metadata is missing'):
    t5x_checkpoints.read(tmp_path / 'torn', wanted)


def test_a_damaged_checkpoint_of_t5x_is_named(run, tmp_path):
  copy = tmp_path / 'checkpoint_7'
  shutil.copytree(run[2], copy)
  largest = max((copy / 'state').rglob('d/*'), key=lambda path: path.stat().st_size)
  content = bytearray(largest.read_bytes())
  content[:] = content[: len(content) // 2]
  largest.write_bytes(content)
  wanted = t5x_checkpoints.state_dict(_trainer('adafactor').abstract)
  with pytest.raises(UserError, match='checkpoint_7: cannot be read .*damaged'):
    t5x_checkpoints.read(copy, wanted)


def test_nothing_is_left_of_a_checkpoint_that_could_not_be_written(tmp_path, monkeypatch):
  tree = {'target': {'a': jnp.ones(3)}, 'state': {'step': jnp.int32(3)}}
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(UserError, match='file/t5x: cannot be created .*--output_dir'):
    t5x_checkpoints.write(tmp_path / 'file' / 't5x', tree)

  def fail(*_, **__):
    assert list(tmp_path.glob('checkpoint_3*'))
    raise OSError(errno.ENOSPC, 'No space left on device', str(tmp_path))

  monkeypatch.setattr(t5x_checkpoints.ocp.PyTreeCheckpointHandler, 'finalize', fail)
  with pytest.raises(UserError, match='no space left on device'):
    t5x_checkpoints.write(tmp_path, tree)
  assert not list(tmp_path.glob('checkpoint_3*'))


@pytest.mark.parametrize(
  'flags, words',
  [
    ([], '--output_dir not given'),
    (['--output_dir=o'], 'give --model_dir=RUN or --model=FOLDER'),
    (['--output_dir=o', '--model_dir=r', '--model=m'], 'give --model_dir=RUN or --model=FOLDER'),
    (['--output_dir=o', '--model=m', '--step=3'], "--step can't be combined with --model"),
    (
      ['--output_dir=o', '--model_dir=r', '--parameters_only'],
      "--parameters_only can't be combined",
    ),
    (['--output_dir=o', '--model_dir=r', '--gin.a.b=1'], "--gin.NAME=VALUE can't be combined"),
    (['--output_dir=s3://b/o', '--model=m'], 's3://b/o: t5x reads checkpoints only from'),
    (['--from_t5x=c'], '--model_dir and --gin_file not given'),
    (
      ['--from_t5x=c', '--model_dir=r', *GIN, '--step=2'],
      "--step can't be combined with --from_t5x",
    ),
  ],
)
def test_bad_flags(flags, words, capsys):
  assert main.main(['t5x_checkpoint', *flags]) == 2
  assert words in capsys.readouterr().err


def test_bad_runs(run, tmp_path, capsys):
  folder, _, written = run
  command = ['t5x_checkpoint', f'--output_dir={tmp_path}']
  assert main.main([*command, f'--model_dir={folder}', '--step=6']) == 2
  assert 'no checkpoint of step 6; there are 7' in capsys.readouterr().err
  assert (
    main.main(['t5x_checkpoint', f'--output_dir={written.parent}', f'--model_dir={folder}']) == 2
  )
  assert 'checkpoint_7 exists already' in capsys.readouterr().err
  manager = checkpoint_manager.Checkpoints(tmp_path / 'ranker')
  manager.save(1, {'step': jnp.int32(1)}, {}, {'stage': 'ranker', 'config': {}})
  manager.close()
  assert main.main([*command, f'--model_dir={tmp_path}/ranker']) == 2
  assert "of the objective 'ranker', which t5x has no model for" in capsys.readouterr().err
  assert not [path for path in tmp_path.iterdir() if path.name.startswith('checkpoint')]

"""Checkpoints between our runs and t5x's own checkpoint manager, bit for bit.

t5x's mesh has 8 devices, 2-way model partitioned; we write from one device and read onto a mesh
that splits parameters 4 ways.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import old_moments
import pytest
import require_t5x  # noqa: F401
from t5x import partitioning
from t5x import utils

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import t5x_checkpoint
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.t5x import checkpoints as t5x_checkpoints
from parti_jax.t5x import models
from parti_jax.t5x import optimizers
from parti_jax.t5x import restoring
from parti_jax.training import optimizers as our_optimizers
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

# Wide enough for Adafactor to factor moments.
PARTI = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=1,
  width=128,
  mlp_width=256,
  heads=4,
  text_vocabulary=160,
  text_length=6,
  codebook_size=32,
  grid=(2, 3),
  dtype='float32',
)
TOKENIZER = vit_vqgan.ViTVQGANConfig(
  image_size=8,
  patch_size=4,
  encoder_layers=1,
  encoder_width=16,
  encoder_mlp_width=16,
  encoder_heads=2,
  decoder_layers=1,
  decoder_width=16,
  decoder_mlp_width=16,
  decoder_heads=2,
  codebook_size=6,
  code_dim=4,
  dtype='float32',
)
OPTIMIZERS = {'adafactor': our_optimizers.adafactor, 'adamw': our_optimizers.adamw}
STEP = 7


class Sides:
  """The same training on both sides.

  Attributes:
    trainer: ours, on 8 devices.
    alone: ours, on one device.
    partitioner: t5x's.
    initializer: of t5x's train state.
  """

  def __init__(self, objective_name: str, optimizer: str):
    optimizer = OPTIMIZERS[optimizer]
    wrapped = optimizers.OptaxWrapper(optimizer)
    if objective_name == 'generator':
      objective = generator_objective.GeneratorObjective(PARTI)
      model = models.PartiModel(parti.Parti(PARTI), wrapped)
      shapes = {'encoder_input_tokens': (4, 6), 'decoder_target_tokens': (4, 6)}
    else:
      objective = tokenizer_objective.TokenizerObjective(TOKENIZER, revive_every=0)
      model = models.TokenizerModel(objective, wrapped)
      shapes = {'images': (4, 8, 8, 3)}
    self.trainer, self.alone = (
      trainer_lib.Trainer(objective, optimizer(our_optimizers.parti_schedule()), mesh)
      for mesh in (mesh_lib.make_mesh(2, 2, 2), mesh_lib.make_mesh(devices=jax.devices()[:1]))
    )
    self.partitioner = partitioning.PjitPartitioner(num_partitions=2)
    self._model, self._shapes = model, shapes
    self.initializer = self._initializer(model.optimizer_def)

  def _initializer(self, optimizer_def):
    return utils.TrainStateInitializer(
      optimizer_def,
      self._model.get_initial_variables,
      self._shapes,
      self.partitioner,
      {name: jnp.int32 for name in self._shapes},
    )

  def t5x_state(self, values):
    """A train state of t5x on its mesh, of a state dict of numpy arrays."""
    shardings = self._shardings(self.initializer).state_dict()
    return self.initializer.global_train_state_shape.restore_state(
      jax.tree.map(jax.device_put, values, shardings)
    )

  def _shardings(self, initializer):
    mesh = self.partitioner.mesh
    is_spec = lambda leaf: leaf is None or isinstance(leaf, jax.sharding.PartitionSpec)
    return jax.tree.map(
      lambda spec: jax.sharding.NamedSharding(mesh, spec or jax.sharding.PartitionSpec()),
      initializer.train_state_axes,
      is_leaf=is_spec,
    )

  def save_by_t5x(self, state, folder):
    """What `t5x.train` does at a checkpoint; returns the checkpoint's folder."""
    folder.mkdir()
    manager = utils.create_orbax_checkpoint_manager(
      save_cfg=utils.SaveCheckpointConfig(),
      partitioner=self.partitioner,
      model_dir=str(folder),
      train_state=self.initializer.global_train_state_shape,
    )
    assert manager.save(state, ())
    manager.wait_until_finished()
    manager.close()
    return folder / f'checkpoint_{STEP}'

  def restore_by_t5x(self, path, infer: bool = False, **config):
    """What `t5x.train`, or with `infer` `t5x.infer`, does with an initial checkpoint."""
    initializer = self._initializer(None) if infer else self.initializer
    # The dtype of t5x's own finetune.gin, and of `t5x.train` whenever it resumes.
    restore = utils.RestoreCheckpointConfig(
      path=str(path), mode='specific', dtype='float32', **config
    )
    state, manager = utils.create_checkpoint_manager_and_restore(
      initializer,
      self.partitioner,
      restore,
      str(path),
      jax.random.PRNGKey(0),
      model_dir=str(path.parent),
      use_orbax=True,
    )
    manager.close()
    return state

  def save_by_ours(self, state, folder):
    manager = checkpoint_manager.Checkpoints(folder)
    manager.save(
      STEP, state, {'epoch': 0, 'taken': 0}, run_checkpoints.describe(self.trainer.objective)
    )
    manager.close()

  def restore_by_ours(self, folder):
    """What `parti-jax train` does when it starts again."""
    manager = checkpoint_manager.Checkpoints(folder)
    state, _ = manager.restore(
      STEP, self.trainer.abstract, run_checkpoints.describe(self.trainer.objective)
    )
    manager.close()
    return state


def _values(tree):
  """Numpy arrays of a tree's dtypes, in which every number is another; and the step."""
  draw = np.random.default_rng(0)

  def values(leaf):
    if jnp.issubdtype(leaf.dtype, jnp.integer):
      return np.full(leaf.shape, STEP, leaf.dtype)
    return draw.normal(size=leaf.shape).astype(leaf.dtype)

  return jax.tree.map(values, tree)


def _assert_same_bits(a, b):
  def same(one, other):
    one, other = np.asarray(one), np.asarray(other)
    assert one.dtype == other.dtype and one.shape == other.shape
    assert one.tobytes() == other.tobytes()

  jax.tree.map(same, a, b)


@pytest.fixture(
  scope='module',
  params=[('generator', 'adafactor'), ('generator', 'adamw'), ('tokenizer', 'adamw')],
  ids='-'.join,
)
def sides(request):
  return Sides(*request.param)


def test_t5x_to_ours_to_t5x(sides, tmp_path):
  values = _values(sides.initializer.global_train_state_shape.state_dict())
  state = sides.t5x_state(values)
  split = [
    leaf for leaf in jax.tree.leaves(state.state_dict()) if not leaf.sharding.is_fully_replicated
  ]
  assert len(split) > 5
  saved = sides.save_by_t5x(state, tmp_path / 't5x')
  t5x_checkpoint.to_run(saved, tmp_path / 'run', sides.alone)
  ours = sides.restore_by_ours(tmp_path / 'run')
  _assert_same_bits(t5x_checkpoints.state_dict(ours), values)
  t5x_checkpoint.run_to_t5x(tmp_path / 'run', tmp_path / 'again')
  restored = sides.restore_by_t5x(tmp_path / 'again' / f'checkpoint_{STEP}')
  assert jax.tree.structure(restored) == jax.tree.structure(state)
  _assert_same_bits(restored.state_dict(), values)
  for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(restored)):
    assert after.sharding.is_equivalent_to(before.sharding, after.ndim)


def test_ours_to_t5x_to_ours(sides, tmp_path):
  values = _values(sides.trainer.abstract)
  sides.save_by_ours(jax.tree.map(jnp.asarray, values), tmp_path / 'run')
  t5x_checkpoint.run_to_t5x(tmp_path / 'run', tmp_path / 't5x')
  theirs = sides.restore_by_t5x(tmp_path / 't5x' / f'checkpoint_{STEP}')
  _assert_same_bits(theirs.state_dict(), t5x_checkpoints.state_dict(values))
  saved = sides.save_by_t5x(theirs, tmp_path / 'by_t5x')
  t5x_checkpoint.to_run(saved, tmp_path / 'again', sides.alone)
  _assert_same_bits(sides.restore_by_ours(tmp_path / 'again'), values)


def test_t5x_takes_whole_second_moments_of_earlier_versions(tmp_path):
  sides = Sides('generator', 'adafactor')
  whole, right = old_moments.whole_and_factored(
    _values(sides.initializer.global_train_state_shape.state_dict())
  )
  written = t5x_checkpoints.write(tmp_path, whole)
  restored = sides.restore_by_t5x(tmp_path / written.name)
  old_moments.assert_same(restored.state_dict(), right)
  expected = sides.t5x_state(right)
  assert jax.tree.structure(restored) == jax.tree.structure(expected)
  for leaf, plan in zip(jax.tree.leaves(restored), jax.tree.leaves(expected)):
    assert leaf.sharding.is_equivalent_to(plan.sharding, plan.ndim)


def test_inference_takes_the_parameters(sides, tmp_path):
  values = _values(sides.trainer.abstract)
  written = t5x_checkpoints.write(tmp_path, t5x_checkpoints.state_dict(values))
  state = sides.restore_by_t5x(tmp_path / written.name, infer=True)
  assert int(state.step) == STEP
  _assert_same_bits(state.state_dict()['target'], values.params)


def test_finetuning_an_exported_model(tmp_path):
  """Parameters alone do for inference; for training, as in finetune.gin, the optimizer starts from scratch."""
  sides = Sides('generator', 'adafactor')
  params = _values(sides.trainer.abstract.params)
  written = (
    tmp_path
    / t5x_checkpoints.write(tmp_path, {'target': params, 'state': {'step': np.int32(0)}}).name
  )
  _assert_same_bits(sides.restore_by_t5x(written, infer=True).state_dict()['target'], params)
  state = sides.restore_by_t5x(
    written,
    fallback_to_scratch=True,
    state_transformation_fns=[functools.partial(restoring.of_checkpoint, parameters_only=True)],
  )
  _assert_same_bits(state.state_dict()['target'], params)
  assert int(state.step) == 0
  assert jax.tree.structure(state) == jax.tree.structure(sides.initializer.global_train_state_shape)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.param_states))

"""What an objective must say, and what it may leave out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base


@dataclasses.dataclass(frozen=True)
class _Config:
  width: int = 3
  remat: str = 'none'
  compute_dtype = jnp.float32


@dataclasses.dataclass(frozen=True)
class _Least(base.Objective):
  """A linear regression, with the abstract members alone."""

  model: _Config = _Config()

  name = 'least'

  def feature_lengths(self):
    return {'inputs': self.model.width}

  def abstract_batch(self, batch_size):
    return {'x': jax.ShapeDtypeStruct((batch_size, self.model.width), jnp.float32)}

  def init(self, rng):
    return {'linear': jax.random.normal(rng, (self.model.width,))}

  def loss(self, params, batch, dropout_keys, step):
    del dropout_keys, step
    return jnp.mean(self.evaluate(params, batch)['error']), {'metrics': {}}

  def weight(self, batch):
    return jnp.float32(len(batch['x']))

  def evaluate(self, params, batch):
    return {'error': jnp.square(batch['x'] @ params['linear'] - 1.0)}

  def step_flops(self, batch_size):
    return 6 * batch_size * self.model.width


@pytest.mark.parametrize('microbatches', [1, 2])
def test_an_objective_needs_the_abstract_members_alone(tmp_path, microbatches):
  objective = _Least()
  trainer = trainer_lib.Trainer(
    objective, optax.sgd(0.1), mesh_lib.make_mesh(), 0, microbatches=microbatches
  )
  state = trainer.create_state()
  batch = {'x': np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32)}
  weights = np.asarray(state.params['linear'])
  error = batch['x'] @ weights - 1.0
  state, metrics = trainer.step(state, trainer.put(batch))
  np.testing.assert_allclose(metrics['loss'], np.mean(error**2), rtol=1e-5)
  gradient = 2 * np.mean(error[:, None] * batch['x'], axis=0)
  np.testing.assert_allclose(state.params['linear'], weights - 0.1 * gradient, rtol=1e-4)
  error = batch['x'] @ np.asarray(state.params['linear']) - 1.0
  measured = trainer.evaluate(state.params, [batch])
  assert measured == {'error': pytest.approx(np.mean(error**2), rel=1e-5)}
  assert not trainer.can_draw() and trainer.pictures(state.params, batch) == {}
  assert trainer.lower(16).compile() is not None
  inputs = inputs_lib.Inputs(objective, {}, uses_tokenizer=True)
  assert train_loop.initial_parts(trainer, tmp_path, inputs) == {}


@pytest.mark.parametrize('member', sorted(base.Objective.__abstractmethods__))
def test_an_objective_without_one_of_them_is_not_made(member):
  lacking = type('Lacking', (_Least,), {member: getattr(base.Objective, member)})
  with pytest.raises(TypeError, match=member):
    lacking()

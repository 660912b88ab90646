"""The loss over depth: every decoder layer's own prediction, against models that end there."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import flops
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.training.objectives import generator_objective

MODEL = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=4,
  width=8,
  mlp_width=16,
  heads=2,
  text_vocabulary=8,
  text_length=3,
  codebook_size=6,
  grid=(1, 2),
  dropout=0.0,
  dtype='float32',
)
BATCH = {
  'encoder_input_tokens': np.array([[3, 4, 1], [5, 1, 0]], np.int32),
  'decoder_target_tokens': np.array([[2, 0], [5, 5]], np.int32),
  'decoder_loss_weights': np.array([[1, 1], [1, 0]], np.float32),
}


@pytest.fixture(scope='module')
def params():
  objective = generator_objective.GeneratorObjective(MODEL)
  return random_parameters.of_objective(objective)


def _first_layers(params, count):
  """The model that ends after `count` decoder layers."""
  decoder = params['image_decoder']['decoder']
  layers = jax.tree.map(lambda leaf: leaf[:count], decoder['layers'])
  return params | {
    'image_decoder': params['image_decoder'] | {'decoder': decoder | {'layers': layers}}
  }


def _value(params, weights, **sizes):
  objective = generator_objective.GeneratorObjective(
    dataclasses.replace(MODEL, **sizes), depth_loss_weights=weights
  )
  (loss, aux), gradient = jax.jit(
    jax.value_and_grad(
      lambda params, batch: objective.loss(params, batch, None, jnp.int32(0)), has_aux=True
    )
  )(params, BATCH)
  return float(loss), aux['metrics'], gradient


@pytest.fixture(scope='module')
def of_depth(params):
  """The losses of models that end after 1, 2, 3 and 4 layers."""
  losses = []
  for count in (1, 2, 3, 4):
    objective = generator_objective.GeneratorObjective(
      dataclasses.replace(MODEL, decoder_layers=count)
    )
    loss, _ = jax.jit(objective.loss)(_first_layers(params, count), BATCH, None, 0)
    losses.append(float(loss))
  return losses


def test_the_loss_is_the_weighted_mean_of_models_that_end_earlier(params, of_depth):
  assert np.ptp(of_depth) > 1e-3
  loss, metrics, gradient = _value(params, (1, 2, 3, 4))
  assert loss == pytest.approx(np.dot(of_depth, [0.1, 0.2, 0.3, 0.4]), rel=1e-5)
  assert metrics['last_layer_loss'] == pytest.approx(of_depth[-1], rel=1e-5)
  # Recomputed in the backward pass, and in two scans, it is the same.
  again, _, recomputed = _value(params, (1, 2, 3, 4), remat='nothing')
  assert again == pytest.approx(loss, rel=1e-6)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradient, recomputed
  )


def test_a_layer_without_weight_does_not_predict(params, of_depth):
  objective = generator_objective.GeneratorObjective(MODEL, depth_loss_weights=(0, 1, 0, 3))
  loss, _ = jax.jit(objective.loss)(params, BATCH, None, 0)
  assert float(loss) == pytest.approx(0.25 * of_depth[1] + 0.75 * of_depth[3], rel=1e-5)
  measures = jax.jit(objective.evaluate)(params, BATCH)
  assert set(measures) == {'loss', 'loss_after_2', 'token_accuracy'}
  plain = generator_objective.GeneratorObjective(MODEL)
  expected = jax.jit(plain.evaluate)(params, BATCH)
  np.testing.assert_allclose(measures['loss'], expected['loss'], rtol=1e-5)
  assert np.all(np.abs(measures['loss_after_2'] - measures['loss']) > 1e-4)
  assert objective.step_flops(2) == plain.step_flops(2) + 6 * flops.logits_forward(MODEL)


def test_no_parameter_is_added():
  init = lambda weights: jax.eval_shape(
    generator_objective.GeneratorObjective(MODEL, depth_loss_weights=weights).init,
    jax.random.key(0),
  )
  assert jax.tree.structure(init(None)) == jax.tree.structure(init((1, 2, 3, 4)))


def test_stages_of_a_pipeline_are_an_error():
  mesh = mesh_lib.make_mesh(data=1, stage=2, devices=jax.devices()[:2])
  model = dataclasses.replace(MODEL, encoder_layers=2)
  objective = generator_objective.GeneratorObjective(model, depth_loss_weights=(1, 2, 3, 4))
  params = jax.eval_shape(lambda: nn.meta.unbox(objective.init(jax.random.key(0))))
  with rules.partitioned(mesh, rules.logical_axis_rules()):
    with pytest.raises(UserError, match='make_mesh.stage=2.*depth_loss_weights'):
      jax.eval_shape(objective.loss, params, BATCH, None, jnp.int32(0))


@pytest.mark.parametrize('weights', [(1, 2), (1, 2, 3, -4), (1, 2, 3, 0), ()])
def test_weights_that_can_not_be_are_named(weights):
  with pytest.raises(UserError, match='GeneratorObjective.depth_loss_weights='):
    generator_objective.GeneratorObjective(MODEL, depth_loss_weights=weights)

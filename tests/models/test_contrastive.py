"""The contrastive loss: by formula, on a mesh as on one device, with texts that are the same."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import contrastive
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules

BATCH, DIM = 16, 6


def _features(seed):
  draw = np.random.default_rng(seed).normal(size=(BATCH, DIM))
  return jnp.asarray(draw / np.linalg.norm(draw, axis=1, keepdims=True), jnp.float32)


def _loss(images, texts, log_scale, tokens):
  same = None if tokens is None else contrastive.equal_rows(tokens)
  losses, _ = contrastive.contrastive_losses(images, texts, jnp.exp(log_scale), same)
  return jnp.mean(losses)


def _loss_and_gradients(arguments, tokens, sizes=None):
  """On the mesh of `sizes`, or on one device."""
  function = jax.value_and_grad(_loss, argnums=(0, 1, 2))
  if sizes is None:
    return jax.jit(function)(*arguments, tokens)
  mesh = mesh_lib.make_mesh(*sizes)
  table = rules.logical_axis_rules()
  split = rules.batch_sharding(mesh, table)
  with rules.partitioned(mesh, table):
    placed = [jax.device_put(array, split) for array in (*arguments[:2], tokens)]
    return jax.jit(function)(*placed[:2], arguments[2], placed[2])


@pytest.fixture(name='arguments')
def fixture_arguments():
  return _features(0), _features(1), jnp.float32(1.5)


def _tokens():
  tokens = np.arange(BATCH * 3, dtype=np.int32).reshape(BATCH, 3)
  tokens[5] = tokens[2]
  tokens[11, :2] = tokens[10, :2]  # Two of three equal tokens don't make equal texts.
  return jnp.asarray(tokens)


def test_it_is_the_cross_entropy_in_both_directions(arguments):
  images, texts, log_scale = arguments
  logits = np.exp(log_scale) * np.asarray(images, np.float64) @ np.asarray(texts).T
  chance = lambda axis: np.diag(np.exp(logits) / np.exp(logits).sum(axis, keepdims=True))
  losses, hits = contrastive.contrastive_losses(images, texts, jnp.exp(log_scale))
  np.testing.assert_allclose(losses, -np.log(chance(0)) - np.log(chance(1)), rtol=1e-5)
  np.testing.assert_array_equal(hits, logits.argmax(1) == np.arange(BATCH))


def test_equal_texts_are_no_negatives_of_one_another(arguments):
  images, texts, log_scale = arguments
  same = contrastive.equal_rows(_tokens())
  assert same[2, 5] and same[5, 2] and same.sum() == BATCH + 2
  losses, _ = contrastive.contrastive_losses(images, texts, jnp.exp(log_scale), same)
  without = jnp.array([row for row in range(BATCH) if row != 5])
  alone, _ = contrastive.contrastive_losses(images[without], texts[without], jnp.exp(log_scale))
  np.testing.assert_allclose(losses[2], alone[2], rtol=1e-5)
  assert not np.isclose(losses[3], alone[3], rtol=1e-3)  # Its negatives are all others, 5 too.


@pytest.mark.parametrize('sizes', [(8, 1, 1, 1), (2, 2, 2, 1)])
def test_negatives_come_from_the_whole_mesh(arguments, sizes):
  value, gradients = _loss_and_gradients(arguments, _tokens())
  there, gradients_there = _loss_and_gradients(arguments, _tokens(), sizes)
  np.testing.assert_allclose(there, value, rtol=1e-6)
  for ours, theirs in zip(gradients, gradients_there, strict=True):
    np.testing.assert_allclose(theirs, ours, atol=1e-6 * np.abs(ours).max())
  # A loss of each device's own pairs is another one.
  parts = [
    _loss(images, texts, arguments[2], tokens)
    for images, texts, tokens in zip(
      *(jnp.split(array, 8) for array in (*arguments[:2], _tokens()))
    )
  ]
  assert abs(np.mean(parts) - value) > 0.5


def test_no_device_holds_all_logits(arguments):
  mesh, table = mesh_lib.make_mesh(8, 1, 1, 1), rules.logical_axis_rules()
  split = rules.batch_sharding(mesh, table)
  with rules.partitioned(mesh, table):
    placed = [jax.device_put(array, split) for array in (*arguments[:2], _tokens())]
    compiled = (
      jax.jit(jax.grad(_loss, argnums=(0, 1)))
      .lower(*placed[:2], arguments[2], placed[2])
      .compile()
      .as_text()
    )
  assert f'[{BATCH // 8},{BATCH}]' in compiled
  assert f'[{BATCH},{BATCH}]' not in compiled


def test_the_temperature_begins_at_clips_and_is_bounded():
  module = contrastive.LogitScale()
  params = nn.meta.unbox(module.init(jax.random.key(0)))['params']
  np.testing.assert_allclose(module.apply({'params': params}), 1 / 0.07, rtol=1e-5)
  np.testing.assert_allclose(module.apply({'params': {'log_scale': 9.0}}), 100.0, rtol=1e-5)

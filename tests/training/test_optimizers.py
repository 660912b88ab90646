"""Adafactor and AdamW step by step on small arrays, and schedules at their corners."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import parti_config
from parti_jax.training import generator_stage
from parti_jax.training import optimizers


def _bfloat16(x):
  return np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32)


def _state_with(state, name):
  return next(part for part in state if hasattr(part, name))


def test_adafactor_by_hand():
  draw = np.random.default_rng(0)
  kernel = draw.normal(size=(3, 4)).astype(np.float32)
  optimizer = optimizers.adafactor(
      lambda step: 0.5 + step, beta1=0.9, beta2=0.96, weight_decay=0.1, max_gradient_norm=100.0)
  params = {'kernel': kernel}
  state = optimizer.init(params)
  second, first = 0.0, np.zeros((3, 4), np.float32)
  for step in range(3):
    gradient = draw.normal(size=(3, 4)).astype(np.float32)
    # The second moment begins with the first gradient; then beta2 is constant.
    second = gradient ** 2 if step == 0 else 0.96 * second + 0.04 * gradient ** 2
    average = 0.9 * first + 0.1 * gradient / np.sqrt(second)
    first = _bfloat16(average)
    updates, state = optimizer.update({'kernel': gradient}, state, params)
    np.testing.assert_allclose(
        updates['kernel'], -(0.5 + step) * (average + 0.1 * params['kernel']), atol=1e-2)
    np.testing.assert_allclose(_state_with(state, 'v').v['kernel'], second, rtol=1e-5)
    stored = _state_with(state, 'ema').ema['kernel']
    assert stored.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(stored, np.float32), first, atol=3e-3)


def test_adafactor_factors_the_second_moment_of_wide_kernels():
  rows, columns = np.linspace(1, 2, 128), np.linspace(3, 1, 256)
  gradient = {'kernel': np.outer(rows, columns).astype(np.float32)}
  optimizer = optimizers.adafactor(lambda step: 1.0, weight_decay=0.0, max_gradient_norm=1e9)
  params = jax.tree.map(jnp.zeros_like, gradient)
  updates, state = optimizer.update(gradient, optimizer.init(params), params)
  factored = _state_with(state, 'v_row')
  assert {factored.v_row['kernel'].shape, factored.v_col['kernel'].shape} == {(128,), (256,)}
  assert factored.v['kernel'].size == 1
  # A moment of rank one is kept exactly, so that each gradient is divided by its own size.
  np.testing.assert_allclose(updates['kernel'], -0.1, rtol=1e-4)


def test_the_gradient_is_clipped_by_its_norm_over_all_parameters():
  gradients = {'a': {'kernel': np.full((2, 8), 3.0, np.float32)},
               'b': {'kernel': np.full((5,), 4.0, np.float32)}}
  norm = np.sqrt(16 * 9 + 5 * 16)
  optimizer = optimizers.adafactor(lambda step: 1.0, max_gradient_norm=4.0)
  _, state = optimizer.update(gradients, optimizer.init(gradients), gradients)
  second = _state_with(state, 'v').v
  np.testing.assert_allclose(second['a']['kernel'], (3.0 * 4.0 / norm) ** 2, rtol=1e-5)
  np.testing.assert_allclose(second['b']['kernel'], (4.0 * 4.0 / norm) ** 2, rtol=1e-5)
  small = jax.tree.map(lambda leaf: leaf / norm, gradients)
  _, state = optimizer.update(small, optimizer.init(gradients), gradients)
  np.testing.assert_allclose(
      _state_with(state, 'v').v['a']['kernel'], (3.0 / norm) ** 2, rtol=1e-5)


@pytest.mark.parametrize('make', [optimizers.adafactor, optimizers.adamw])
def test_weight_decay_acts_on_kernels_alone(make):
  params = {'mlp': {'kernel': jnp.ones((2, 3))}, 'norm': {'scale': jnp.ones(3)},
            'codebook': {'table': jnp.ones((4, 3))}, 'begin': jnp.ones(3)}
  optimizer = make(lambda step: 0.5, weight_decay=0.1)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates['mlp']['kernel'], -0.05, rtol=1e-5)
  for path in (('norm', 'scale'), ('codebook', 'table')):
    assert not np.any(updates[path[0]][path[1]])
  assert not np.any(updates['begin'])


def test_every_kernel_of_a_model_is_decayed_and_nothing_else():
  sizes = parti_config.PartiConfig(
      encoder_layers=1, decoder_layers=1, width=8, mlp_width=8, heads=2, text_vocabulary=8,
      text_length=2, codebook_size=8, grid=(2, 2))
  boxed = jax.eval_shape(generator_stage.GeneratorStage(sizes).init, jax.random.key(0))
  for path, decays in jax.tree_util.tree_leaves_with_path(
      optimizers.decayed(nn.meta.unbox(boxed))):
    assert decays == ('kernel' in jax.tree_util.keystr(path)), path


def test_adamw_by_hand():
  params = {'kernel': np.array([2.0, -1.0], np.float32)}
  gradient = {'kernel': np.array([0.3, -0.4], np.float32)}  # Of norm 0.5.
  optimizer = optimizers.adamw(
      lambda step: 0.1, beta1=0.9, beta2=0.99, weight_decay=0.2, max_gradient_norm=0.25)
  updates, _ = optimizer.update(gradient, optimizer.init(params), params)
  # Debiased moments of the first step: the clipped gradient over its size.
  np.testing.assert_allclose(
      updates['kernel'], [-0.1 * (1 + 0.2 * 2), -0.1 * (-1 - 0.2)], rtol=1e-5)


@pytest.mark.parametrize('step, rate', [
    (0, 0.0), (2500, 2.25e-5), (5000, 4.5e-5), (30000, 4.5e-5), (85000, 4.5e-5),
    (267500, 4.5e-5 * 0.025 ** 0.5), (450000, 4.5e-5 * 0.025), (600000, 4.5e-5 * 0.025)])
def test_the_papers_schedule_at_its_corners(step, rate):
  schedule = optimizers.parti_schedule()
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-5)
  np.testing.assert_allclose(jax.jit(schedule)(jnp.int32(step)), rate, rtol=1e-5)


@pytest.mark.parametrize('step, rate', [
    (0, 0.0), (5000, 5e-5), (10000, 1e-4), (255000, 7.5e-5), (500000, 5e-5), (600000, 5e-5)])
def test_the_tokenizers_schedule_at_its_corners(step, rate):
  schedule = optimizers.warmup_cosine(1e-4, 10000, 500000, 5e-5)
  np.testing.assert_allclose(schedule(step), rate, rtol=1e-4)

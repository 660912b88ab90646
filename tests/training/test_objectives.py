"""The objectives' losses against direct formulas, the revival of codes, evaluation of any number."""

import dataclasses

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
import random_parameters
import tiny_configs

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import tokenizer_objective

TOKENIZER = tiny_configs.TOKENIZER
GENERATOR = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=1,
  width=8,
  mlp_width=16,
  heads=2,
  text_vocabulary=8,
  text_length=3,
  codebook_size=6,
  grid=(1, 2),
  dropout=0.5,
  dtype='float32',
)


def _one_pixel(value):
  return jnp.full((1, 1, 1, 1), value, jnp.float32)


@pytest.mark.parametrize('mean, log_scale', [(0.3, -1.0), (-1.5, -2.0), (0.0, -0.5)])
def test_logit_laplace_is_a_density_of_the_squeezed_pixel(mean, log_scale):
  # Over all of (0, 1), so also where no pixel gets to: x = 0.8 · pixel + 0.1.
  logits = np.linspace(-25, 25, 200_001)
  x = 1 / (1 + np.exp(-logits))
  pixels = jnp.asarray((x - 0.1) / 0.8, jnp.float32)[:, None, None, None]
  loss = tokenizer_objective.logit_laplace_loss(
    pixels, jnp.full_like(pixels, mean), jnp.full_like(pixels, log_scale)
  )
  inner = (x > 1e-4) & (x < 1 - 1e-4)  # Where float32 still tells x from 0 and 1.
  assert np.trapezoid(np.exp(-np.asarray(loss))[inner], x[inner]) == pytest.approx(1, abs=2e-3)


def test_logit_laplace_by_formula():
  pixel, mean, scale = 0.7, 0.4, 0.3
  x = 0.8 * pixel + 0.1
  density = np.exp(-abs(np.log(x / (1 - x)) - mean) / scale) / (2 * scale * x * (1 - x))
  loss = tokenizer_objective.logit_laplace_loss(
    _one_pixel(pixel), _one_pixel(mean), _one_pixel(np.log(scale))
  )
  np.testing.assert_allclose(loss, [-np.log(density)], rtol=1e-5)
  # Pixels at both ends are finite, however small the scale gets.
  for pixel in (0.0, 1.0):
    loss = tokenizer_objective.logit_laplace_loss(
      _one_pixel(pixel), _one_pixel(0.0), _one_pixel(-100.0)
    )
    assert np.isfinite(loss).all()


def test_psnr_in_decibels():
  images = jnp.zeros((2, 2, 2, 3)).at[1].set(0.5)
  np.testing.assert_allclose(
    tokenizer_objective.psnr(images, jnp.full_like(images, 0.1)),
    [20, -10 * np.log10(0.16)],
    rtol=1e-5,
  )
  assert np.isfinite(tokenizer_objective.psnr(images, images)).all()


def test_arrays_that_would_broadcast_are_not_compared():
  one, two = jnp.zeros((1, 4, 4, 3)), jnp.zeros((2, 4, 4, 3))
  for compare in (
    lambda: tokenizer_objective.psnr(one, two),
    lambda: tokenizer_objective.logit_laplace_loss(two, one, two),
    lambda: adversarial.adaptive_weight(two[..., 0], one[..., 0]),
  ):
    with pytest.raises(jaxtyping.TypeCheckError):
      compare()


@pytest.fixture(scope='module')
def tokenizer():
  objective = tokenizer_objective.TokenizerObjective(
    TOKENIZER,
    l2_weight=1.0,
    logit_laplace_weight=0.1,
    quantizer_weight=2.0,
    revive_every=10,
    revive_until=30,
    dead_below=0.05,
  )
  trainer = trainer_lib.Trainer(objective, optax.sgd(0.1), mesh_lib.make_mesh(), seed=0)
  return objective, trainer, trainer.create_state()


def _images(count, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3)).astype(np.uint8)


def test_the_tokenizers_loss_is_the_weighted_sum_of_its_parts(tokenizer):
  objective, _, state = tokenizer
  params, images = jax.device_get(state.params), _images(4)
  loss, aux = jax.jit(objective.loss)(params, {'images': images}, None, 0)
  out = jax.jit(vit_vqgan.ViTVQGAN(TOKENIZER).apply)({'params': params}, images / np.float32(255))
  l2 = np.mean((vit_vqgan.to_pixels(out['mean']) - images / np.float32(255)) ** 2)
  laplace = np.mean(
    tokenizer_objective.logit_laplace_loss(
      jnp.asarray(images / np.float32(255)),
      out['mean'],
      out['log_scale'],
      objective.least_log_scale,
    )
  )
  np.testing.assert_allclose(loss, 2.0 * out['quantizer_loss'] + l2 + 0.1 * laplace, rtol=1e-5)
  counts = np.bincount(out['tokens'].ravel(), minlength=6)
  np.testing.assert_array_equal(aux['code_use'], counts)
  _, _, metrics = jax.jit(objective.after_step)(
    params, objective.initial_statistics(), aux, 0, jax.random.key(0)
  )
  np.testing.assert_allclose(metrics['codes_in_batch'], np.mean(counts > 0))
  share = counts[counts > 0] / counts.sum()
  np.testing.assert_allclose(
    metrics['code_perplexity'], np.exp(-np.sum(share * np.log(share))), rtol=1e-5
  )


def test_the_decoder_sees_latents_until_codes_are_taken(tokenizer):
  _, _, state = tokenizer
  objective = tokenizer_objective.TokenizerObjective(TOKENIZER, quantize_from=5)
  batch, params = {'images': jnp.asarray(_images(4))}, jax.device_get(state.params)
  loss = jax.jit(jax.grad(lambda params, step: objective.loss(params, batch, None, step)[0]))
  before, after = loss(params, 4), loss(params, 5)
  assert not np.any(before['quantizer']['codebook']['table'])
  assert np.any(after['quantizer']['codebook']['table'])
  for gradients in (before, after):
    assert np.any(gradients['encoder']['project_codes']['kernel'])
    assert np.any(gradients['decoder']['project_codes']['kernel'])
  # The codebook's first codes are latents of the batch at which they begin to count.
  objective = tokenizer_objective.TokenizerObjective(
    TOKENIZER, quantize_from=5, revive_every=10, revive_until=30, dead_below=0.05
  )
  for step, changes in ((0, False), (4, False), (5, True), (10, False)):
    table = _after_step(objective, state, step, [1.0] * 6)[1]
    assert np.any(table != state.params['quantizer']['codebook']['table']) == changes, step


def _after_step(objective, state, step, use):
  draw = np.random.default_rng(3)
  aux = {
    'latents': jnp.asarray(draw.normal(size=(2, 4, 3)), jnp.float32),
    'code_use': jnp.zeros(6),
  }
  params, statistics, metrics = objective.after_step(
    state.params,
    {'code_use': jnp.asarray(use, jnp.float32)},
    aux,
    jnp.int32(step),
    jax.random.key(1),
  )
  return (
    np.asarray(aux['latents']),
    params['quantizer']['codebook']['table'],
    statistics['code_use'],
    metrics,
  )


def test_dead_codes_become_latents_of_the_batch(tokenizer):
  objective, _, state = tokenizer
  before = np.asarray(state.params['quantizer']['codebook']['table'])
  use = [1.0, 0.0, 0.5, 0.05, 0.0, 2.0]  # 0.98 of 0.05 lies below the limit as well.
  dead = np.array([False, True, False, True, True, False])
  latents, table, use_after, metrics = _after_step(objective, state, 20, use)
  unit = latents.reshape(-1, 3) / np.linalg.norm(latents.reshape(-1, 3), axis=1, keepdims=True)
  np.testing.assert_array_equal(table[~dead], before[~dead])
  for row in np.asarray(table)[dead]:
    assert np.abs(unit - row).max(axis=1).min() < 1e-5
  # No two of them take the same place, and each has time to be used.
  assert len(np.unique(np.round(table[dead], 5), axis=0)) == 3
  assert (use_after[dead] > objective.dead_below).all()
  np.testing.assert_allclose(use_after[~dead], 0.98 * np.asarray(use)[~dead], rtol=1e-6)
  np.testing.assert_allclose(metrics['codes_alive'], 0.5)


@pytest.mark.parametrize('step', [21, 30, 40])
def test_no_code_is_revived_at_another_step_or_after_the_last_one(tokenizer, step):
  objective, _, state = tokenizer
  _, table, use_after, _ = _after_step(objective, state, step, [0.0] * 6)
  np.testing.assert_array_equal(table, state.params['quantizer']['codebook']['table'])
  assert not np.any(use_after)


def test_evaluation_counts_every_example_once(tokenizer):
  # On 8 devices: a batch of 8, and 3 that have to be padded; then fewer than devices alone.
  objective, trainer, state = tokenizer
  images = _images(11, seed=1)
  each = jax.device_get(
    jax.jit(objective.evaluate)(jax.device_get(state.params), {'images': images})
  )
  measured = trainer.evaluate(state.params, iter([{'images': images[:8]}, {'images': images[8:]}]))
  assert measured['psnr'] == pytest.approx(np.mean(each['psnr']), rel=1e-5)
  assert measured['l2'] == pytest.approx(np.mean(each['l2']), rel=1e-5)
  assert measured['codes_used'] == len(np.unique(each['tokens'])) / 6
  few = trainer.evaluate(state.params, iter([{'images': images[8:]}]))
  assert few['psnr'] == pytest.approx(np.mean(each['psnr'][8:]), rel=1e-5)


def test_the_tokenizers_pictures_are_pairs(tokenizer):
  _, trainer, state = tokenizer
  images = _images(3)
  pairs = trainer.pictures(state.params, {'images': images})['reconstructions']
  assert pairs.shape == (3, 8, 16, 3) and pairs.dtype == jnp.uint8
  np.testing.assert_array_equal(pairs[:, :, :8], images)


def test_the_generators_loss_is_the_mean_cross_entropy_of_weighted_tokens():
  objective = generator_objective.GeneratorObjective(GENERATOR)
  params = random_parameters.of_objective(objective)
  batch = {
    'encoder_input_tokens': np.array([[3, 4, 1], [5, 1, 0]], np.int32),
    'decoder_target_tokens': np.array([[2, 0], [5, 5]], np.int32),
    'decoder_loss_weights': np.array([[1, 1], [1, 0]], np.float32),
  }
  keys = layers.dropout_keys(jax.random.key(2), 2)
  loss, aux = jax.jit(objective.loss)(params, batch, keys, 0)
  logits = jax.jit(parti.Parti(GENERATOR).apply)(
    {'params': params}, batch['encoder_input_tokens'], batch['decoder_target_tokens'], keys
  )
  logits = np.asarray(logits, np.float64)
  chance = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  losses = -np.log([chance[0, 0, 2], chance[0, 1, 0], chance[1, 0, 5]])
  np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
  hits = logits.argmax(-1) == batch['decoder_target_tokens']
  np.testing.assert_allclose(
    aux['metrics']['token_accuracy'], (hits[0, 0] + hits[0, 1] + hits[1, 0]) / 3, rtol=1e-6
  )
  # Dropout is off when it is evaluated.
  other, _ = jax.jit(objective.loss)(params, batch, layers.dropout_keys(jax.random.key(3), 2), 0)
  assert other != loss
  each = jax.jit(objective.evaluate)(params, batch)
  assert each['loss'].shape == (2,)
  np.testing.assert_array_equal(each['loss'], jax.jit(objective.evaluate)(params, batch)['loss'])


@pytest.mark.parametrize('scale, rows', [(1.0, 2), (2.5, 4)])
def test_samples_with_a_scale_of_1_need_no_pass_without_text(monkeypatch, scale, rows):
  config = dataclasses.replace(GENERATOR, grid=(2, 2))
  objective = generator_objective.GeneratorObjective(config, tokenizer='run', guidance_scale=scale)
  params = random_parameters.of(vit_vqgan.ViTVQGAN(TOKENIZER), vit_vqgan.example_inputs(TOKENIZER))
  loaded = frozen_tokenizer.FrozenTokenizer('run', TOKENIZER, params)
  monkeypatch.setattr(frozen_tokenizer, 'load_for', lambda *_: loaded)
  found, init_state = [], decoding.init_state
  monkeypatch.setattr(
    decoding,
    'init_state',
    lambda *args, **more: found.append(args[2].shape[0]) or init_state(*args, **more),
  )
  draw, inputs = objective.painter()
  batch = {'encoder_input_tokens': jnp.ones((2, 3), jnp.int32)}
  batch['decoder_target_tokens'] = jnp.zeros((2, 4), jnp.int32)
  generator_params = random_parameters.of_objective(objective, seed=1)
  samples = jax.jit(draw)(generator_params, batch, inputs)['samples']
  assert samples.shape == (2, 8, 16, 3) and found == [rows]

"""ViT-VQGAN: patches, quantizer, precision, axis names, remat and unrolling."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import quantizer
from parti_jax.models import vit_vqgan

TINY = vit_vqgan.ViTVQGANConfig(
  image_size=8,
  patch_size=4,
  encoder_layers=2,
  encoder_width=16,
  encoder_mlp_width=32,
  encoder_heads=2,
  decoder_layers=2,
  decoder_width=16,
  decoder_mlp_width=32,
  decoder_heads=2,
  codebook_size=10,
  code_dim=4,
  dtype='float32',
)


@pytest.fixture(scope='module')
def images():
  return jnp.asarray(np.random.default_rng(0).random((3, 8, 8, 3)), jnp.float32)


@pytest.fixture(scope='module')
def params(images):
  return random_parameters.of(vit_vqgan.ViTVQGAN(TINY), [images])


def test_patches_are_the_picture_cut_in_raster_order():
  images = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
  patches = vit_vqgan.to_patches(images, 2)
  assert patches.shape == (2, 6, 12)
  np.testing.assert_array_equal(patches[1, 4].reshape(2, 2, 3), images[1, 2:4, 2:4])
  np.testing.assert_array_equal(vit_vqgan.from_patches(patches, 2, (2, 3)), images)


def _quantize(table, latents, commitment=0.25):
  module = quantizer.VectorQuantizer(*table.shape, commitment)
  return module.apply({'params': {'codebook': {'table': jnp.asarray(table)}}}, jnp.asarray(latents))


def test_quantizer_takes_the_code_of_the_nearest_direction():
  draw = np.random.default_rng(1)
  table = draw.normal(size=(7, 3)).astype(np.float32) * np.arange(1, 8)[:, None]
  latents = draw.normal(size=(2, 5, 3)).astype(np.float32) * 4
  codes, tokens, _ = _quantize(table, latents)
  unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
  distances = np.linalg.norm(unit(latents)[:, :, None] - unit(table), axis=-1)
  np.testing.assert_array_equal(tokens, distances.argmin(-1))
  assert tokens.dtype == jnp.int32
  np.testing.assert_allclose(codes, unit(table)[distances.argmin(-1)], atol=1e-6)


def test_quantizer_loss_by_hand():
  table = np.array([[2.0, 0.0], [0.0, 3.0]], np.float32)
  latents = np.array([[[3.0, 4.0], [5.0, 0.0]]], np.float32)
  _, tokens, loss = _quantize(table, latents, commitment=0.5)
  np.testing.assert_array_equal(tokens, [[1, 0]])
  # (0.6, 0.8) to (0, 1): 0.36 + 0.04; (1, 0) to itself: 0; both terms have the same value.
  np.testing.assert_allclose(loss, 1.5 * np.mean([0.36, 0.04, 0.0, 0.0]), rtol=1e-6)


def test_gradients_go_straight_through_to_the_latents_and_by_the_loss_to_the_codes():
  draw = np.random.default_rng(2)
  table = draw.normal(size=(5, 3)).astype(np.float32)
  latents = jnp.asarray(draw.normal(size=(1, 4, 3)), jnp.float32)
  weights = draw.normal(size=(1, 4, 3)).astype(np.float32)
  through = lambda table, z: jnp.sum(_quantize(table, z)[0] * weights)
  to_table, to_latents = jax.grad(through, (0, 1))(table, latents)
  expected = jax.grad(lambda z: jnp.sum(quantizer.normalize(z) * weights))(latents)
  np.testing.assert_allclose(to_latents, expected, atol=1e-6)
  assert not to_table.any()

  by_loss = lambda commitment: jax.grad(
    lambda table, z: _quantize(table, z, commitment)[2], (0, 1)
  )(table, latents)
  to_table, to_latents = by_loss(0.25)
  used = np.unique(_quantize(table, latents)[1])
  assert set(np.flatnonzero(np.abs(to_table).sum(-1))) == set(used)
  np.testing.assert_allclose(by_loss(1.0)[1], 4 * to_latents, atol=1e-6)
  np.testing.assert_array_equal(by_loss(1.0)[0], to_table)


def test_tokenize_and_detokenize_are_the_two_halves(params, images):
  apply = jax.jit(vit_vqgan.ViTVQGAN(TINY).apply, static_argnames='method')
  out = apply({'params': params}, images)
  tokens = apply({'params': params}, images, method='tokenize')
  np.testing.assert_array_equal(tokens, out['tokens'])
  assert tokens.shape == (3, TINY.image_length)
  pixels = apply({'params': params}, tokens, method='detokenize')
  np.testing.assert_allclose(pixels, np.clip(vit_vqgan.to_pixels(out['mean']), 0, 1), atol=1e-5)
  assert 0 <= pixels.min() and pixels.max() <= 1


def test_to_pixels_undoes_the_map_to_logits():
  x = jnp.linspace(0, 1, 11)
  squeezed = (1 - 2 * vit_vqgan.LOGIT_LAPLACE_EPSILON) * x + vit_vqgan.LOGIT_LAPLACE_EPSILON
  np.testing.assert_allclose(vit_vqgan.to_pixels(jnp.log(squeezed / (1 - squeezed))), x, atol=1e-6)


def test_outputs_and_parameters_are_float32_when_projections_are_bfloat16(images):
  sizes = dataclasses.replace(TINY, dtype='bfloat16')
  out, variables = jax.eval_shape(
    vit_vqgan.ViTVQGAN(sizes).init_with_output, jax.random.key(0), images
  )
  for name in ('mean', 'log_scale', 'latents', 'quantizer_loss'):
    assert out[name].dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


def test_every_parameter_of_the_tokenizer_has_an_axis_name_for_each_dimension(images):
  boxed = jax.eval_shape(vit_vqgan.ViTVQGAN(TINY).init, jax.random.key(0), images)
  specs = nn.get_partition_spec(boxed)
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed)), jax.tree.leaves(specs)
  ):
    assert len(spec) == len(leaf.shape), path
    assert all(isinstance(name, str) for name in spec), path


@functools.partial(jax.jit, static_argnums=0)
def _gradients(sizes, params, images):
  def loss(params):
    out = vit_vqgan.ViTVQGAN(sizes).apply({'params': params}, images)
    return out['quantizer_loss'] + jnp.mean(jnp.square(out['mean'] - out['log_scale'] - 1))

  return jax.value_and_grad(loss)(params)


@pytest.mark.parametrize('changes', [{'remat': 'dots'}, {'remat': 'block_inputs', 'unroll': 2}])
def test_remat_and_unroll_change_neither_the_tokenizers_loss_nor_its_gradients(
  params, images, changes
):
  for a, b in zip(
    jax.tree.leaves(_gradients(TINY, params, images)),
    jax.tree.leaves(_gradients(dataclasses.replace(TINY, **changes), params, images)),
  ):
    np.testing.assert_allclose(b, a, atol=4e-6 * np.abs(a).max())


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'patch_size': 3}, ['ViTVQGANConfig.patch_size=3', 'image_size=8']),
    ({'decoder_heads': 3}, ['ViTVQGANConfig.decoder_heads=3', 'decoder_width=16']),
    ({'remat': 'all'}, ["ViTVQGANConfig.remat='all'", 'everything, dots, block_inputs']),
    ({'dtype': 'int32'}, ["ViTVQGANConfig.dtype='int32'", 'bfloat16']),
    ({'code_dim': -4}, ['ViTVQGANConfig.code_dim=-4']),
  ],
)
def test_sizes_of_a_tokenizer_that_do_not_fit_are_named(changes, words):
  with pytest.raises(UserError) as caught:
    dataclasses.replace(TINY, **changes)
  assert all(word in str(caught.value) for word in words)

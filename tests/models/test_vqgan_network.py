"""Tests of parti_jax.models.vqgan."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.core.errors import UserError
from parti_jax.models import vit_vqgan
from parti_jax.models import vqgan

TINY = dataclasses.replace(
  tiny_configs.VQGAN, middle_blocks=2, attention=True, output='logit_laplace'
)
MASKGIT = {
  'z_channels': None,
  'attention': False,
  'middle_attention': False,
  'downsampling': 'average',
  'bias': False,
  'shortcut': 'output',
}


def _images(*shape):
  return jnp.asarray(np.random.default_rng(0).uniform(size=shape), jnp.float32)


@functools.cache
def _init(config):
  return {'params': random_parameters.of(vqgan.VQGAN(config), vqgan.example_inputs(config))}


@functools.cache
def _apply(config):
  return jax.jit(vqgan.VQGAN(config).apply, static_argnames=('method', 'grid', 'quantize'))


@pytest.mark.parametrize('output', ['pixels', 'logit_laplace'])
def test_tokenize_and_detokenize_are_the_two_halves_at_any_height_and_width(output):
  config = dataclasses.replace(TINY, output=output)
  images, params, apply = _images(2, 6, 14, 3), _init(config), _apply(config)
  out = apply(params, images)
  drawn = out['pixels'] if output == 'pixels' else vit_vqgan.to_pixels(out['mean'])
  assert drawn.shape == out.get('log_scale', drawn).shape == images.shape
  assert out['latents'].shape == (2, 21, 4)
  tokens = apply(params, images, method='tokenize')
  np.testing.assert_array_equal(tokens, out['tokens'])
  pixels = apply(params, tokens, method='detokenize', grid=(3, 7))
  wanted = np.clip(drawn, 0, 1)
  np.testing.assert_allclose(pixels, wanted, atol=1e-5)
  assert 0 < np.std(pixels) and 0 <= pixels.min() and pixels.max() <= 1


def test_detokenize_takes_the_grid_of_the_image_size_where_none_is_given():
  params = _init(TINY)
  apply = lambda tokens, **more: _apply(TINY)(params, tokens, method='detokenize', **more)
  tokens = jnp.arange(16)[None]
  np.testing.assert_array_equal(apply(tokens), apply(tokens, grid=(4, 4)))
  assert apply(tokens, grid=(2, 8)).shape == (1, 4, 16, 3)
  for wrong in [(4, 5), (-4, -4), (16, 0)]:
    with pytest.raises(UserError, match='16 tokens'):
      apply(tokens, grid=wrong)
  with pytest.raises(UserError, match='15 tokens do not fill 4 rows of 4'):
    apply(tokens[:, :15])


def test_rows_and_columns_of_other_sizes_are_those_of_the_factor():
  config = vqgan.VQGANConfig()
  assert (config.factor, config.grid, config.image_length) == (16, (16, 16), 256)
  assert config.grid_for(384, 512) == (24, 32)
  for height, width in [(384, 500), (8, 16), (0, 16)]:
    with pytest.raises(UserError, match=f'{height}×{width} pixels.*multiples of 16'):
      config.grid_for(height, width)


@pytest.mark.parametrize('method', [None, 'tokenize'])
def test_images_that_the_factor_does_not_divide_are_refused(method):
  with pytest.raises(UserError, match='7×8 pixels'):
    jax.eval_shape(
      lambda images: vqgan.VQGAN(TINY).apply({'params': {}}, images, method=method),
      jnp.zeros((1, 7, 8, 3)),
    )


def test_without_quantization_the_decoder_gets_the_latents():
  config, images = dataclasses.replace(TINY, quantizer='euclidean'), _images(1, 8, 8, 3)
  params, apply = _init(config), _apply(config)
  quantized = apply(params, images)
  mean = apply(params, images, quantize=False)['mean']
  codes = params['params'] | {'quantizer': {'codebook': {'table': quantized['latents'][0]}}}
  np.testing.assert_allclose(apply({'params': codes}, images)['mean'], mean, atol=1e-5)
  assert np.any(np.abs(quantized['mean'] - mean) > 1e-3)


def test_the_pixel_range_is_what_black_and_white_are_to_the_network():
  params = _init(dataclasses.replace(TINY, output='pixels'))
  run = lambda low, high, images: _apply(
    dataclasses.replace(TINY, output='pixels', pixel_range=(low, high))
  )(params, images)
  images = _images(1, 8, 8, 3)
  one, other = run(0, 1, images), run(-1, 3, (images + 1) / 4)
  np.testing.assert_allclose(one['latents'], other['latents'], atol=1e-5)
  np.testing.assert_allclose(4 * other['pixels'] - 1, one['pixels'], atol=1e-4)


def test_outputs_and_parameters_are_float32_when_convolutions_are_bfloat16():
  config = dataclasses.replace(TINY, dtype='bfloat16')
  out, variables = jax.eval_shape(
    vqgan.VQGAN(config).init_with_output, jax.random.key(0), *vqgan.example_inputs(config)
  )
  for name in ('mean', 'log_scale', 'latents', 'quantizer_loss'):
    assert out[name].dtype == jnp.float32
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}


@pytest.mark.parametrize('changes', [{}, MASKGIT])
def test_every_parameter_has_an_axis_name_for_each_dimension(changes):
  config = dataclasses.replace(TINY, **changes)
  boxed = jax.eval_shape(vqgan.VQGAN(config).init, jax.random.key(0), *vqgan.example_inputs(config))
  specs = nn.get_partition_spec(boxed)
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed)), jax.tree.leaves(specs)
  ):
    assert len(spec) == len(leaf.shape), path
    assert all(isinstance(name, str) for name in spec), path


def test_recomputation_changes_neither_the_loss_nor_its_gradients():
  images, params = _images(2, 8, 8, 3), _init(TINY)

  def gradients(remat):
    def loss(params):
      out = vqgan.VQGAN(dataclasses.replace(TINY, remat=remat)).apply(params, images)
      return out['quantizer_loss'] + jnp.mean(jnp.square(out['mean'] - out['log_scale'] - 1))

    return jax.jit(jax.value_and_grad(loss))(params)

  for a, b in zip(
    jax.tree.leaves(gradients('everything')), jax.tree.leaves(gradients('block_inputs'))
  ):
    np.testing.assert_allclose(b, a, atol=1e-6 * max(1, np.abs(a).max()))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'image_size': 9}, ['VQGANConfig.image_size=9', 'multiple of 2']),
    ({'multipliers': ()}, ['VQGANConfig.multipliers=()']),
    ({'multipliers': (1, 0)}, ['VQGANConfig.multipliers=(1, 0)']),
    ({'norm_groups': 3}, ['VQGANConfig.norm_groups=3', 'channels=8']),
    ({'quantizer': 'nearest'}, ["VQGANConfig.quantizer='nearest'", 'euclidean']),
    ({'downsampling': 'max'}, ["VQGANConfig.downsampling='max'", 'average']),
    ({'shortcut': 'none'}, ["VQGANConfig.shortcut='none'", 'output']),
    ({'output': 'logits'}, ["VQGANConfig.output='logits'", 'logit_laplace']),
    ({'pixel_range': (1.0, -1.0)}, ['VQGANConfig.pixel_range=(1.0, -1.0)']),
    ({'quantizer': 'fsq'}, ['VQGANConfig.fsq_levels=()', 'codebook_size=16']),
    ({'quantizer': 'fsq', 'fsq_levels': (4, 4)}, ['VQGANConfig.fsq_levels=(4, 4)', 'code_dim=4']),
    ({'quantizer': 'fsq', 'fsq_levels': (16, 1)}, ['VQGANConfig.fsq_levels=(16, 1)', '2 to 256']),
    ({'quantizer': 'lfq', 'code_dim': 5}, ["quantizer='lfq'", 'here 32', 'codebook_size=16']),
    ({'quantizer': 'lfq', 'code_dim': 2**20}, ["quantizer='lfq'", 'code_dim=1048576']),
    ({'dtype': 'int32'}, ["VQGANConfig.dtype='int32'", 'bfloat16']),
    ({'remat': 'all'}, ["VQGANConfig.remat='all'"]),
  ],
)
def test_sizes_that_do_not_fit_are_named(changes, words):
  with pytest.raises(UserError) as caught:
    dataclasses.replace(TINY, **changes)
  assert all(word in str(caught.value) for word in words)

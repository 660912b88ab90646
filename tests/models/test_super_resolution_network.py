"""The super-resolution network: sizes of the paper, weight normalisation, and how far it sees."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from parti_jax.core import gin_config as gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import flops
from parti_jax.models import super_resolution
from parti_jax.models.nn import layers

KINDS = {
  'wdsr_a': dict(blocks=2, width=4, expansion=2),
  'wdsr_b': dict(blocks=2, width=5, expansion=3, low_rank=0.8, dilations=(1, 3)),
  'unshuffled': dict(blocks=1, width=6, expansion=2, low_rank=0.5, unshuffle=2, factor=4),
}


def make(name):
  config = super_resolution.SuperResolutionConfig(dtype='float32', **KINDS[name])
  module = super_resolution.SuperResolution(config)
  boxed = module.init(jax.random.key(0), *super_resolution.example_inputs(config))['params']
  return config, module, nn.meta.unbox(boxed)


def with_gain(params, gain=0.3):
  """Parameters whose last convolution is no longer zero."""
  tail = params['tail']
  return params | {'tail': tail | {'gain': jnp.full_like(tail['gain'], gain)}}


@pytest.mark.parametrize('name, millions', [('x2', 15), ('x4', 30)])
def test_as_many_parameters_as_the_papers(name, millions):
  gin_config.parse([f'gin_configs/models/super_resolution_{name}.gin'], [])
  config = super_resolution.SuperResolutionConfig()
  assert config.factor == int(name[1])
  boxed = jax.eval_shape(
    super_resolution.SuperResolution(config).init,
    jax.random.key(0),
    *super_resolution.example_inputs(config),
  )
  assert layers.count_parameters(boxed) == pytest.approx(millions * 1e6, rel=0.06)
  # All that has to be multiplied is counted as FLOPs: a multiplication and an addition a pixel.
  kernels = layers.count_parameters(boxed, lambda path: path.endswith('direction'))
  assert flops.super_resolution_forward(config, 8, 4) == 2 * 8 * 4 * kernels
  gin_config.parse([], [])


@pytest.mark.parametrize('name', KINDS)
def test_before_training_it_enlarges_as_bicubic_interpolation_does(name):
  config, module, params = make(name)
  # Pillow clips and rounds between its passes over rows and columns: nothing near 0 and 255.
  picture = np.random.default_rng(0).integers(80, 176, (8, 12, 3)).astype(np.uint8)
  enlarged = np.asarray(jax.jit(module.apply)({'params': params}, picture[None] / np.float32(255)))
  assert enlarged.shape == (1, 8 * config.factor, 12 * config.factor, 3)
  size = (12 * config.factor, 8 * config.factor)
  pillows = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
  assert np.abs(enlarged[0] * 255 - pillows).max() < 1.5


@pytest.mark.parametrize('name', KINDS)
def test_a_pixel_reaches_as_far_as_it_says(name):
  config, module, params = make(name)
  params = with_gain(params)
  side = 8 * config.unshuffle * (config.reach // (4 * config.unshuffle) + 1)
  image = np.random.default_rng(0).uniform(size=(1, side, side, 3)).astype(np.float32)
  middle, other = side // 2, image.copy()
  other[0, middle, middle] = 1 - image[0, middle, middle]
  apply = jax.jit(module.apply)
  moved = np.abs(np.asarray(apply({'params': params}, image) - apply({'params': params}, other)))
  rows = np.flatnonzero(moved.max(axis=(0, 2, 3)) > 0) // config.factor
  assert middle - rows.min() <= config.reach and rows.max() - middle <= config.reach
  # And not much less: from the far corner of a square it is all of that.
  assert max(middle - rows.min(), rows.max() - middle) > config.reach - config.unshuffle


def test_a_kernels_length_is_its_gain():
  convolution = super_resolution.Convolution(3, 3, ('embed', 'mlp'), jnp.float32, gain=2.0)
  image = jnp.zeros((1, 3, 3, 2), jnp.float32)
  params = nn.meta.unbox(convolution.init(jax.random.key(0), image))['params']
  # Of each feature the responses to all unit inputs are its kernel.
  units = jnp.eye(18, dtype=jnp.float32).reshape(18, 3, 3, 2)
  responses = convolution.apply({'params': params}, units)[:, 1, 1]
  np.testing.assert_allclose(np.linalg.norm(responses, axis=0), 2.0, rtol=1e-5)
  longer = params | {'direction': 7.0 * params['direction']}
  np.testing.assert_allclose(
    convolution.apply({'params': longer}, units)[:, 1, 1], responses, rtol=1e-4, atol=1e-6
  )


def test_recomputation_changes_no_gradient():
  config, module, params = make('wdsr_b')
  params = with_gain(params)
  image = jnp.asarray(np.random.default_rng(0).uniform(size=(1, 6, 6, 3)), jnp.float32)
  again = super_resolution.SuperResolution(
    super_resolution.SuperResolutionConfig(dtype='float32', remat='block_inputs', **KINDS['wdsr_b'])
  )
  gradients = [
    jax.jit(
      jax.grad(
        lambda params, module=module: jnp.sum(jnp.square(module.apply({'params': params}, image)))
      )
    )(params)
    for module in (module, again)
  ]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *gradients)


@pytest.mark.parametrize(
  'bad',
  [{'blocks': 0}, {'low_rank': 1.5}, {'dilations': ()}, {'dilations': (1, 0)}, {'dtype': 'int8'}],
)
def test_sizes_that_can_not_be_are_named(bad):
  with pytest.raises(UserError, match=f'SuperResolutionConfig.{next(iter(bad))}='):
    super_resolution.SuperResolutionConfig(**bad)

"""The networks of Real-ESRGAN: how far they see, their FLOPs, and the layout of their pixels.

tests/references/test_real_esrgan.py compares them with another library.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.models import real_esrgan
from parti_jax.models import upscalers
from parti_jax.models.nn import layers

CONFIGS = {
  'x4': real_esrgan.RRDBNetConfig(blocks=2, width=6, growth=4, dtype='float32'),
  'x2': real_esrgan.RRDBNetConfig(
    factor=2, blocks=1, width=6, growth=4, unshuffle=2, dtype='float32'
  ),
  'same_size': real_esrgan.RRDBNetConfig(
    factor=1, blocks=1, width=6, growth=4, unshuffle=4, dtype='float32'
  ),
  'compact': real_esrgan.SRVGGNetCompactConfig(factor=3, layers=2, width=5, dtype='float32'),
}


def _params(config):
  """Random parameters that let no pixel go unnoticed."""
  module = upscalers.module(config)
  boxed = jax.eval_shape(module.init, jax.random.key(0), *upscalers.example_inputs(config))
  draw = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0, 0.3, leaf.shape), jnp.float32),
    nn.meta.unbox(boxed)['params'],
  )


def _picture(side):
  return np.random.default_rng(1).uniform(size=(1, side, side, 3)).astype(np.float32)


@pytest.mark.parametrize('name', CONFIGS)
def test_a_pixel_reaches_no_farther_than_it_says(name):
  config = CONFIGS[name]
  params, apply = _params(config), jax.jit(upscalers.module(config).apply)
  side = config.multiple * (2 * (config.reach // config.multiple) + 6)
  image, middle = _picture(side), side // 2
  other = image.copy()
  other[0, middle, middle] = 1 - image[0, middle, middle]
  results = [np.asarray(apply({'params': params}, picture)) for picture in (image, other)]
  assert results[0].shape == (1, side * config.factor, side * config.factor, 3)
  moved = np.abs(results[0] - results[1]).max(axis=(0, 2, 3))
  rows = np.flatnonzero(moved > 0) // config.factor
  farthest = max(middle - rows.min(), rows.max() - middle)
  # And not much less.
  assert config.reach - 3 * config.multiple <= farthest <= config.reach


def test_the_edge_of_a_large_receptive_field_does_not_count():
  config = real_esrgan.RRDBNetConfig()
  assert config.reach == 96
  assert dataclasses.replace(config, factor=2, unshuffle=2).reach == 2 * 96 + 1


@pytest.mark.parametrize('name', CONFIGS)
def test_every_weight_is_counted_as_a_multiplication_at_its_resolution(name):
  config = CONFIGS[name]
  params = _params(config)
  positions = 8 * 12 // config.multiple**2

  def of(path):
    """Number of positions at which a kernel is used."""
    module = path.split('/')[0]
    if module.startswith('doubling'):
      return positions * 4 ** int(module[-1])
    if isinstance(config, real_esrgan.RRDBNetConfig) and module in ('hidden', 'tail'):
      return 8 * 12 * config.factor**2
    return positions

  total = sum(
    of(path) * layers.count_parameters(params, lambda other, path=path: other == path)
    for path in _paths(params)
    if path.endswith('kernel')
  )
  assert upscalers.forward_flops(config)(config, 8, 12) == 2 * total


def _paths(params):
  leaves = jax.tree_util.tree_leaves_with_path(params)
  return [jax.tree_util.keystr(path, simple=True, separator='/') for path, _ in leaves]


def test_without_weights_the_compact_network_repeats_pixels():
  config = CONFIGS['compact']
  params = jax.tree.map(jnp.zeros_like, _params(config))
  image = _picture(4)
  enlarged = jax.jit(upscalers.module(config).apply)({'params': params}, image)
  np.testing.assert_array_equal(enlarged, image.repeat(3, axis=1).repeat(3, axis=2))


@pytest.mark.parametrize('name', ['x4', 'compact'])
def test_recomputation_changes_no_gradient(name):
  config = CONFIGS[name]
  params, image = _params(config), jnp.asarray(_picture(6))

  def gradient(config):
    module = upscalers.module(config)
    loss = lambda params: jnp.mean(jnp.square(module.apply({'params': params}, image)))
    return jax.jit(jax.grad(loss))(params)

  again = gradient(dataclasses.replace(config, remat='block_inputs'))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), gradient(config), again
  )


@pytest.mark.parametrize('name', ['x2', 'compact'])
def test_in_bfloat16_the_result_is_near_and_float32(name):
  config = CONFIGS[name]
  params, image = jax.tree.map(lambda leaf: 0.3 * leaf, _params(config)), _picture(8)
  exact, rough = (
    jax.jit(upscalers.module(one).apply)({'params': params}, image)
    for one in (config, dataclasses.replace(config, dtype='bfloat16'))
  )
  assert rough.dtype == jnp.float32
  np.testing.assert_allclose(rough, exact, atol=0.05)


@pytest.mark.parametrize(
  'kind, bad, message',
  [
    (real_esrgan.RRDBNetConfig, {'factor': 3}, 'RRDBNetConfig.factor=3 times unshuffle=1 must be'),
    (real_esrgan.RRDBNetConfig, {'factor': 0}, 'RRDBNetConfig.factor='),
    (real_esrgan.RRDBNetConfig, {'factor': 2, 'unshuffle': 3}, 'RRDBNetConfig.factor=2 times'),
    (real_esrgan.RRDBNetConfig, {'blocks': 0}, 'RRDBNetConfig.blocks='),
    (real_esrgan.RRDBNetConfig, {'remat': 'some'}, 'RRDBNetConfig.remat='),
    (real_esrgan.SRVGGNetCompactConfig, {'factor': 17}, 'SRVGGNetCompactConfig.factor='),
    (real_esrgan.SRVGGNetCompactConfig, {'layers': 0}, 'SRVGGNetCompactConfig.layers='),
    (real_esrgan.SRVGGNetCompactConfig, {'dtype': 'int8'}, 'SRVGGNetCompactConfig.dtype='),
  ],
)
def test_sizes_that_can_not_be_are_named(kind, bad, message):
  with pytest.raises(UserError, match=message):
    kind(**bad)

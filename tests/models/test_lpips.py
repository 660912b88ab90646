"""LPIPS against a plain numpy definition, and where gradients could be without bound."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import lpips

WIDTHS = ((2, 3), (4,))


def _convolved(x, kernel, bias):
  padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
  return np.array(
    [
      [
        np.einsum('ijc,ijcf->f', padded[r : r + 3, c : c + 3], kernel) + bias
        for c in range(x.shape[1])
      ]
      for r in range(x.shape[0])
    ]
  )


def _distance(params, a, b):
  """By loops: [height, width, 3] in [0, 1] each, to a number."""
  shift, scale = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
  pair, total = [(2 * x - 1 - shift) / scale for x in (a, b)], 0.0
  for stage, widths in enumerate(WIDTHS):
    if stage:
      pair = [x.reshape(x.shape[0] // 2, 2, x.shape[1] // 2, 2, -1).max(axis=(1, 3)) for x in pair]
    for place in range(len(widths)):
      layer = params['vgg16'][f'stage_{stage}_{place}']
      pair = [np.maximum(_convolved(x, layer['kernel'], layer['bias']), 0) for x in pair]
    units = [x / (np.sqrt((x**2).sum(-1, keepdims=True)) + 1e-10) for x in pair]
    total += (((units[0] - units[1]) ** 2) @ params[f'head_{stage}']).mean()
  return total


@pytest.fixture(scope='module')
def network():
  module = lpips.LPIPS(WIDTHS)
  init = jax.jit(module.init)
  params = nn.meta.unbox(init(jax.random.key(0), *lpips.example_inputs())['params'])
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (
      np.abs(leaf) * draw.uniform(0.5, 2, leaf.shape) if leaf.ndim == 1 else np.asarray(leaf)
    ),
    params,
  )
  params['vgg16']['stage_0_0']['bias'] = np.array([0.3, -0.2], np.float32)
  return jax.jit(lambda *images: module.apply({'params': params}, *images)), params


def test_the_distance_is_the_plain_definitions(network):
  distance, params = network
  draw = np.random.default_rng(1)
  images, others = draw.uniform(size=(2, 3, 8, 8, 3)).astype(np.float32)
  found = distance(images, others)
  assert found.shape == (3,)
  np.testing.assert_allclose(
    found, [_distance(params, a, b) for a, b in zip(images, others)], rtol=1e-4
  )
  assert np.all(found > 1e-3)


def test_the_distance_is_symmetric_and_0_for_equal_pictures(network):
  distance, _ = network
  images, others = np.random.default_rng(2).uniform(size=(2, 2, 8, 8, 3)).astype(np.float32)
  np.testing.assert_allclose(distance(images, others), distance(others, images), rtol=1e-5)
  np.testing.assert_allclose(distance(images, images), [0, 0], atol=1e-12)


def test_gradients_are_finite_where_no_feature_is_active(network):
  _, params = network
  silent = jax.tree.map(lambda leaf: leaf, params)
  silent['vgg16']['stage_0_1'] = {
    'kernel': params['vgg16']['stage_0_1']['kernel'],
    'bias': np.full(3, -1e3, np.float32),
  }
  flat = jnp.ones((1, 8, 8, 3))
  distance = lambda image: lpips.LPIPS(WIDTHS).apply({'params': silent}, image, 0.5 * flat)[0]
  value, gradient = jax.jit(jax.value_and_grad(distance))(flat)
  assert np.isfinite(value) and np.all(np.isfinite(gradient))

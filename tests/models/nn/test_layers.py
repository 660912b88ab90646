"""Projections of any number of axes, and dropout."""

from collections.abc import Callable

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models.nn import layers


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize(
  'rows, inputs, features',
  [((2, 3), (8,), (5,)), ((2, 3), (4,), (3, 2, 5)), ((2, 3), (2, 4), (7,)), ((), (8,), (5,))],
)
def test_projection_sums_over_its_last_axes(rows, inputs, features):
  x, kernel = _normal(0, *rows, *inputs), _normal(1, *inputs, *features)
  axes = ('',) * (len(inputs) + len(features))
  out = layers.Projection(features, len(inputs), axes).apply({'params': {'kernel': kernel}}, x)
  np.testing.assert_allclose(out, jnp.tensordot(x, kernel, len(inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('features', [64, 63])
def test_dropout_drops_its_share_and_keeps_the_expectation(features):
  x = jnp.ones((40, 50, features))
  out = np.asarray(layers.Dropout(0.3).apply({}, x, layers.dropout_keys(jax.random.key(0), 40)))
  assert out.shape == x.shape
  rate = round(0.3 * 65536) / 65536
  np.testing.assert_allclose(np.unique(out), [0.0, 1.0 / (1.0 - rate)], rtol=1e-6)
  # Four standard deviations of the mean of that many draws.
  assert abs(np.mean(out == 0) - rate) < 4 * np.sqrt(rate * (1 - rate) / out.size)
  # The four values of a pair of words are drawn apart, and so are examples and positions.
  dropped, quarter = out == 0, -(-features // 4)
  for shift in (quarter, 2 * quarter, 3 * quarter):
    together = np.mean(dropped[..., :-shift] & dropped[..., shift:])
    assert abs(together - rate**2) < 0.01
  for a, b in ((dropped[1:], dropped[:-1]), (dropped[:, 1:], dropped[:, :-1])):
    assert abs(np.mean(a & b) - rate**2) < 0.01


def test_a_mask_follows_from_the_key_and_the_examples_place_alone():
  x, keys = jnp.ones((6, 3, 5)), layers.dropout_keys(jax.random.key(1), 6)
  drop = lambda x, keys: np.asarray(layers.Dropout(0.5).apply({}, x, keys))
  whole = drop(x, keys)
  rows = jnp.array([4, 1], jnp.uint32)
  np.testing.assert_array_equal(drop(x[:2], keys.replace(rows=rows)), whole[[4, 1]])
  assert (drop(x, layers.fold(keys, 0)) != whole).any()
  assert (drop(x, layers.fold(keys, 0)) != drop(x, layers.fold(keys, 1))).any()


def test_dropout_is_off_without_keys_or_at_rate_0():
  x = _normal(0, 3, 4)
  np.testing.assert_array_equal(layers.Dropout(0.3).apply({}, x, None), x)
  keys = layers.dropout_keys(jax.random.key(0), 3)
  np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, keys), x)


class _Scaled(nn.Module):
  """Scales features by a parameter, of which it counts how often it is initialized."""

  initializer: Callable[..., jax.Array]

  @nn.compact
  def __call__(self, x):
    return x * layers.parameter(self, 'scale', self.initializer, ('embed',), (x.shape[-1],))


def test_an_applied_parameter_is_not_initialized_and_keeps_its_shape():
  initialized = []

  def initializer(key, shape, dtype=jnp.float32):
    del key
    initialized.append(shape)
    return jnp.full(shape, 2.0, dtype)

  module, x = _Scaled(initializer), jnp.arange(3.0)
  variables = module.init(jax.random.key(0), x)
  assert initialized == [(3,)]
  assert module.apply(variables, x).tolist() == [0, 2, 4]
  assert module.apply(nn.meta.unbox(variables), x).tolist() == [0, 2, 4]
  assert initialized == [(3,)]
  with pytest.raises(flax.errors.ScopeParamShapeError, match=r'scale.*\(3,\)'):
    module.apply({'params': {'scale': jnp.ones(3)}}, jnp.ones(4))
  with pytest.raises(flax.errors.ScopeParamNotFoundError, match='scale'):
    module.apply({'params': {'other': jnp.ones(3)}}, x)

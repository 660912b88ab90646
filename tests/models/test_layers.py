"""Projections of any number of axes, and dropout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import layers


def _normal(seed, *shape):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


@pytest.mark.parametrize('rows, inputs, features', [
    ((2, 3), (8,), (5,)), ((2, 3), (4,), (3, 2, 5)), ((2, 3), (2, 4), (7,)), ((), (8,), (5,))])
def test_projection_sums_over_its_last_axes(rows, inputs, features):
  x, kernel = _normal(0, *rows, *inputs), _normal(1, *inputs, *features)
  axes = ('',) * (len(inputs) + len(features))
  out = layers.Projection(features, len(inputs), axes).apply({'params': {'kernel': kernel}}, x)
  np.testing.assert_allclose(out, jnp.tensordot(x, kernel, len(inputs)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('features', [64, 63])
def test_dropout_drops_its_share_and_keeps_the_expectation(features):
  x = jnp.ones((40, 50, features))
  rngs = {'dropout': jax.random.key(0)}
  out = np.asarray(layers.Dropout(0.3).apply({}, x, False, rngs=rngs))
  assert out.shape == x.shape
  rate = round(0.3 * 65536) / 65536
  np.testing.assert_allclose(np.unique(out), [0.0, 1.0 / (1.0 - rate)], rtol=1e-6)
  # Four standard deviations of the mean of that many draws.
  assert abs(np.mean(out == 0) - rate) < 4 * np.sqrt(rate * (1 - rate) / out.size)
  # Both halves of a word are drawn apart.
  dropped = out == 0
  half = -(-features // 2)
  together = np.mean(dropped[..., :features - half] & dropped[..., half:])
  assert abs(together - rate ** 2) < 0.01


def test_dropout_is_off_when_deterministic_or_at_rate_0():
  x = _normal(0, 3, 4)
  np.testing.assert_array_equal(layers.Dropout(0.3).apply({}, x, True), x)
  np.testing.assert_array_equal(layers.Dropout(0.0).apply({}, x, False), x)

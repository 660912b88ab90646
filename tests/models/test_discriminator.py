"""The discriminator's parts against plain definitions, and its size against the published one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.models import discriminator
from parti_jax.models.nn import layers

CONFIG = discriminator.DiscriminatorConfig(channels=64, max_channels=6, minibatch_group=4)


def _draw(*shape):
  return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def _convolved(x, kernel, stride):
  """Correlation of [height, width, channels] with [k, k, channels, features], without margins."""
  size = kernel.shape[0]
  rows = range(0, x.shape[0] - size + 1, stride)
  columns = range(0, x.shape[1] - size + 1, stride)
  return np.array(
    [
      [np.einsum('ijc,ijcf->f', x[r : r + size, c : c + size], kernel) for c in columns]
      for r in rows
    ]
  )


@pytest.mark.parametrize('size, margin', [(3, 2), (1, 1)])
def test_a_downsampling_convolution_blurs_and_takes_every_second_place(size, margin):
  x = _draw(2, 8, 8, 3)
  module = discriminator.Convolution(4, size, downsample=True, activate=False)
  params = jax.jit(module.init)(jax.random.key(0), x)
  kernel = np.asarray(params['params']['convolution']['kernel'].unbox())
  taps = np.array([1, 3, 3, 1]) / 8
  blur = np.einsum('i,j,cd->ijcd', taps, taps, np.eye(3))
  for picture, found in zip(x, module.apply(params, x)):
    padded = np.pad(picture, ((margin, margin), (margin, margin), (0, 0)))
    wanted = _convolved(_convolved(padded, blur, 1), kernel / np.sqrt(size * size * 3), 2)
    assert found.shape == (4, 4, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_convolution_has_a_bias_and_a_leaky_relu_that_keeps_the_second_moment():
  x = _draw(4, 8, 8, 200)
  module = discriminator.Convolution(100)
  params = jax.tree.map(lambda leaf: leaf, jax.jit(module.init)(jax.random.key(0), x))
  y = np.asarray(module.apply(params, x))
  inner = y[:, 1:-1, 1:-1]
  # E[(√2 · leaky(x))²] = 2 · (1 + 0.2²) / 2 for a standard normal x.
  assert np.mean(inner**2) == pytest.approx(1.04, rel=0.05)
  bias = params['params']['convolution']['bias']
  params['params']['convolution']['bias'] = bias.replace_boxed(bias.unbox() - 100.0)
  moved = np.asarray(module.apply(params, x))
  unscaled = np.where(y > 0, y, y / 0.2) / np.sqrt(2)
  np.testing.assert_allclose(moved, 0.2 * np.sqrt(2) * (unscaled - 100), rtol=1e-4)


def test_minibatch_deviation_is_that_of_each_group():
  x = _draw(8, 4, 4, 3)
  y = np.asarray(discriminator.minibatch_deviation(x, 4))
  assert y.shape == (8, 4, 4, 4)
  np.testing.assert_array_equal(y[..., :3], x)
  for group in (slice(0, 4), slice(4, 8)):
    np.testing.assert_allclose(y[group, ..., 3], x[group].std(axis=0).mean(), rtol=1e-5)
  # Six pictures are three groups of two.
  six = np.asarray(discriminator.minibatch_deviation(x[:6], 4))
  np.testing.assert_allclose(six[2:4, ..., 3], x[2:4].std(axis=0).mean(), rtol=1e-5)


def test_pictures_become_logits_that_know_their_group():
  module, images = discriminator.Discriminator(CONFIG), _draw(8, 16, 16, 3)
  params = jax.jit(module.init)(jax.random.key(0), images[:1])
  apply = jax.jit(module.apply)
  logits = apply(params, images)
  assert logits.shape == (8,) and logits.dtype == jnp.float32
  assert len(np.unique(logits)) == 8
  changed = images.at[7].add(1.0)
  moved = np.asarray(logits) != np.asarray(apply(params, changed))
  np.testing.assert_array_equal(moved, [False] * 4 + [True] * 4)


@pytest.mark.parametrize('size, count', [(256, 28_864_129), (1024, 29_012_513)])
def test_parameters_are_as_many_as_in_stylegan2(size, count):
  # As NVIDIA's implementations of configuration F print them.
  module = discriminator.Discriminator(discriminator.DiscriminatorConfig())
  shape = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  assert layers.count_parameters(jax.eval_shape(module.init, jax.random.key(0), shape)) == count


@pytest.mark.parametrize('size', [4, 24, 100])
def test_pictures_of_a_size_that_can_not_be_halved_are_refused(size):
  with pytest.raises(UserError, match=f'size of {size} is not a power of two from 8'):
    CONFIG.sizes(size)


def test_sizes_that_make_no_network_are_refused():
  with pytest.raises(UserError, match='DiscriminatorConfig.channels=0'):
    discriminator.DiscriminatorConfig(channels=0)
  with pytest.raises(UserError, match="DiscriminatorConfig.dtype='half'"):
    discriminator.DiscriminatorConfig(dtype='half')

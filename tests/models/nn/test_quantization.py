"""Int8 kernels: their error, their scales, and the projections that use them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import layers
from parti_jax.models.nn import quantization
from parti_jax.partitioning import mesh as mesh_lib

# Kernels of the decoder, with the number of their contracted axes.
SHAPES = [((6, 3, 2, 5), 1), ((6, 2, 5), 1), ((2, 5, 6), 2), ((6, 7), 1)]


def kernel_of(shape, seed=0):
  """A kernel whose channels differ in size by up to 10 to the power of 4."""
  draw = np.random.default_rng(seed)
  sizes = 10.0 ** draw.uniform(-2, 2, shape[-1])
  return jnp.asarray(draw.normal(size=shape) * sizes, jnp.float32)


def dequantized(kernel):
  return np.asarray(kernel.values, np.float32) * np.asarray(kernel.scale)


@pytest.mark.parametrize('shape, contracted', SHAPES)
def test_the_error_of_a_weight_is_half_of_its_channels_scale(shape, contracted):
  kernel = kernel_of(shape)
  found = quantization.quantize(kernel, contracted)
  assert found.values.dtype == jnp.int8 and found.values.shape == shape
  assert found.scale.dtype == jnp.float32 and found.scale.shape == shape[contracted:]
  contracted_axes = tuple(range(contracted))
  largest = np.abs(np.asarray(kernel)).max(axis=contracted_axes)
  np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
  error = np.abs(dequantized(found) - kernel)
  assert np.all(error <= 0.5001 * np.asarray(found.scale))
  # Each channel uses the whole range.
  np.testing.assert_array_equal(np.abs(found.values).max(axis=contracted_axes), 127)


def test_the_error_of_a_number_is_half_of_its_vectors_scale():
  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.normal(size=(3, 4, 16)) * 10.0 ** draw.uniform(-2, 2, (3, 4, 1)))
  x = x.astype(jnp.bfloat16).at[1, 2].set(0)
  found = quantization.quantize_vectors(x)
  assert found.values.dtype == jnp.int8 and found.values.shape == x.shape
  assert found.scale.dtype == jnp.float32 and found.scale.shape == x.shape[:-1]
  x, scale = np.asarray(x, np.float32), np.asarray(found.scale)
  np.testing.assert_allclose(
    scale, np.maximum(np.abs(x).max(-1) / 127, 1e-38), atol=1e-37, rtol=1e-6
  )
  error = np.abs(np.asarray(found.values, np.float32) * scale[..., None] - x)
  assert np.all(error <= 0.5001 * scale[..., None]) and not np.any(found.values[1, 2])


def test_channels_of_zeros_and_of_tiny_numbers_are_zeros():
  kernel = jnp.asarray([[0.0, 1e-40, 1.0], [0.0, -1e-42, -3.0]])
  found = quantization.quantize(kernel, 1)
  np.testing.assert_array_equal(found.values, [[0, 0, 42], [0, 0, -127]])
  assert np.all(np.isfinite(found.scale)) and np.all(np.asarray(found.scale) > 0)


@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-5), ('bfloat16', 2e-2)])
@pytest.mark.parametrize('shape, contracted', SHAPES)
def test_a_projection_with_a_quantized_kernel(shape, contracted, dtype, tolerance):
  axes = tuple(f'axis{number}' for number in range(len(shape)))
  quantized = quantization.quantize(kernel_of(shape), contracted)
  rows = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, *shape[:contracted])), dtype)
  module = layers.HeadsProjection(shape[contracted:], contracted, axes, jnp.dtype(dtype))
  apply = lambda kernel, *more: module.apply({'params': {'kernel': kernel}}, *more)
  expected = np.tensordot(np.asarray(rows, np.float32), dequantized(quantized), axes=contracted)
  scale = np.abs(expected).max(axis=tuple(range(expected.ndim - 1)))
  found = apply(quantized, rows)
  assert found.dtype == dtype and found.shape == expected.shape
  assert np.all(np.abs(found - expected) <= tolerance * scale)
  if len(shape) < 3:
    return
  if contracted == 2:  # Heads lie side by side in the input.
    found = apply(quantized, rows.reshape(2, 3, -1), shape[:2])
  else:  # Heads lie side by side in the output, and the parts are its leading axis.
    found = apply(quantized, rows, shape[:1])
    found = jnp.moveaxis(found, 0, 2) if len(shape) == 4 else found
    found = found.reshape(expected.shape)
  assert np.all(np.abs(found - expected) <= tolerance * scale)


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_the_conversion_stays_in_a_loop(platform, monkeypatch):
  """Except on a CPU, XLA may not convert the kernel once before the loop."""
  monkeypatch.setattr(mesh_lib, 'platform', lambda: platform)
  kernel = quantization.quantize(kernel_of((6, 6)), 1)
  module = layers.Projection((6,), 1, ('embed', 'mlp'))

  def repeated(x):
    return jax.lax.scan(
      lambda x, _: (module.apply({'params': {'kernel': kernel}}, x), None), x, length=3
    )

  assert ('optimization_barrier' in str(jax.make_jaxpr(repeated)(jnp.ones((2, 6))))) == (
    platform != 'cpu'
  )


@pytest.mark.parametrize('platform', ['cpu', 'gpu', 'tpu'])
def test_keys_and_values_of_a_text_are_converted_in_the_loop(platform, monkeypatch):
  monkeypatch.setattr(mesh_lib, 'platform', lambda: platform)
  text = quantization.quantize_vectors(kernel_of((2, 3, 5, 6)))

  def repeated(query):
    attend = lambda query, _: (
      attention_cache.attend_cached(query, text, text, jnp.ones(5, bool)),
      None,
    )
    return jax.lax.scan(attend, query, length=3)

  found = str(jax.make_jaxpr(repeated)(jnp.ones((2, 1, 3, 6))))
  assert ('optimization_barrier' in found) == (platform != 'cpu')


def test_scales_of_another_shape_are_an_error():
  kernel = quantization.quantize(kernel_of((6, 2, 5)), 2)
  module = layers.Projection((2, 5), 1, ('embed', 'heads', 'head_dim'))
  with pytest.raises(ValueError, match=r'\(6, 2, 5\) with scales of shape \(5,\)'):
    module.apply({'params': {'kernel': kernel}}, jnp.ones((3, 6)))


@pytest.mark.parametrize(
  'spec, contracted, expected',
  [
    (('fsdp', None, 'tensor', None), 1, (None, 'tensor', None)),
    (('tensor', None, 'fsdp'), 2, ('fsdp',)),
    (('fsdp', 'tensor'), 1, ('tensor',)),
    (('fsdp',), 1, ()),
  ],
)
def test_scales_are_split_like_the_kernels_channels(spec, contracted, expected):
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])
  sharding = jax.sharding.NamedSharding(mesh, PartitionSpec(*spec))
  found = quantization.shardings(sharding, contracted)
  assert found.values == sharding
  assert found.scale.spec == PartitionSpec(*expected)

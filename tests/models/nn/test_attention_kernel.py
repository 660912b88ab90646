"""Tests the TPU's attention kernel, in Pallas' interpreter, against attention over all pairs."""

import dataclasses
import functools

import gradients
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.models.nn import attention_kernel
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import block_options
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import transformer
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules

BATCH, LENGTH, TEXT, WIDTH = 2, 256, 128, 256
# What the kernel doesn't compute itself.
OPTIONS = {'qk_norm': True, 'rotary_grid': (8, 32), 'kv_heads': 2}


def pattern_of(name):
  grid = {'global': (16, 16), 'conv': (8, 32), 'row': (8, 32), 'column': (32, 8)}[name]
  return attention_patterns.AttentionPattern(name, grid, 5)


def normal(*shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def heads_apart(part, head_dim):
  return part.reshape(part.shape[:-1] + (-1, head_dim))


def plain(query, key, value, head_dim, mask):
  """Attention with heads side by side, by `dot_product_attention.attend`."""
  parts = [heads_apart(part, head_dim) for part in (query, key, value)]
  return dot_product_attention.attend(*parts, mask).reshape(query.shape)


def check(kernel, expected, *inputs, tolerance=2e-5):
  for a, b in zip(
    gradients.with_gradients(expected, *inputs),
    gradients.with_gradients(kernel, *inputs),
    strict=True,
  ):
    assert a.dtype == b.dtype
    a, b = (np.asarray(part, np.float32) for part in (a, b))
    np.testing.assert_allclose(b, a, atol=tolerance * np.abs(a).max())


@pytest.mark.interpret
@pytest.mark.parametrize(
  'name, head_dim', [('global', 64), ('conv', 32), ('row', 128), ('column', 64), ('conv', 256)]
)
def test_self_attention_in_a_pattern(name, head_dim):
  pattern = pattern_of(name)
  kernel = functools.partial(
    attention_kernel.self_attention, head_dim=head_dim, pattern=pattern, interpret=True
  )
  expected = lambda projected: plain(*projected, head_dim, pattern.mask)
  check(kernel, expected, normal(3, BATCH, LENGTH, WIDTH))


@pytest.mark.interpret
def test_several_blocks_with_different_windows():
  pattern = attention_patterns.AttentionPattern('conv', (16, 32), 7)
  blocks = attention_kernel._blocks(512, 512, WIDTH, 128, pattern, 2**24)
  assert len({width for _, width in blocks.windows}) > 1 and blocks.windows[-1][0] > 0
  kernel = functools.partial(
    attention_kernel.self_attention, head_dim=64, pattern=pattern, interpret=True
  )
  check(kernel, lambda projected: plain(*projected, 64, pattern.mask), normal(3, BATCH, 512, WIDTH))


@pytest.mark.interpret
def test_bfloat16_rounds_like_plain_attention():
  pattern = pattern_of('conv')
  kernel = functools.partial(
    attention_kernel.self_attention, head_dim=64, pattern=pattern, interpret=True
  )
  inputs = normal(3, BATCH, LENGTH, WIDTH, dtype=jnp.bfloat16)
  check(kernel, lambda projected: plain(*projected, 64, pattern.mask), inputs, tolerance=0.02)


@pytest.mark.interpret
@pytest.mark.parametrize('masked', [False, True])
def test_attention_without_a_pattern(masked):
  """A text of padding alone is attended to evenly, and gives no gradient to the scores."""
  mask = jnp.asarray(np.random.default_rng(1).random((BATCH, 1, 1, TEXT)) < 0.5)
  mask = mask.at[1].set(False) if masked else None
  of_self = functools.partial(
    attention_kernel.self_attention, head_dim=64, key_mask=mask, interpret=True
  )
  check(of_self, lambda projected: plain(*projected, 64, mask), normal(3, BATCH, TEXT, WIDTH))
  of_other = functools.partial(
    attention_kernel.cross_attention, head_dim=64, key_mask=mask, interpret=True
  )
  check(
    of_other,
    lambda query, keys_values: plain(query, *keys_values, 64, mask),
    normal(BATCH, LENGTH, WIDTH),
    normal(2, BATCH, TEXT, WIDTH),
  )


@pytest.mark.interpret
@pytest.mark.parametrize('name', ['conv', 'column'])
def test_each_device_computes_its_examples_and_heads(name):
  pattern = pattern_of(name)
  kernel = functools.partial(
    attention_kernel.self_attention, head_dim=32, pattern=pattern, interpret=True
  )
  projected = normal(3, 4, LENGTH, 256)
  with rules.partitioned(mesh_lib.make_mesh(data=4, tensor=2), rules.logical_axis_rules()):
    found = jax.jit(kernel)(projected)
  np.testing.assert_allclose(found, plain(*projected, 32, pattern.mask), atol=2e-5)
  assert len({str(shard.index) for shard in found.addressable_shards}) == 8


@pytest.fixture(name='as_on_a_tpu')
def _as_on_a_tpu(monkeypatch):
  """Makes layers use the kernel, in the interpreter."""
  monkeypatch.setattr(mesh_lib, 'platform', lambda: 'tpu')
  made = attention_kernel._Form
  in_interpreter = lambda head_dim, pattern=None, interpret=True: made(head_dim, pattern, True)
  monkeypatch.setattr(attention_kernel, '_Form', in_interpreter)


@pytest.mark.interpret
@pytest.mark.parametrize('index, options', [(1, {}), ('array', {}), (0, OPTIONS)])
def test_blocks_with_the_kernel_equal_those_without(request, index, options):
  """The same parameters, outputs and gradients of all of them."""
  patterns = (pattern_of('conv'), pattern_of('row'))
  options = block_options.BlockOptions(**options)
  of_encoder = dataclasses.replace(options, rotary_grid=None, kv_heads=None)
  encoder = transformer.EncoderBlock(WIDTH, 64, 4, options=of_encoder)
  decoder = transformer.DecoderBlock(WIDTH, 64, 4, options=options)
  text, x = normal(BATCH, TEXT, WIDTH), normal(BATCH, LENGTH, WIDTH)
  mask = jnp.arange(TEXT)[None, None, None] < jnp.array([5, 90])[:, None, None, None]
  made = jax.eval_shape(
    lambda key: (encoder.init(key, text, mask), decoder.init(key, x, text, mask, patterns)),
    jax.random.key(0),
  )
  variables = random_parameters.like(made)

  def loss(variables):
    place = jnp.int32(1) if index == 'array' else index
    encoded = encoder.apply(variables[0], text, mask)
    out = decoder.apply(variables[1], x, encoded, mask, patterns, place)
    return jnp.mean(jnp.square(out)), out

  differentiate = lambda: jax.jit(jax.grad(loss, has_aux=True))(variables)
  expected = differentiate()
  assert 'attention_forward' not in str(jax.make_jaxpr(lambda given: loss(given))(variables))
  request.getfixturevalue('as_on_a_tpu')
  assert (
    str(jax.make_jaxpr(lambda given: loss(given))(variables)).count('name=attention_forward') >= 3
  )
  for a, b in zip(*map(jax.tree.leaves, (expected, differentiate())), strict=True):
    np.testing.assert_allclose(b, a, atol=1e-4 * np.abs(a).max())


@pytest.mark.parametrize(
  'sizes, fits',
  [
    ((1024, 1024, 16, 64, 'conv'), True),
    ((1024, 1024, 16, 64, 'global'), True),
    ((1024, 128, 16, 64, None), True),
    ((4096, 4096, 16, 64, 'conv'), True),
    ((1024, 1024, 1, 64, 'conv'), False),  # Half a tile of lanes.
    ((1024, 1024, 16, 48, 'conv'), False),  # A head crosses the edge of a tile.
    ((64, 64, 16, 64, 'conv'), False),  # Shorter than a tile.
    ((1024, 24, 16, 64, None), False),
    ((8192, 8192, 16, 64, 'global'), False),  # Too large for the memory on the chip.
  ],
)
def test_sizes_that_fit(monkeypatch, sizes, fits):
  *numbers, name = sizes
  side = int(numbers[0] ** 0.5)
  grid = (side, numbers[0] // side)
  pattern = name and attention_patterns.AttentionPattern(name, grid)
  assert not attention_kernel.fits(*numbers, pattern)  # On a CPU.
  monkeypatch.setattr(mesh_lib, 'platform', lambda: 'tpu')
  assert attention_kernel.fits(*numbers, pattern) == fits

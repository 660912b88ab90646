"""Attention over image tokens: the patterns, and that all its forms agree."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import attention
from parti_jax.models import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules

PATTERNS = {
    'causal': attention_patterns.AttentionPattern('causal', (16, 16)),
    'conv': attention_patterns.AttentionPattern('conv', (16, 16), 5),
}


@pytest.mark.parametrize('grid, kernel', [((3, 5), 3), ((4, 4), 5), ((2, 7), 1), ((32, 32), 11)])
def test_conv_sees_the_earlier_tokens_of_a_square(grid, kernel):
  pattern = attention_patterns.AttentionPattern('conv', grid, kernel)
  half, cells = kernel // 2, [(row, column) for row in range(grid[0]) for column in range(grid[1])]
  chosen = range(0, len(cells), max(1, len(cells) // 40))
  for query in chosen:
    seen = [key for key in range(query + 1)
            if max(abs(a - b) for a, b in zip(cells[query], cells[key])) <= half]
    np.testing.assert_array_equal(pattern.mask[query].nonzero()[0], seen)
    np.testing.assert_array_equal(pattern.row(jnp.int32(query), len(cells)), pattern.mask[query])


def test_conv_looks_back_a_few_rows_and_causal_to_the_beginning():
  conv = attention_patterns.AttentionPattern('conv', (32, 32), 11)
  middle = 16 * 32 + 16
  assert conv.mask[middle].sum() == 5 * 11 + 6
  assert middle - conv.mask[middle].argmax() == 5 * 32 + 5
  causal = attention_patterns.AttentionPattern('causal', (32, 32))
  np.testing.assert_array_equal(causal.mask, np.tril(np.ones((1024, 1024), bool)))


def _inputs(dtype=np.float32):
  draw = np.random.default_rng(0)
  return [jnp.asarray(draw.normal(size=(2, 256, 4, 32)), dtype) for _ in range(3)]


@functools.partial(jax.jit, static_argnums=0)
def _with_gradients(attend, *inputs):
  """The result, and gradients of a sum over it that differs from place to place."""
  def loss(*inputs):
    out = attend(*inputs)
    places = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
    return jnp.sum(out.astype(jnp.float32) * places), out
  gradients, out = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*inputs)
  return (out, *gradients)


def _plain(pattern, *inputs):
  return attention.attend(*inputs, pattern.mask)


@pytest.mark.parametrize('name', PATTERNS)
@pytest.mark.parametrize('form', [
    functools.partial(attention.attend_blockwise, block=96),
    functools.partial(attention.attend_fused, interpret=True)], ids=['blockwise', 'fused'])
def test_all_forms_agree(name, form):
  pattern = PATTERNS[name]
  expected = _with_gradients(functools.partial(_plain, pattern), *_inputs())
  found = _with_gradients(functools.partial(form, pattern=pattern), *_inputs())
  for a, b in zip(expected, found):
    np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max())


def test_the_fused_form_agrees_on_a_mesh():
  pattern = PATTERNS['conv']
  expected = _plain(pattern, *_inputs())
  with rules.partitioned(
      mesh_lib.make_mesh(data=2, tensor=4), rules.logical_axis_rules()):
    fused = jax.jit(functools.partial(attention.attend_fused, pattern=pattern, interpret=True))
    found = fused(*_inputs())
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert len({str(shard.index) for shard in found.addressable_shards}) == 8


def _largest(function, *inputs):
  """Number of values of the largest array that a function makes, before it is compiled."""
  sizes = [0]

  def look(jaxpr):
    for equation in jaxpr.eqns:
      sizes.extend(variable.aval.size for variable in equation.outvars
                   if hasattr(variable.aval, 'size'))
      for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
          inner = getattr(inner, 'jaxpr', inner)
          if hasattr(inner, 'eqns'):
            look(inner)

  look(jax.make_jaxpr(function)(*inputs).jaxpr)
  return max(sizes)


def test_long_sequences_make_no_array_of_all_pairs_of_positions():
  pattern = attention_patterns.AttentionPattern('conv', (32, 32), 11)
  inputs = [jnp.zeros((1, 1024, 2, 8))] * 3
  pairs = 2 * 1024 * 1024
  chosen = functools.partial(attention.attend_in_pattern, pattern=pattern)
  assert _largest(functools.partial(_with_gradients.__wrapped__, chosen), *inputs) < pairs / 2
  plain = functools.partial(_plain, pattern)
  assert _largest(functools.partial(_with_gradients.__wrapped__, plain), *inputs) == pairs

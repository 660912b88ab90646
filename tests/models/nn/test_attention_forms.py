"""Attention over image tokens: the patterns, and that all its forms agree."""

import functools

import gradients
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import dot_product_attention

# Grids of 256 positions, which are not all square.
PATTERNS = {
  f'{name}_{grid[0]}x{grid[1]}': attention_patterns.AttentionPattern(name, grid, 5)
  for name, grid in (('global', (16, 16)), ('conv', (8, 32)), ('row', (8, 32)), ('column', (32, 8)))
}


def _inputs(dtype=np.float32):
  draw = np.random.default_rng(0)
  return [jnp.asarray(draw.normal(size=(2, 256, 4, 32)), dtype) for _ in range(3)]


_with_gradients = jax.jit(gradients.with_gradients, static_argnums=0)


def _plain(pattern, *inputs):
  return dot_product_attention.attend(*inputs, pattern.mask)


@functools.cache
def _expected(name):
  return jax.device_get(_with_gradients(functools.partial(_plain, PATTERNS[name]), *_inputs()))


@pytest.mark.parametrize(
  'form, names',
  [
    (
      functools.partial(dot_product_attention.attend_blockwise, block=96),
      ['global_16x16', 'conv_8x32'],
    ),
    (dot_product_attention.attend_rows, ['row_8x32']),
    (dot_product_attention.attend_columns, ['column_32x8']),
  ],
  ids=['blockwise', 'rows', 'columns'],
)
def test_all_forms_agree(form, names):
  for name in names:
    found = _with_gradients(functools.partial(form, pattern=PATTERNS[name]), *_inputs())
    for a, b in zip(_expected(name), found):
      np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max(), err_msg=name)


def test_a_pattern_may_be_chosen_by_an_array():
  names = ['column_32x8', 'row_8x32']
  chosen = jax.jit(
    functools.partial(
      dot_product_attention.attend_in_schedule, patterns=[PATTERNS[name] for name in names]
    )
  )
  for index, name in enumerate(names):
    found = chosen(*_inputs(), pattern_index=jnp.int32(index))
    np.testing.assert_allclose(found, _expected(name)[0], atol=2e-5)


def _arrays(function, *inputs):
  """What makes each array of a function before it is compiled, and its number of values."""
  found = []

  def look(jaxpr):
    for equation in jaxpr.eqns:
      found.extend(
        (equation.primitive.name, variable.aval.size)
        for variable in equation.outvars
        if hasattr(variable.aval, 'size')
      )
      for value in equation.params.values():
        for inner in value if isinstance(value, (tuple, list)) else (value,):
          inner = getattr(inner, 'jaxpr', inner)
          if hasattr(inner, 'eqns'):
            look(inner)

  look(jax.make_jaxpr(function)(*inputs).jaxpr)
  return found


def _largest(function, *inputs):
  return max(size for _, size in _arrays(function, *inputs))


# Keys whose scores are computed for a query on average. 'global', in blocks of 256 queries: as many
# blocks as there are before, and its own. 'conv': blocks of 4 rows and the 5 before them, fewer at
# the top. 'row': two rows. 'column': one column.
@pytest.mark.parametrize(
  'name, scores',
  [
    ('global', 1024 * 256 * (1 + 2 + 3 + 4) / 4),
    ('row', 1024 * 64),
    ('column', 1024 * 32),
    ('conv', 128 * (128 + 256 + 6 * 288)),
  ],
)
def test_training_computes_only_the_scores_of_blocks_that_a_pattern_leaves(name, scores):
  pattern = attention_patterns.AttentionPattern(name, (32, 32), 11)
  attend = functools.partial(dot_product_attention.attend_in_pattern, pattern=pattern)
  made = _arrays(attend, *[jnp.zeros((1, 1024, 2, 8))] * 3)
  # Each score is exponentiated once.
  assert sum(size for primitive, size in made if primitive == 'exp') == 2 * scores
  assert scores < 0.63 * 1024**2


def test_long_sequences_make_no_array_of_all_pairs_of_positions():
  pattern = attention_patterns.AttentionPattern('conv', (32, 32), 11)
  inputs = [jnp.zeros((1, 1024, 2, 8))] * 3
  pairs = 2 * 1024 * 1024
  chosen = functools.partial(dot_product_attention.attend_in_pattern, pattern=pattern)
  assert _largest(functools.partial(gradients.with_gradients, chosen), *inputs) < pairs / 2
  plain = functools.partial(_plain, pattern)
  assert _largest(functools.partial(gradients.with_gradients, plain), *inputs) == pairs

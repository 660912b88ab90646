"""Scaled dot-product attention, in the form that suits the platform and the pattern.

`attend` computes scores for all pairs of positions. The other forms give the same result without
computing everything that the pattern masks: `attend_blockwise` processes one block of queries at a
time, and `attend_rows` and `attend_columns` cut the grid into rows and columns. `attend_in_pattern`
and `attend_to_keys` choose among them and cuDNN's kernel on GPUs (`attention_cudnn.py`). On TPUs the
layers in `attention.py` use the kernel in `attention_kernel.py` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_cudnn
from parti_jax.models.nn import attention_kernel
from parti_jax.models.nn import attention_patterns

# Sequences of at least this length are attended to in blocks of queries.
_BLOCKWISE_FROM = 512
_BLOCK = {'global': 256, 'conv': 128}


def attend(
  query: Float[Array, 'batch query_length heads head_dim'],
  key: Float[Array, 'batch key_length heads head_dim'],
  value: Float[Array, 'batch key_length heads head_dim'],
  mask: Bool[Array | np.ndarray, 'query_length key_length']
  | Bool[Array, '#batch 1 #query_length key_length']
  | None = None,
) -> Float[Array, 'batch query_length heads head_dim']:
  """Scaled dot-product attention with the softmax in float32.

  Args:
    query: queries.
    key: keys.
    value: values.
    mask: True where a query may attend to a key; None if it may attend to all.

  Returns:
    The attended values, in the dtype of the query.
  """
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum('bqhd,bkhd->bhqk', query * scale, key, preferred_element_type=jnp.float32)
  weights = attention_cache.masked_softmax(scores, mask).astype(query.dtype)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def attend_to_keys(
  query: Float[Array, 'batch query_length heads head_dim'],
  key: Float[Array, 'batch key_length heads head_dim'],
  value: Float[Array, 'batch key_length heads head_dim'],
  mask: Bool[Array, '#batch 1 #query_length key_length'] | None = None,
) -> Float[Array, 'batch query_length heads head_dim']:
  """`attend` in the form that suits the platform.

  Args:
    query: queries.
    key: keys.
    value: values.
    mask: True where a query may attend to a key; None if it may attend to all. A mask that is the
      same for all queries, [batch, 1, 1, key_length], leaves the first keys of each example.
  """
  if attention_cudnn.fits(query, key) and (mask is None or mask.shape[2] == 1):
    out = attention_cudnn.attend(query, key, value, mask)
    return checkpoint_name(out, attention_kernel.ATTENTION_OUTPUT)
  return attend(query, key, value, mask)


def attend_blockwise(
  query: Float[Array, 'batch length heads head_dim'],
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  pattern: attention_patterns.AttentionPattern,
  block: int,
) -> Float[Array, 'batch length heads head_dim']:
  """`attend` with the pattern's mask, computed for one block of queries at a time.

  Each block of `block` queries uses only the keys from the first to the last that any of them
  attends to. The backward pass recomputes the scores.
  """
  blocks = []
  for start in range(0, pattern.length, block):
    rows = pattern.mask[start : start + block]
    seen = np.flatnonzero(rows.any(axis=0))
    first, last = int(seen[0]), int(seen[-1]) + 1
    blocks.append(
      jax.checkpoint(attend)(
        query[:, start : start + block],
        key[:, first:last],
        value[:, first:last],
        rows[:, first:last],
      )
    )
  return jnp.concatenate(blocks, axis=1)


def _cut(
  part: Float[Array, 'batch length heads head_dim'], grid: tuple[int, int]
) -> Float[Array, 'batch rows columns heads head_dim']:
  return part.reshape(part.shape[:1] + grid + part.shape[2:])


def attend_rows(
  query: Float[Array, 'batch length heads head_dim'],
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  pattern: attention_patterns.AttentionPattern,
) -> Float[Array, 'batch length heads head_dim']:
  """`attend` with the mask of 'row': each row of the grid attends to itself and the row above."""
  grid = rows, columns = pattern.grid

  def with_row_above(
    part: Float[Array, 'batch rows columns heads head_dim'],
  ) -> Float[Array, 'batch rows 2*columns heads head_dim']:
    # The first row has zeros above it, which the mask hides.
    above = jnp.pad(part[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * 3)
    return jnp.concatenate([above, part], axis=2)

  # The same for the mask: [rows, columns, columns + length], and of its last axis, for each row,
  # the 2 * columns keys of the row above and of the row itself.
  padded = np.pad(pattern.mask, ((0, 0), (columns, 0))).reshape(rows, columns, -1)
  mask = np.stack([padded[row, :, row * columns : (row + 2) * columns] for row in range(rows)])
  out = jax.vmap(attend, in_axes=(1, 1, 1, 0), out_axes=1)(
    _cut(query, grid), with_row_above(_cut(key, grid)), with_row_above(_cut(value, grid)), mask
  )  # [batch, rows, columns, heads, head_dim]
  return out.reshape(query.shape)


def attend_columns(
  query: Float[Array, 'batch length heads head_dim'],
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  pattern: attention_patterns.AttentionPattern,
) -> Float[Array, 'batch length heads head_dim']:
  """`attend` with the mask of 'column': each column of the grid attends to itself."""
  grid = pattern.grid
  mask = pattern.mask[:: grid[1], :: grid[1]]  # [rows, rows], the same for every column.
  out = jax.vmap(attend, in_axes=(2, 2, 2, None), out_axes=2)(
    _cut(query, grid), _cut(key, grid), _cut(value, grid), mask
  )  # [batch, rows, columns, heads, head_dim]
  return out.reshape(query.shape)


def attend_in_pattern(
  query: Float[Array, 'batch length heads head_dim'],
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  pattern: attention_patterns.AttentionPattern,
) -> Float[Array, 'batch length heads head_dim']:
  """Self-attention in the form that suits the pattern, the platform and the length."""
  if pattern.name == 'row':
    return attend_rows(query, key, value, pattern)
  if pattern.name == 'column':
    return attend_columns(query, key, value, pattern)
  if attention_cudnn.fits(query, key, pattern):
    return attention_cudnn.attend(query, key, value, causal=True)
  if pattern.length >= _BLOCKWISE_FROM:
    return attend_blockwise(query, key, value, pattern, _BLOCK[pattern.name])
  return attend(query, key, value, pattern.mask)


def attend_in_schedule(
  query: Float[Array, 'batch length heads head_dim'],
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  patterns: Sequence[attention_patterns.AttentionPattern],
  pattern_index: int | Int[Array, ''],
) -> Float[Array, 'batch length heads head_dim']:
  """`attend_in_pattern` with one of several patterns.

  Args:
    query: queries.
    key: keys.
    value: values.
    patterns: the patterns to choose from.
    pattern_index: which pattern to use. If it is an array, all of them are compiled and one is computed.

  Returns:
    The attended values, with the checkpoint name ATTENTION_OUTPUT.
  """
  forms = [functools.partial(attend_in_pattern, pattern=pattern) for pattern in patterns]
  out = call_chosen(forms, pattern_index, query, key, value)
  return checkpoint_name(out, attention_kernel.ATTENTION_OUTPUT)


def call_chosen(
  forms: Sequence[Callable[..., Array]], index: int | Int[Array, ''], *inputs: Array
) -> Array:
  """Calls one of several forms of attention; an array as index compiles all of them."""
  return forms[index](*inputs) if isinstance(index, int) else jax.lax.switch(index, forms, *inputs)


def text_mask(text_tokens: Int[Array, 'batch text_length']) -> Bool[Array, 'batch 1 1 text_length']:
  """Returns an attention mask that hides padding: each id 0 after the last token.

  It leaves the first tokens of each text, as `attend_to_keys` requires.
  """
  places = jnp.arange(text_tokens.shape[1])
  last = jnp.max(jnp.where(text_tokens > 0, places, -1), axis=1, keepdims=True)
  return (places <= last)[:, None, None, :]


def prefix_mask(mask: Bool[Array, 'batch 1 1 prefix']) -> Bool[Array, 'batch 1 prefix prefix']:
  """Returns which positions of a prefix each of them attends to: itself, and earlier ones.

  Args:
    mask: True where a position may be attended to. The others attend to themselves alone.
  """
  places = jnp.arange(mask.shape[-1])
  return (mask & (places <= places[:, None])) | (places == places[:, None])


def attend_after_prefix(
  query: Float[Array, 'batch places heads head_dim'],
  key: Float[Array, 'batch places heads head_dim'],
  value: Float[Array, 'batch places heads head_dim'],
  mask: Bool[Array, 'batch 1 1 prefix'],
  pattern: attention_patterns.AttentionPattern,
) -> Float[Array, 'batch length heads head_dim']:
  """Attends from image tokens to the prefix before them, and in a pattern to image tokens.

  With many image tokens it computes one block of queries at a time, like `attend_blockwise`.

  Args:
    query: queries of the prefix, which are not used, and after them those of the image tokens.
    key: keys of both.
    value: values of both.
    mask: True where a position of the prefix may be attended to.
    pattern: the pattern of the image tokens.
  """
  prefix, length = mask.shape[-1], pattern.length
  block = length if length < _BLOCKWISE_FROM else _BLOCK.get(pattern.name, _BLOCK['global'])
  blocks = []
  for start in range(0, length, block):
    rows = pattern.mask[start : start + block]
    seen = np.flatnonzero(rows.any(axis=0))
    within = slice(int(seen[0]), int(seen[-1]) + 1)
    keys, values = (
      jnp.concatenate([part[:, :prefix], part[:, prefix:][:, within]], axis=1)
      for part in (key, value)
    )
    masks = [
      jnp.broadcast_to(part, (len(mask), 1, len(rows), part.shape[-1]))
      for part in (mask, rows[:, within])
    ]
    queries = query[:, prefix + start : prefix + start + block]
    blocks.append(jax.checkpoint(attend)(queries, keys, values, jnp.concatenate(masks, axis=-1)))
  return jnp.concatenate(blocks, axis=1)


def for_each_head(
  part: Float[Array, 'batch length kv_heads head_dim'], heads: int
) -> Float[Array, 'batch length heads head_dim']:
  """Repeats keys or values that several heads share; head i of the queries uses i // group size."""
  groups = heads // part.shape[2]
  return part if groups == 1 else jnp.repeat(part, groups, axis=2)

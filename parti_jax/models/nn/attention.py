"""Multi-head attention: self-attention, cross-attention, and attention over a cache.

`attend` computes scores for all pairs of positions. The other forms give the same result without
computing everything that the pattern masks: `attend_blockwise` processes one block of queries at a
time, and `attend_rows` and `attend_columns` cut the grid into rows and columns. `attend_in_pattern`
and `attend_to_keys` choose among them and cuDNN's kernel on GPUs (`attention_cudnn.py`). On TPUs the
layers use the kernel in `attention_kernel.py` instead.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from collections.abc import Sequence

import flax.linen as nn
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
from parti_jax.models.nn import block_options
from parti_jax.models.nn import layers
from parti_jax.models.nn import quantization
from parti_jax.models.nn import rotary

# Sequences of at least this length are attended to in blocks of queries.
_BLOCKWISE_FROM = 512
_BLOCK = {'global': 256, 'conv': 128}
# Int8 caches of at least this many slots are read before a position is written. After the write, XLA
# for TPUs moves them to the chip's own memory and back. With few slots that is the faster way: it
# moves 5% less for the 20B's 166 slots, but 25% more for 1,024.
_READ_FIRST_FROM = 512


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
  index: int | Int[Array, ''],
) -> Float[Array, 'batch length heads head_dim']:
  """`attend_in_pattern` with one of several patterns.

  Args:
    query: queries.
    key: keys.
    value: values.
    patterns: the patterns to choose from.
    index: which pattern to use. If it is an array, all of them are compiled and one is computed.

  Returns:
    The attended values, with the checkpoint name ATTENTION_OUTPUT.
  """
  forms = [functools.partial(attend_in_pattern, pattern=pattern) for pattern in patterns]
  out = _call_chosen(forms, index, query, key, value)
  return checkpoint_name(out, attention_kernel.ATTENTION_OUTPUT)


def _call_chosen(
  forms: Sequence[Callable[..., Array]], index: int | Int[Array, ''], *inputs: Array
) -> Array:
  """Calls one of several forms of attention; an array as index compiles all of them."""
  return forms[index](*inputs) if isinstance(index, int) else jax.lax.switch(index, forms, *inputs)


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


def _side_by_side(
  part: Float[Array, 'batch length heads head_dim'],
) -> Float[Array, 'batch length width']:
  return part.reshape(part.shape[:2] + (-1,))


class _SelfProjections(nn.Module):
  """Projections of self-attention.

  Queries, keys and values share one kernel, unless keys and values have fewer heads.

  Attributes:
    width: model dimension `embed`.
    heads: number of heads; must divide `width`.
    dtype: dtype of the computation; parameters are float32.
    options: whether queries and keys are normed, and rotated, and the heads of keys and values.
  """

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    head_dim = self.width // self.heads
    if self.options.qk_norm:
      self.query_norm, self.key_norm = layers.RMSNorm(self.dtype), layers.RMSNorm(self.dtype)
    kv_heads = self.options.kv_heads
    if kv_heads is None:
      self.project_in = layers.HeadsProjection(
        (3, self.heads, head_dim), 1, ('embed', 'qkv', 'heads', 'head_dim'), self.dtype
      )
    else:
      self.project_query = layers.HeadsProjection(
        (self.heads, head_dim), 1, ('embed', 'heads', 'head_dim'), self.dtype
      )
      self.project_keys_values = layers.HeadsProjection(
        (2, kv_heads, head_dim), 1, ('embed', 'kv', 'heads', 'head_dim'), self.dtype
      )
    self.project_out = layers.HeadsProjection(
      (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype
    )

  def project(
    self,
    x: Float[Array, 'batch length embed'],
    position: int | Int[Array, ''] | Int[Array, 'batch'] = 0,
  ) -> tuple[
    Float[Array, 'batch length heads head_dim'],
    Float[Array, 'batch length kv_heads head_dim'],
    Float[Array, 'batch length kv_heads head_dim'],
  ]:
    """Returns queries, keys and values; `position` is the first of x, in all rows or in each."""
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    if self.options.kv_heads is None:
      projected = nn.with_logical_constraint(self.project_in(x), names)
      query, key, value = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
    else:
      query = nn.with_logical_constraint(self.project_query(x), names[:2] + names[3:])
      projected = nn.with_logical_constraint(self.project_keys_values(x), names)
      key, value = projected[:, :, 0], projected[:, :, 1]
    if self.options.qk_norm:
      query, key = self.query_norm(query), self.key_norm(key)
    grid = self.options.rotary_grid
    if grid is not None:
      query, key = (
        rotary.rotate(part, position, grid, self.options.rotary_inputs) for part in (query, key)
      )
    return query, key, value

  def _fits(
    self, x: Float[Array, 'batch length embed'], pattern: attention_patterns.AttentionPattern | None
  ) -> bool:
    """Returns whether the TPU kernel can attend within x."""
    length = x.shape[1]
    return attention_kernel.fits(length, length, self.heads, self.width // self.heads, pattern)

  def _project_packed(
    self, x: Float[Array, 'batch length embed']
  ) -> Float[Array, '3 batch length width']:
    """Returns queries, keys and values with heads side by side."""
    names = (None, 'activation_batch', 'activation_length', 'activation_heads')
    options = self.options
    if options.qk_norm or options.rotary_grid is not None or options.kv_heads is not None:
      parts = [for_each_head(part, self.heads) for part in self.project(x)]
      packed = jnp.stack([_side_by_side(part) for part in parts])
    else:
      packed = self.project_in(x, (x.shape[-1],))
    return nn.with_logical_constraint(packed, names)

  def _project_out_packed(
    self, x: Float[Array, 'batch length width']
  ) -> Float[Array, 'batch length embed']:
    return self.project_out(x, (self.heads, self.width // self.heads))


class SelfAttention(_SelfProjections):
  """Self-attention of a whole sequence with a given mask."""

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, '#batch 1 #length length'] | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Attends from each position to those where `mask` is True."""
    if self._fits(x, None) and (mask is None or mask.shape[2] == 1):
      head_dim = self.width // self.heads
      attended = attention_kernel.self_attention(self._project_packed(x), head_dim, None, mask)
      return self._project_out_packed(attended)
    query, key, value = self.project(x)
    return self.project_out(attend_to_keys(query, key, value, mask))


class PatternedSelfAttention(_SelfProjections):
  """Causal self-attention over image tokens.

  `__call__` computes a whole sequence, `decode` the next positions with a cache. A prefix, such as a
  text, may come before the image tokens; `prefill` computes it alone. `project`,
  `write_cache` and `attend_from_cache` are the steps of `decode` for a single position.
  `attend_ahead` leaves it to the caller which positions to write into the cache.
  """

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    patterns: Sequence[attention_patterns.AttentionPattern],
    index: int | Int[Array, ''] = 0,
    mask: Bool[Array, 'batch 1 1 prefix'] | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Attends from each position of a whole sequence.

    Args:
      x: the sequence.
      patterns: the patterns to choose from.
      index: which pattern to use, as in `attend_in_schedule`.
      mask: with a prefix before the image tokens: True where it may be attended to. None without.
    """
    if mask is not None and mask.shape[-1]:
      return self._attend_with_prefix(x, patterns, index, mask)
    if all(self._fits(x, pattern) for pattern in patterns):
      head_dim = self.width // self.heads
      forms = [
        functools.partial(attention_kernel.self_attention, head_dim=head_dim, pattern=pattern)
        for pattern in patterns
      ]
      return self._project_out_packed(_call_chosen(forms, index, self._project_packed(x)))
    query, *shared = self.project(x)
    key, value = (for_each_head(part, self.heads) for part in shared)
    return self.project_out(attend_in_schedule(query, key, value, patterns, index))

  def _attend_with_prefix(
    self,
    x: Float[Array, 'batch length embed'],
    patterns: Sequence[attention_patterns.AttentionPattern],
    index: int | Int[Array, ''],
    mask: Bool[Array, 'batch 1 1 prefix'],
  ) -> Float[Array, 'batch length embed']:
    prefix = mask.shape[-1]
    query, *shared = self.project(x, -prefix)
    key, value = (for_each_head(part, self.heads) for part in shared)
    within = prefix_mask(mask)
    first = attend(query[:, :prefix], key[:, :prefix], value[:, :prefix], within)
    forms = [functools.partial(attend_after_prefix, pattern=pattern) for pattern in patterns]
    after = _call_chosen(forms, index, query, key, value, mask)
    attended = checkpoint_name(
      jnp.concatenate([first, after], axis=1), attention_kernel.ATTENTION_OUTPUT
    )
    return self.project_out(attended)

  def prefill(
    self, x: Float[Array, 'batch prefix embed'], mask: Bool[Array, 'batch 1 1 prefix']
  ) -> tuple[
    Float[Array, 'batch prefix embed'],
    Float[Array, 'batch prefix kv_heads head_dim'],
    Float[Array, 'batch prefix kv_heads head_dim'],
  ]:
    """Attends within the prefix before the image tokens.

    Args:
      x: the prefix.
      mask: True where it may be attended to.

    Returns:
      The output of attention, and the keys and values of the prefix.
    """
    query, key, value = self.project(x, -x.shape[1])
    keys, values = (for_each_head(part, self.heads) for part in (key, value))
    return self.project_out(attend(query, keys, values, prefix_mask(mask))), key, value

  def decode(
    self,
    x: Float[Array, 'batch length embed'],
    cache: attention_cache.KeysValues,
    position: Int[Array, ''] | Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
    others: Sequence[attention_cache.Part] = (),
  ) -> tuple[Float[Array, 'batch length embed'], attention_cache.KeysValues]:
    """Attends from each of the next positions to itself and earlier ones.

    Args:
      x: the next positions.
      cache: keys and values of the earlier positions.
      position: the first position of x, in all rows or, if x has a single one, in each.
      pattern: the pattern of the layer.
      others: keys, values and masks of a prefix.

    Returns:
      The output of attention, and the cache with the positions of x.
    """
    query, key, value = self.project(x, position)
    quantized = isinstance(cache[0], quantization.QuantizedVectors)
    if x.shape[1] == 1 and quantized and attention_cache.count_slots(cache) >= _READ_FIRST_FROM:
      attended = attention_cache.attend_before_write(
        query, key, value, cache, position, pattern, others
      )
      attended, key, value = jax.lax.optimization_barrier((attended, key, value))
      updated = attention_cache.write_cache(cache, key, value, position, pattern)
      return self.project_out(attended), updated
    updated = attention_cache.write_cache(cache, key, value, position, pattern)
    if x.shape[1] == 1:
      return self.attend_from_cache(query, updated, position, pattern, others), updated
    return self.attend_ahead(query, key, value, cache, position, pattern, others), updated

  def attend_ahead(
    self,
    query: Float[Array, 'batch length heads head_dim'],
    key: Float[Array, 'batch length kv_heads head_dim'],
    value: Float[Array, 'batch length kv_heads head_dim'],
    cache: attention_cache.KeysValues,
    position: Int[Array, ''] | Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
    others: Sequence[attention_cache.Part] = (),
  ) -> Float[Array, 'batch length embed']:
    """Attends from the next positions, which the cache doesn't hold yet.

    Args:
      query: queries of the positions, from `project`.
      key: their keys.
      value: their values.
      cache: keys and values of the earlier positions.
      position: the first of the next positions, in all rows or in each.
      pattern: the pattern of the layer.
      others: keys, values and masks of a prefix.
    """
    keys, values, mask = attention_cache.read_cache_and_chunk(cache, key, value, position, pattern)
    return self.project_out(attention_cache.attend_cached(query, keys, values, mask, others))

  def attend_from_cache(
    self,
    query: Float[Array, 'batch 1 heads head_dim'],
    cache: attention_cache.KeysValues,
    position: Int[Array, ''] | Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
    others: Sequence[attention_cache.Part] = (),
  ) -> Float[Array, 'batch 1 embed']:
    """Attends from a single position that the cache already holds.

    Args:
      query: the query of the position, from `project`.
      cache: keys and values of this and the earlier positions.
      position: the position, in all rows or in each.
      pattern: the pattern of the layer.
      others: keys, values and masks of a prefix.
    """
    return self.project_out(
      attention_cache.attend_cached(
        query, *attention_cache.read_cache(cache, position, pattern), others
      )
    )


def text_mask(text_tokens: Int[Array, 'batch text_length']) -> Bool[Array, 'batch 1 1 text_length']:
  """Returns an attention mask that hides padding: each id 0 after the last token.

  It leaves the first tokens of each text, as `attend_to_keys` requires.
  """
  places = jnp.arange(text_tokens.shape[1])
  last = jnp.max(jnp.where(text_tokens > 0, places, -1), axis=1, keepdims=True)
  return (places <= last)[:, None, None, :]


class CrossAttention(nn.Module):
  """Attention of a sequence over another one.

  Attributes:
    width: model dimension `embed`.
    heads: number of heads; must divide `width`.
    dtype: dtype of the computation; parameters are float32.
    options: whether queries and keys are normed, and the heads of keys and values.
  """

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    head_dim = self.width // self.heads
    if self.options.qk_norm:
      self.query_norm, self.key_norm = layers.RMSNorm(self.dtype), layers.RMSNorm(self.dtype)
    self.project_query = layers.HeadsProjection(
      (self.heads, head_dim), 1, ('embed', 'heads', 'head_dim'), self.dtype
    )
    kv_heads = self.heads if self.options.kv_heads is None else self.options.kv_heads
    self.project_memory = layers.HeadsProjection(
      (2, kv_heads, head_dim), 1, ('embed', 'kv', 'heads', 'head_dim'), self.dtype
    )
    self.project_out = layers.HeadsProjection(
      (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype
    )

  def keys_values(
    self, encoded: Float[Array, 'batch length features']
  ) -> tuple[
    Float[Array, 'batch length kv_heads head_dim'], Float[Array, 'batch length kv_heads head_dim']
  ]:
    """Returns keys and values of the sequence to attend to."""
    projected = self.project_memory(encoded)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    key, value = projected[:, :, 0], projected[:, :, 1]
    return (self.key_norm(key) if self.options.qk_norm else key), value

  def _queries(
    self, x: Float[Array, 'batch length embed']
  ) -> Float[Array, 'batch length heads head_dim']:
    query = self.project_query(x)
    return self.query_norm(query) if self.options.qk_norm else query

  def __call__(
    self,
    x: Float[Array, 'batch query_length embed'],
    other: Float[Array, 'batch length features']
    | tuple[
      Float[Array, 'batch kv_heads length head_dim'] | quantization.QuantizedVectors,
      Float[Array, 'batch kv_heads length head_dim'] | quantization.QuantizedVectors,
    ],
    mask: Bool[Array, '#batch 1 1 length'] | None = None,
  ) -> Float[Array, 'batch query_length embed']:
    """Attends from x to another sequence.

    Args:
      x: the sequence that attends.
      other: the other sequence, or its keys and values with heads before positions.
      mask: True where x may attend; required with keys and values.
    """
    head_dim = self.width // self.heads
    if not isinstance(other, tuple) and attention_kernel.fits(
      x.shape[1], other.shape[1], self.heads, head_dim
    ):
      return self._call_packed(x, other, mask)
    query = self._queries(x)
    if isinstance(other, tuple):
      assert mask is not None
      return self.project_out(attention_cache.attend_cached(query, *other, mask))
    key, value = (for_each_head(part, self.heads) for part in self.keys_values(other))
    return self.project_out(attend_to_keys(query, key, value, mask))

  def _call_packed(
    self,
    x: Float[Array, 'batch query_length embed'],
    other: Float[Array, 'batch length features'],
    mask: Bool[Array, '#batch 1 1 length'] | None,
  ) -> Float[Array, 'batch query_length embed']:
    names = ('activation_batch', 'activation_length', 'activation_heads')
    if self.options.qk_norm or self.options.kv_heads is not None:
      query = _side_by_side(self._queries(x))
      parts = [for_each_head(part, self.heads) for part in self.keys_values(other)]
      keys_values = jnp.stack([_side_by_side(part) for part in parts])
    else:
      query = self.project_query(x, (x.shape[-1],))
      keys_values = self.project_memory(other, (other.shape[-1],))
    query = nn.with_logical_constraint(query, names)
    keys_values = nn.with_logical_constraint(keys_values, (None, *names))
    head_dim = self.width // self.heads
    attended = attention_kernel.cross_attention(query, keys_values, head_dim, mask)
    return self.project_out(attended, (self.heads, head_dim))

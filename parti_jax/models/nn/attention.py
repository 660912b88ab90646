"""Layers of multi-head attention: self-attention, causal self-attention in patterns, cross-attention.

The computations are in `dot_product_attention.py`, those with a cache in `attention_cache.py`, and the
kernel for TPUs in `attention_kernel.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_kernel
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import block_options
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layers
from parti_jax.models.nn import quantization
from parti_jax.models.nn import rotary

# Int8 caches of at least this many slots are read before a position is written. After the write, XLA
# for TPUs moves them to the chip's own memory and back. With few slots that is the faster way: it
# moves 5% less for the 20B's 166 slots, but 25% more for 1,024.
_READ_FIRST_FROM = 512


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
      parts = [dot_product_attention.for_each_head(part, self.heads) for part in self.project(x)]
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
    return self.project_out(dot_product_attention.attend_to_keys(query, key, value, mask))


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
    pattern_index: int | Int[Array, ''] = 0,
    mask: Bool[Array, 'batch 1 1 prefix'] | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Attends from each position of a whole sequence.

    Args:
      x: the sequence.
      patterns: the patterns to choose from.
      pattern_index: which pattern to use, as in `dot_product_attention.attend_in_schedule`.
      mask: with a prefix before the image tokens: True where it may be attended to. None without.
    """
    if mask is not None and mask.shape[-1]:
      return self._attend_with_prefix(x, patterns, pattern_index, mask)
    if all(self._fits(x, pattern) for pattern in patterns):
      head_dim = self.width // self.heads
      forms = [
        functools.partial(attention_kernel.self_attention, head_dim=head_dim, pattern=pattern)
        for pattern in patterns
      ]
      return self._project_out_packed(
        dot_product_attention.call_chosen(forms, pattern_index, self._project_packed(x))
      )
    query, *shared = self.project(x)
    key, value = (dot_product_attention.for_each_head(part, self.heads) for part in shared)
    return self.project_out(
      dot_product_attention.attend_in_schedule(query, key, value, patterns, pattern_index)
    )

  def _attend_with_prefix(
    self,
    x: Float[Array, 'batch length embed'],
    patterns: Sequence[attention_patterns.AttentionPattern],
    pattern_index: int | Int[Array, ''],
    mask: Bool[Array, 'batch 1 1 prefix'],
  ) -> Float[Array, 'batch length embed']:
    prefix = mask.shape[-1]
    query, *shared = self.project(x, -prefix)
    key, value = (dot_product_attention.for_each_head(part, self.heads) for part in shared)
    within = dot_product_attention.prefix_mask(mask)
    first = dot_product_attention.attend(
      query[:, :prefix], key[:, :prefix], value[:, :prefix], within
    )
    forms = [
      functools.partial(dot_product_attention.attend_after_prefix, pattern=pattern)
      for pattern in patterns
    ]
    after = dot_product_attention.call_chosen(forms, pattern_index, query, key, value, mask)
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
    keys, values = (dot_product_attention.for_each_head(part, self.heads) for part in (key, value))
    return (
      self.project_out(
        dot_product_attention.attend(query, keys, values, dot_product_attention.prefix_mask(mask))
      ),
      key,
      value,
    )

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
    key, value = (
      dot_product_attention.for_each_head(part, self.heads) for part in self.keys_values(other)
    )
    return self.project_out(dot_product_attention.attend_to_keys(query, key, value, mask))

  def _call_packed(
    self,
    x: Float[Array, 'batch query_length embed'],
    other: Float[Array, 'batch length features'],
    mask: Bool[Array, '#batch 1 1 length'] | None,
  ) -> Float[Array, 'batch query_length embed']:
    names = ('activation_batch', 'activation_length', 'activation_heads')
    if self.options.qk_norm or self.options.kv_heads is not None:
      query = _side_by_side(self._queries(x))
      parts = [
        dot_product_attention.for_each_head(part, self.heads) for part in self.keys_values(other)
      ]
      keys_values = jnp.stack([_side_by_side(part) for part in parts])
    else:
      query = self.project_query(x, (x.shape[-1],))
      keys_values = self.project_memory(other, (other.shape[-1],))
    query = nn.with_logical_constraint(query, names)
    keys_values = nn.with_logical_constraint(keys_values, (None, *names))
    head_dim = self.width // self.heads
    attended = attention_kernel.cross_attention(query, keys_values, head_dim, mask)
    return self.project_out(attended, (self.heads, head_dim))

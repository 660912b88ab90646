"""Multi-head attention: over a whole sequence, over a memory, and over a cache."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.models import layers


def attend(query, key, value, mask=None):
  """Scaled dot-product attention with the softmax in float32.

  Args:
    query: [batch, query_length, heads, head_dim].
    key: [batch, key_length, heads, head_dim].
    value: as `key`.
    mask: bool, broadcastable to [batch, heads, query_length, key_length]; True where a
      query may look.

  Returns:
    [batch, query_length, heads, head_dim], of the query's dtype.
  """
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum('bqhd,bkhd->bhqk', query * scale, key, preferred_element_type=jnp.float32)
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum('bhqk,bkhd->bqhd', weights, value)


def attend_cached(query, keys, values, mask):
  """`attend` for one query a sequence, over keys and values that lie heads first.

  Heads come before positions so that each head's matrix is whole in memory: a step then reads
  the cache where it is, instead of a transposed copy of it.

  Args:
    query: [batch, 1, heads, head_dim].
    keys: [batch, heads, length, head_dim].
    values: as `keys`.
    mask: bool, broadcastable to [batch, heads, 1, length].

  Returns:
    [batch, 1, heads, head_dim], of the query's dtype.
  """
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum('bqhd,bhkd->bhqk', query * scale, keys, preferred_element_type=jnp.float32)
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum('bhqk,bhkd->bqhd', weights, values)


class SelfAttention(nn.Module):
  """Attention of a sequence over itself; queries, keys and values are one projection.

  Attributes:
    width: model dimension `embed`.
    heads: number of heads; must divide `width`.
    dtype: of the computation; parameters are float32.
  """

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    head_dim = self.width // self.heads
    self.project_in = layers.Projection(
        (3, self.heads, head_dim), 1, ('embed', 'qkv', 'heads', 'head_dim'), self.dtype)
    self.project_out = layers.Projection(
        (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype)

  def _queries_keys_values(self, x):
    projected = self.project_in(x)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    return projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]

  def __call__(self, x, mask=None):
    """x: [batch, length, embed]; mask: bool [batch or 1, 1, length, length]. As x."""
    query, key, value = self._queries_keys_values(x)
    return self.project_out(attend(query, key, value, mask))

  def step(self, x, cache, position):
    """Attention of one new position over those before it.

    Args:
      x: [batch, 1, embed], the newest position.
      cache: keys and values of earlier positions, [batch, heads, length, head_dim] each.
      position: int32 [], the place of `x` in the sequence, below `length`.

    Returns:
      The output [batch, 1, embed] and the cache with the new position written.
    """
    query, key, value = self._queries_keys_values(x)
    cache = tuple(
        jax.lax.dynamic_update_slice_in_dim(
            old, new.swapaxes(1, 2).astype(old.dtype), position, axis=2)
        for old, new in zip(cache, (key, value)))
    visible = jnp.arange(cache[0].shape[2]) <= position
    return self.project_out(attend_cached(query, *cache, visible)), cache


class CrossAttention(nn.Module):
  """Attention of a sequence over the text encoder's output. Attributes as SelfAttention."""

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    head_dim = self.width // self.heads
    self.project_query = layers.Projection(
        (self.heads, head_dim), 1, ('embed', 'heads', 'head_dim'), self.dtype)
    self.project_memory = layers.Projection(
        (2, self.heads, head_dim), 1, ('embed', 'kv', 'heads', 'head_dim'), self.dtype)
    self.project_out = layers.Projection(
        (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype)

  def memory(self, encoded):
    """Keys and values of the text, computed once for all positions.

    Args:
      encoded: [batch, text_length, embed].

    Returns:
      Two arrays [batch, text_length, heads, head_dim].
    """
    projected = self.project_memory(encoded)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    return projected[:, :, 0], projected[:, :, 1]

  def __call__(self, x, memory, mask=None):
    """x: [batch, length, embed]; memory: of `memory()`; mask: bool [batch, 1, 1, text_length]."""
    key, value = memory
    return self.project_out(attend(self.project_query(x), key, value, mask))

  def step(self, x, memory, mask):
    """One position; x: [batch, 1, embed]; memory: heads first, as `attend_cached` takes it."""
    return self.project_out(attend_cached(self.project_query(x), *memory, mask))

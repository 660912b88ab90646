"""Caches of keys and values: what a layer writes into them, reads, and attends to.

A cache has the layout of `KeysValues`; `attention_patterns.AttentionPattern` says which slot holds which
position. What an attention over several arrays reads is never copied to join them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import quantization

# Keys and values of one layer's cache, with heads before positions. Each head's matrix is then
# contiguous in memory, and a sampling step reads the cache without transposing a copy of it. Several
# heads of the queries may share one of them.
CachePart = Float[Array, 'batch kv_heads slots head_dim'] | quantization.QuantizedVectors
KeysValues = tuple[CachePart, CachePart]
# Keys, values, and True where a query may attend to them, or None if it may attend to all.
_Vectors = Float[Array, 'batch kv_heads _ head_dim'] | quantization.QuantizedVectors
Part = tuple[_Vectors, _Vectors, Bool[Array, '...'] | None]


def masked_softmax(
  scores: Float[Array, 'batch heads query_length key_length'],
  mask: Bool[Array | np.ndarray, '*#places'] | None,
) -> Float[Array, 'batch heads query_length key_length']:
  """Returns the softmax over keys; keys where the mask, which broadcasts, is False get 0."""
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  return jax.nn.softmax(scores, axis=-1)


def attend_cached(
  query: Float[Array, 'batch length heads head_dim'],
  keys: Float[Array, 'batch kv_heads key_length head_dim'] | quantization.QuantizedVectors,
  values: Float[Array, 'batch kv_heads key_length head_dim'] | quantization.QuantizedVectors,
  mask: Bool[Array, 'key_length']
  | Bool[Array, 'length key_length']
  | Bool[Array, '#batch 1 #length key_length'],
  others: Sequence[Part] = (),
) -> Float[Array, 'batch length heads head_dim']:
  """`attend` over keys and values in the layout of `KeysValues`.

  The scales of int8 keys multiply the scores, those of values the weights.

  Args:
    query: queries.
    keys: keys.
    values: values.
    mask: True where a query may attend to a key.
    others: more keys, values and masks, which aren't copied to join them.
  """
  if not others:
    return _mean(query, masked_softmax(_scores(query, keys), mask), values)
  return _attend_parts(query, [(keys, values, mask), *others])


def _attend_parts(
  query: Float[Array, 'batch length heads head_dim'], parts: Sequence[Part]
) -> Float[Array, 'batch length heads head_dim']:
  """Attends over keys and values in several parts."""
  scores = [_scores(query, keys) for keys, _, _ in parts]
  hidden = jnp.finfo(jnp.float32).min
  scores = [
    part if mask is None else jnp.where(mask, part, hidden)
    for part, (_, _, mask) in zip(scores, parts)
  ]
  ends = np.cumsum([part.shape[-1] for part in scores])[:-1]
  weights = jnp.split(jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1), ends, axis=-1)
  means = [_mean(query, part, values) for part, (_, values, _) in zip(weights, parts)]
  return functools.reduce(jnp.add, means)


def _scores(
  query: Float[Array, 'batch length heads head_dim'], keys: CachePart
) -> Float[Array, 'batch heads length key_length']:
  scale = query.shape[-1] ** -0.5
  numbers = _numbers(keys, query)
  if numbers.shape[1] == query.shape[2]:
    scores = jnp.einsum(
      'bqhd,bhkd->bhqk', query * scale, numbers, preferred_element_type=jnp.float32
    )
  else:
    groups = _in_groups(query * scale, 2, numbers.shape[1])
    scores = jnp.einsum('bqhgd,bhkd->bhgqk', groups, numbers, preferred_element_type=jnp.float32)
    scores = scores.reshape((len(query), query.shape[2]) + scores.shape[3:])
  return _scaled(scores, keys)


def _mean(
  query: Float[Array, 'batch length heads head_dim'],
  weights: Float[Array, 'batch heads length key_length'],
  values: CachePart,
) -> Float[Array, 'batch length heads head_dim']:
  weights, numbers = _scaled(weights, values).astype(query.dtype), _numbers(values, query)
  if numbers.shape[1] == query.shape[2]:
    return jnp.einsum('bhqk,bhkd->bqhd', weights, numbers)
  groups = _in_groups(weights, 1, numbers.shape[1])
  return jnp.einsum('bhgqk,bhkd->bqhgd', groups, numbers).reshape(query.shape)


def _in_groups(x: Float[Array, '*places'], axis: int, count: int) -> Float[Array, '*more_places']:
  """Splits an axis of heads into `count` groups, which share keys and values, and their heads."""
  return x.reshape(x.shape[:axis] + (count, -1) + x.shape[axis + 1 :])


def _numbers(
  part: CachePart, query: Float[Array, 'batch length heads head_dim']
) -> Float[Array, 'batch kv_heads key_length head_dim']:
  """Returns keys or values without their scales, in the dtype of the queries if they are int8."""
  if isinstance(part, quantization.QuantizedVectors):
    return quantization.converted(part.values, query.dtype, query)
  return part


def _scaled(
  scores: Float[Array, 'batch heads query_length key_length'], part: CachePart
) -> Float[Array, 'batch heads query_length key_length']:
  """Multiplies what belongs to each key or value by its scale, if it has one."""
  if isinstance(part, quantization.QuantizedVectors):
    scale = part.scale
    if scale.shape[1] != scores.shape[1]:
      scale = jnp.repeat(scale, scores.shape[1] // scale.shape[1], axis=1)
    return scores * scale[:, :, None]
  return scores


def _in_form_of(
  part: CachePart, new: Float[Array, 'batch length heads head_dim']
) -> Float[Array, 'batch heads length head_dim'] | quantization.QuantizedVectors:
  """Converts new keys or values to the layout and the dtype of a cache's."""
  new = new.swapaxes(1, 2)
  if isinstance(part, quantization.QuantizedVectors):
    return quantization.quantize_vectors(new)
  return new.astype(part.dtype)


def count_slots(cache: KeysValues) -> int:
  """Returns the number of slots of a layer's cache."""
  return jax.tree.leaves(cache)[0].shape[2]


def write_cache(
  cache: KeysValues,
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  position: Int[Array, ''] | Int[Array, 'batch'],
  pattern: attention_patterns.AttentionPattern,
) -> KeysValues:
  """Writes the next positions into the cache of a layer.

  Args:
    cache: keys and values; `AttentionPattern.slot_of` maps positions to slots.
    key: keys of the positions from `position` on.
    value: values of the same positions.
    position: the first of them, in all rows or, if it is a single one, in each.
    pattern: the pattern of the layer.

  Returns:
    The updated cache. If there are more positions than slots, it holds the last ones.
  """
  num_slots, length = count_slots(cache), key.shape[1]
  new = tuple(_in_form_of(*parts) for parts in zip(cache, (key, value)))
  if position.ndim:
    assert length == 1, '`write_counted` writes several positions of each row'
    slots = pattern.slot_of(position, num_slots)
    write_row = lambda old, new, slot: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=1)
    write = lambda old, new: jax.vmap(write_row)(old, new, slots)
  elif length == 1:  # A slice is written in place; a scatter is slower.
    slot = pattern.slot_of(position, num_slots)
    write = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, slot, axis=2)
  else:
    kept = min(length, num_slots)
    at = pattern.slot_of(position + jnp.arange(length - kept, length), num_slots)
    write = lambda old, new: old.at[:, :, at].set(new[:, :, length - kept :], unique_indices=True)
  return jax.tree.map(write, cache, new)


def write_counted(
  cache: KeysValues,
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  position: Int[Array, 'batch'],
  count: Int[Array, 'batch'],
  pattern: attention_patterns.AttentionPattern,
) -> KeysValues:
  """Writes some of the next positions into the cache of a layer, for each row as many as it counts.

  Args:
    cache: keys and values; `AttentionPattern.slot_of` maps positions to slots.
    key: keys of the positions from `position` on.
    value: values of the same positions.
    position: the first of them in each row.
    count: number of positions to write in each row.
    pattern: the pattern of the layer.

  Returns:
    The updated cache. If there are more positions than slots, it holds the last ones.
  """
  num_slots, ahead = count_slots(cache), jnp.arange(key.shape[1])
  kept = (ahead < count[:, None]) & (ahead >= count[:, None] - num_slots)
  slots = pattern.slot_of(position[:, None] + ahead, num_slots)
  at = jnp.where(kept, slots, num_slots + ahead)  # A slot that doesn't exist is not written.

  def write(old, new):
    write_row = lambda old, new, at: old.at[:, at].set(new, mode='drop', unique_indices=True)
    write_rows = lambda old, new: jax.vmap(write_row)(old, new, at)
    return jax.tree.map(write_rows, old, _in_form_of(old, new))

  return write(cache[0], key), write(cache[1], value)


def read_cache(
  cache: KeysValues,
  position: Int[Array, ''] | Int[Array, 'batch'],
  pattern: attention_patterns.AttentionPattern,
) -> tuple[
  Float[Array, 'batch heads count head_dim'] | quantization.QuantizedVectors,
  Float[Array, 'batch heads count head_dim'] | quantization.QuantizedVectors,
  Bool[Array, 'count'] | Bool[Array, 'batch 1 1 count'],
]:
  """Reads what one position attends to from a cache that already holds this position.

  Args:
    cache: the result of `write_cache`.
    position: the position that attends, in all rows or in each.
    pattern: the pattern of the layer.

  Returns:
    Keys, values, and a mask of those that the position attends to.
  """
  num_slots = count_slots(cache)
  if position.ndim:
    first, count, visible = pattern.read(position[:, None], num_slots)
    if count < num_slots:
      at = (first + jnp.arange(count))[:, None, :, None]
      take = lambda part: jnp.take_along_axis(
        part, at if part.ndim == 4 else at[..., 0], axis=2, mode='clip'
      )
      cache = jax.tree.map(take, cache)
    return *cache, visible[:, None, None]
  first, count, visible = pattern.read(position, num_slots)
  if count < num_slots:
    # A gather, because XLA on a CPU fuses a slice with the write of the newest position and then
    # copies the whole cache at every step.
    at = first + jnp.arange(count)
    cache = jax.tree.map(lambda part: jnp.take(part, at, axis=2, mode='clip'), cache)
  return *cache, visible


def attend_before_write(
  query: Float[Array, 'batch 1 heads head_dim'],
  key: Float[Array, 'batch 1 kv_heads head_dim'],
  value: Float[Array, 'batch 1 kv_heads head_dim'],
  cache: KeysValues,
  position: Int[Array, ''] | Int[Array, 'batch'],
  pattern: attention_patterns.AttentionPattern,
  others: Sequence[Part] = (),
) -> Float[Array, 'batch 1 heads head_dim']:
  """Attends from a single position that the cache doesn't hold yet.

  Args:
    query: the query of the position.
    key: its key.
    value: its value.
    cache: keys and values of the earlier positions.
    position: the position, in all rows or in each.
    pattern: the pattern of the layer.
    others: more keys, values and masks.

  Returns:
    What `attend_cached` returns for `read_cache` after `write_cache`, except for rounding.
  """
  keys, values, visible = read_cache(cache, position, pattern)
  num_slots, each = count_slots(cache), position[:, None] if position.ndim else position
  first = pattern.read(each, num_slots)[0]
  # The slot of the position itself still holds what it will overwrite.
  own = first + jnp.arange(visible.shape[-1]) == pattern.slot_of(each, num_slots)
  visible &= ~own[:, None, None] if position.ndim else ~own
  new_key, new_value = (_in_form_of(*parts) for parts in zip(cache, (key, value)))
  return _attend_parts(query, [(keys, values, visible), (new_key, new_value, None), *others])


def read_cache_and_chunk(
  cache: KeysValues,
  key: Float[Array, 'batch length heads head_dim'],
  value: Float[Array, 'batch length heads head_dim'],
  position: Int[Array, ''] | Int[Array, 'batch'],
  pattern: attention_patterns.AttentionPattern,
) -> tuple[
  Float[Array, 'batch heads slots_and_length head_dim'] | quantization.QuantizedVectors,
  Float[Array, 'batch heads slots_and_length head_dim'] | quantization.QuantizedVectors,
  Bool[Array, 'length slots_and_length'] | Bool[Array, 'batch 1 length slots_and_length'],
]:
  """Joins a cache with several new positions that it doesn't hold yet.

  The new positions can't be read back from the cache: in a ring buffer the later ones may have
  overwritten what the earlier ones attend to.

  Args:
    cache: the cache before `write_cache` of these positions.
    key: keys of the positions from `position` on.
    value: values of the same positions.
    position: the first of them, in all rows or in each.
    pattern: the pattern of the layer.

  Returns:
    Keys, values, and a mask of what each new position attends to.
  """
  position = position[:, None] if position.ndim else position
  new = position + jnp.arange(key.shape[1])
  held = pattern.positions_in_slots(position, count_slots(cache))
  seen = jnp.concatenate([held, new], axis=-1)[..., None, :]
  join = lambda *parts: jnp.concatenate(parts, axis=2)
  keys, values = (
    jax.tree.map(join, old, _in_form_of(old, part)) for old, part in zip(cache, (key, value))
  )
  mask = jnp.asarray((seen >= 0) & pattern.visible(new[..., None], seen))
  return keys, values, mask[:, None] if position.ndim else mask

"""Multi-head attention: over a whole sequence, over another sequence, and over a cache.

`attend_in_pattern` chooses among forms with the same result. `attend` computes a score for each
pair of positions. The others leave out what the pattern rules out: `attend_blockwise` computes one
block of queries after another, `attend_rows` and `attend_columns` cut the grid into rows and
columns, and `attend_fused`, on TPU, keeps no scores in memory at all.
"""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Name by which a remat policy may keep the result of self-attention.
ATTENTION_OUTPUT = 'attention_output'
# Name of the scope of a fused kernel, before the pattern's own.
KERNEL_SCOPE = 'attention_pattern_'
# Sequences from this length on are attended to in blocks of queries.
_BLOCKWISE_FROM = 512
_BLOCK = {'global': 256, 'conv': 128}
# Side of the fused kernel's blocks. A smaller one leaves out more of what a pattern rules out, and
# costs more steps; the lanes of a TPU are the least.
_FUSED_BLOCK = {'global': 512, 'conv': 256, 'row': 128, 'column': 128}
_LANES = 128


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


def attend_blockwise(query, key, value, pattern: attention_patterns.AttentionPattern, block: int):
  """`attend` with the pattern's mask, for one block of queries after another.

  A block looks only at the keys from the first to the last that any of its queries sees; its
  scores are computed again in the backward pass. Arguments and result as `attend`; the length is
  that of the pattern.
  """
  blocks = []
  for start in range(0, pattern.length, block):
    rows = pattern.mask[start : start + block]
    seen = rows.any(axis=0).nonzero()[0]
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


def attend_rows(query, key, value, pattern: attention_patterns.AttentionPattern):
  """`attend` with the mask of 'row': each row of the grid looks at itself and the row above it.

  Arguments and result as `attend`; the length is that of the pattern.
  """
  rows, columns = pattern.grid
  cut = lambda part: part.reshape(part.shape[:1] + pattern.grid + part.shape[2:])
  above = lambda part: jnp.pad(part[:, :-1], ((0, 0), (1, 0)) + ((0, 0),) * 3)
  with_above = lambda part: jnp.concatenate([above(part), part], axis=2)
  mask = np.pad(pattern.mask, ((0, 0), (columns, 0))).reshape(rows, columns, -1)
  mask = np.stack([mask[row, :, row * columns : (row + 2) * columns] for row in range(rows)])
  query, key, value = cut(query), with_above(cut(key)), with_above(cut(value))
  out = jax.vmap(attend, in_axes=(1, 1, 1, 0), out_axes=1)(query, key, value, mask)
  return out.reshape(out.shape[:1] + (pattern.length,) + out.shape[3:])


def attend_columns(query, key, value, pattern: attention_patterns.AttentionPattern):
  """`attend` with the mask of 'column': each column of the grid looks at itself.

  Arguments and result as `attend`; the length is that of the pattern.
  """
  columns = pattern.grid[1]
  parts = [
    part.reshape(part.shape[:1] + pattern.grid + part.shape[2:]) for part in (query, key, value)
  ]
  mask = pattern.mask[::columns, ::columns]
  out = jax.vmap(attend, in_axes=(2, 2, 2, None), out_axes=2)(*parts, mask)
  return out.reshape(query.shape)


def attend_fused(
  query, key, value, pattern: attention_patterns.AttentionPattern, interpret: bool = False
):
  """`attend` with the pattern's mask as one TPU kernel, splash attention, forward and backward.

  The kernel skips blocks of positions that the pattern rules out; it computes in the pattern's
  `order`. On a mesh each device computes its own batch and heads.

  Args:
    query: [batch, length, heads, head_dim]; the length is that of the pattern and a multiple of
      128.
    key: as `query`.
    value: as `query`.
    pattern: which positions see which.
    interpret: whether to run the kernel's Python form, on any platform.

  Returns:
    As `query`.
  """
  # Imported here: it takes a second that runs on other platforms need not pay.
  from jax.experimental.pallas.ops.tpu import splash_attention as splash

  side = min(_FUSED_BLOCK[pattern.name], pattern.length)
  side = side if pattern.length % side == 0 else _LANES
  sizes = splash.BlockSizes(
    block_q=side,
    block_kv=side,
    block_kv_compute=side,
    block_q_dkv=side,
    block_kv_dkv=side,
    block_kv_dkv_compute=side,
    use_fused_bwd_kernel=True,
  )

  def by_columns(part, back=False):
    """From raster order to the pattern's `order`, or back: a transposed grid, for 'column'."""
    if pattern.name != 'column':
      return part
    grid = pattern.grid[::-1] if back else pattern.grid
    cut = part.reshape(part.shape[:2] + grid + part.shape[3:])
    return cut.swapaxes(2, 3).reshape(part.shape)

  def attend_local(query, key, value):
    """Of one device; [batch, heads, length, head_dim] each."""
    mask = splash.MultiHeadMask([splash.NumpyMask(pattern.ordered_mask)] * query.shape[1])
    kernel = splash.make_splash_mha_single_device(
      mask, block_sizes=sizes, residual_checkpoint_name=ATTENTION_OUTPUT, interpret=interpret
    )
    # By the scope's name a plan knows which pattern a kernel is of.
    with jax.named_scope(KERNEL_SCOPE + pattern.name):
      return by_columns(jax.vmap(kernel)(*map(by_columns, (query, key, value))), back=True)

  if mesh_lib.current() is not None:
    spec = rules_lib.spec('activation_batch', 'activation_heads', None, None)
    attend_local = jax.shard_map(
      attend_local,
      in_specs=(spec, spec, spec),
      out_specs=spec,
      check_vma=False,
      axis_names=rules_lib.free_axes(),
    )
  parts = [part.swapaxes(1, 2) for part in (query * query.shape[-1] ** -0.5, key, value)]
  return attend_local(*parts).swapaxes(1, 2)


def attend_in_pattern(query, key, value, pattern: attention_patterns.AttentionPattern):
  """Self-attention in the form that fits pattern, platform and length; as `attend_blockwise`."""
  if mesh_lib.platform() == 'tpu' and pattern.length % _LANES == 0:
    return attend_fused(query, key, value, pattern)
  if pattern.name == 'row':
    return attend_rows(query, key, value, pattern)
  if pattern.name == 'column':
    return attend_columns(query, key, value, pattern)
  if pattern.length >= _BLOCKWISE_FROM:
    return attend_blockwise(query, key, value, pattern, _BLOCK[pattern.name])
  return attend(query, key, value, pattern.mask)


def attend_in_schedule(query, key, value, patterns, index):
  """`attend_in_pattern` with one of several patterns.

  Args:
    query: [batch, length, heads, head_dim].
    key: as `query`.
    value: as `query`.
    patterns: AttentionPatterns.
    index: which of them; where it is an int32 [] array, all are compiled and one is computed.

  Returns:
    As `attend`, under the name ATTENTION_OUTPUT.
  """
  if isinstance(index, int):
    out = attend_in_pattern(query, key, value, patterns[index])
  else:
    forms = [functools.partial(attend_in_pattern, pattern=pattern) for pattern in patterns]
    out = jax.lax.switch(index, forms, query, key, value)
  if mesh_lib.platform() == 'tpu' and patterns[0].length % _LANES == 0:
    return out  # The kernel has given the name itself, to the result and to what goes with it.
  return checkpoint_name(out, ATTENTION_OUTPUT)


def attend_cached(query, keys, values, mask):
  """`attend` over keys and values whose heads come before their positions.

  Each head's matrix is then contiguous in memory: a step reads the cache where it is, instead of
  a transposed copy of it.

  Args:
    query: [batch, length, heads, head_dim].
    keys: [batch, heads, key_length, head_dim].
    values: as `keys`.
    mask: bool, broadcastable to [batch, heads, length, key_length].

  Returns:
    [batch, length, heads, head_dim], of the query's dtype.
  """
  scale = query.shape[-1] ** -0.5
  scores = jnp.einsum('bqhd,bhkd->bhqk', query * scale, keys, preferred_element_type=jnp.float32)
  scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(scores, axis=-1).astype(query.dtype)
  return jnp.einsum('bhqk,bhkd->bqhd', weights, values)


def write_cache(cache, key, value, position, pattern: attention_patterns.AttentionPattern):
  """Writes the next positions into a layer's cache.

  Args:
    cache: keys and values, [batch, heads, slots, head_dim] each; `AttentionPattern.slot` says
      which position is in which slot.
    key: [batch, length, heads, head_dim], of the positions from `position` on.
    value: as `key`.
    position: int32 [], the first of them.
    pattern: of the layer.

  Returns:
    The cache. Of more positions than it has slots, it holds the last ones.
  """
  slots, length = cache[0].shape[2], key.shape[1]
  new = [part.swapaxes(1, 2).astype(cache[0].dtype) for part in (key, value)]
  if length == 1:  # A slice is written in place; a scatter is slower.
    slot = pattern.slot(position, slots)
    return tuple(
      jax.lax.dynamic_update_slice_in_dim(old, part, slot, axis=2) for old, part in zip(cache, new)
    )
  kept = min(length, slots)
  at = pattern.slot(position + jnp.arange(length - kept, length), slots)
  return tuple(
    old.at[:, :, at].set(part[:, :, length - kept :], unique_indices=True)
    for old, part in zip(cache, new)
  )


def read_cache(cache, position, pattern: attention_patterns.AttentionPattern):
  """What one position sees of a cache that holds it already.

  Args:
    cache: of `write_cache`.
    position: int32 [].
    pattern: of the layer.

  Returns:
    Keys and values, [batch, heads, count, head_dim] each, and a mask, bool [count].
  """
  slots = cache[0].shape[2]
  first, count, visible = pattern.read(position, slots)
  if count < slots:
    # Gathered, not sliced: XLA on a CPU fuses a slice with the writing of the newest position, and
    # then copies the whole cache at every step.
    at = first + jnp.arange(count)
    cache = tuple(jnp.take(part, at, axis=2, mode='clip') for part in cache)
  return *cache, visible


def read_cache_and_chunk(cache, key, value, position, pattern):
  """What several new positions see of each other and of a cache without them.

  A cache that holds them will not do: of a ring, the later ones may have replaced what the
  earlier ones see.

  Args:
    cache: of `write_cache`, before these positions are written.
    key: [batch, length, heads, head_dim], of the positions from `position` on.
    value: as `key`.
    position: int32 [], the first of them.
    pattern: of the layer.

  Returns:
    Keys and values, [batch, heads, slots + length, head_dim] each, and a mask, bool [length,
    slots + length].
  """
  new = position + jnp.arange(key.shape[1])
  seen = jnp.concatenate([pattern.held(position, cache[0].shape[2]), new])
  keys, values = (
    jnp.concatenate([old, part.swapaxes(1, 2).astype(old.dtype)], axis=2)
    for old, part in zip(cache, (key, value))
  )
  return keys, values, (seen >= 0) & pattern.visible(new[:, None], seen)


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
      (3, self.heads, head_dim), 1, ('embed', 'qkv', 'heads', 'head_dim'), self.dtype
    )
    self.project_out = layers.Projection(
      (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype
    )

  def project(self, x):
    """Query, key and value of x [batch, length, embed]: [batch, length, heads, head_dim] each."""
    projected = self.project_in(x)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    return projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]

  def __call__(self, x, mask=None):
    """x: [batch, length, embed]; mask: bool [batch or 1, 1, length, length]. As x."""
    query, key, value = self.project(x)
    return self.project_out(attend(query, key, value, mask))


class PatternedSelfAttention(SelfAttention):
  """Self-attention over image tokens, of a whole sequence or with a cache.

  Attributes as SelfAttention.
  """

  def __call__(self, x, patterns, index=0, cache=None, position=None, query=None):
    """Attends from any number of positions.

    Args:
      x: [batch, length, embed]: the whole sequence, or with a cache the positions after those
        that it holds.
      patterns: AttentionPatterns.
      index: which of them, an int, or int32 [] without a cache; see `attend_in_schedule`.
      cache: keys and values of earlier positions, see `write_cache`; None for a whole sequence.
      position: int32 [], of the first position of x, with a cache.
      query: of `project`, for a single position that the cache holds already; x is not read.

    Returns:
      [batch, length, embed], and the cache with the positions of x.
    """
    if cache is None:
      attended = attend_in_schedule(*self.project(x), patterns, index)
      return self.project_out(attended), None
    pattern = patterns[index]
    if query is None:
      query, key, value = self.project(x)
      before, cache = cache, write_cache(cache, key, value, position, pattern)
    if query.shape[1] == 1:
      seen = read_cache(cache, position, pattern)
    else:
      seen = read_cache_and_chunk(before, key, value, position, pattern)
    return self.project_out(attend_cached(query, *seen)), cache


class CrossAttention(nn.Module):
  """Attention of a sequence over another. Attributes as SelfAttention."""

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    head_dim = self.width // self.heads
    self.project_query = layers.Projection(
      (self.heads, head_dim), 1, ('embed', 'heads', 'head_dim'), self.dtype
    )
    self.project_memory = layers.Projection(
      (2, self.heads, head_dim), 1, ('embed', 'kv', 'heads', 'head_dim'), self.dtype
    )
    self.project_out = layers.Projection(
      (self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype
    )

  def keys_values(self, encoded):
    """Keys and values of the other sequence.

    Args:
      encoded: [batch, length, embed].

    Returns:
      Two arrays [batch, length, heads, head_dim].
    """
    projected = self.project_memory(encoded)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    return projected[:, :, 0], projected[:, :, 1]

  def __call__(self, x, other, mask=None):
    """Attends from x.

    Args:
      x: [batch, query_length, embed].
      other: the other sequence, [batch, length, embed], or a tuple of its keys and values, heads
        first, [batch, heads, length, head_dim] each.
      mask: bool [batch, 1, 1, length], True where x may look.

    Returns:
      As x.
    """
    query = self.project_query(x)
    if isinstance(other, tuple):
      return self.project_out(attend_cached(query, *other, mask))
    return self.project_out(attend(query, *self.keys_values(other), mask))

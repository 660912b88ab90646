"""Multi-head attention: over a whole sequence, over a memory, and over a cache.

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


def attend_in_schedule(query, key, value, patterns, place):
  """`attend_in_pattern` with one of several patterns.

  Args:
    query: as `attend`, as the next two.
    key: see `query`.
    value: see `query`.
    patterns: AttentionPatterns.
    place: which of them; where it is an int32 [] array, all are compiled and one is computed.

  Returns:
    As `attend`, under the name ATTENTION_OUTPUT.
  """
  if isinstance(place, int):
    out = attend_in_pattern(query, key, value, patterns[place])
  else:
    forms = [functools.partial(attend_in_pattern, pattern=pattern) for pattern in patterns]
    out = jax.lax.switch(place, forms, query, key, value)
  if mesh_lib.platform() == 'tpu' and patterns[0].length % _LANES == 0:
    return out  # The kernel has given the name itself, to the result and to what goes with it.
  return checkpoint_name(out, ATTENTION_OUTPUT)


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


def write_cache(cache, key, value, position, pattern: attention_patterns.AttentionPattern):
  """A cache with one more position, whose key and value are [batch, 1, heads, head_dim]."""
  slot = pattern.slot(position, cache[0].shape[2])
  return tuple(
    jax.lax.dynamic_update_slice_in_dim(old, new.swapaxes(1, 2).astype(old.dtype), slot, axis=2)
    for old, new in zip(cache, (key, value))
  )


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

  def _queries_keys_values(self, x):
    projected = self.project_in(x)
    names = ('activation_batch', 'activation_length', None, 'activation_heads', None)
    projected = nn.with_logical_constraint(projected, names)
    return projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]

  def __call__(self, x, mask=None):
    """x: [batch, length, embed]; mask: bool [batch or 1, 1, length, length]. As x."""
    query, key, value = self._queries_keys_values(x)
    return self.project_out(attend(query, key, value, mask))

  def in_schedule(self, x, patterns, place):
    """Attention over image tokens: x [batch, length, embed]; others as `attend_in_schedule`."""
    query, key, value = self._queries_keys_values(x)
    return self.project_out(attend_in_schedule(query, key, value, patterns, place))

  def project(self, x):
    """Query, key and value of x [batch, 1, embed]: [batch, 1, heads, head_dim] each."""
    return self._queries_keys_values(x)

  def attend_step(self, query, cache, position, pattern: attention_patterns.AttentionPattern):
    """Attention of one new position over those before it that the pattern lets it see.

    Args:
      query: [batch, 1, heads, head_dim], of the newest position.
      cache: keys and values of the positions that may still be seen, the newest one among them,
        [batch, heads, slots, head_dim] each; see `AttentionPattern.slot`.
      position: int32 [], the newest one's place in the sequence.
      pattern: which positions see which.

    Returns:
      The output [batch, 1, embed].
    """
    slots = cache[0].shape[2]
    first, count, visible = pattern.read(position, slots)
    # Gathered, not sliced: XLA on a CPU fuses a slice with the writing of the newest position, and
    # then copies the whole cache at every step.
    seen = (
      cache
      if count == slots
      else tuple(jnp.take(part, first + jnp.arange(count), axis=2, mode='clip') for part in cache)
    )
    return self.project_out(attend_cached(query, *seen, visible))


class CrossAttention(nn.Module):
  """Attention of a sequence over the text encoder's output. Attributes as SelfAttention."""

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

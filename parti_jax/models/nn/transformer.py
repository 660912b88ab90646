"""Transformer blocks, and stacks of them."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.models.nn import attention
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers


class EncoderBlock(nn.Module):
  """Self-attention and MLP, each behind a layer norm and beside a residual path.

  Attributes:
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    heads: attention heads.
    dropout: rate at the output of both halves.
    dtype: of the computation.
  """

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.attention_norm = layers.LayerNorm(self.dtype)
    self.attention = attention.SelfAttention(self.width, self.heads, self.dtype)
    self.mlp_norm = layers.LayerNorm(self.dtype)
    self.mlp = layers.MLP(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(self, x, mask=None, dropout_keys=None):
    """x: [batch, length, embed]; mask: bool [batch, 1, length or 1, length].

    `dropout_keys` are `layers.DropoutKeys` of this block, or None where dropout is off.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    keys = [layers.fold(dropout_keys, site) for site in range(2)]
    x = x + self.drop(self.attention(self.attention_norm(x), mask), keys[0])
    x = x + self.drop(self.mlp(self.mlp_norm(x)), keys[1])
    return nn.with_logical_constraint(x, layers.ACTIVATION)


class DecoderBlock(nn.Module):
  """Causal self-attention, cross-attention to the text, MLP. Attributes as EncoderBlock."""

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.attention_norm = layers.LayerNorm(self.dtype)
    self.attention = attention.SelfAttention(self.width, self.heads, self.dtype)
    self.cross_norm = layers.LayerNorm(self.dtype)
    self.cross_attention = attention.CrossAttention(self.width, self.heads, self.dtype)
    self.mlp_norm = layers.LayerNorm(self.dtype)
    self.mlp = layers.MLP(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def _feed_forward(self, x, keys):
    x = x + self.drop(self.mlp(self.mlp_norm(x)), keys)
    return nn.with_logical_constraint(x, layers.ACTIVATION)

  def __call__(self, x, encoded, text_mask, patterns, place=0, dropout_keys=None):
    """All positions at once.

    Args:
      x: [batch, length, embed].
      encoded: [batch, text_length, embed].
      text_mask: bool [batch, 1, 1, text_length].
      patterns: AttentionPatterns of the image tokens.
      place: which of them is this block's, an int or int32 [].
      dropout_keys: as EncoderBlock.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    keys = [layers.fold(dropout_keys, site) for site in range(3)]
    x = x + self.drop(self.attention.in_schedule(self.attention_norm(x), patterns, place), keys[0])
    memory = self.cross_attention.memory(encoded)
    attended = self.cross_attention(self.cross_norm(x), memory, text_mask)
    x = x + self.drop(attended, keys[1])
    return self._feed_forward(x, keys[2])

  def memory(self, encoded):
    """Keys and values of the text: two of [batch, heads, text_length, head_dim]."""
    return tuple(part.swapaxes(1, 2) for part in self.cross_attention.memory(encoded))

  def project(self, x):
    """Self-attention's query, key and value of x [batch, 1, embed], the input of this block."""
    return self.attention.project(self.attention_norm(x))

  def finish(self, x, query, cache, memory, text_mask, position, pattern):
    """The rest of a step, once the cache has the position's key and value.

    Args:
      x: [batch, 1, embed], this block's input.
      query: of `project`.
      cache: see `attention.SelfAttention.attend_step`, as `position` and `pattern`.
      memory: the text's keys and values, of `memory`.
      text_mask: bool [batch, 1, 1, text_length].
      position: see `cache`.
      pattern: see `cache`.

    Returns:
      The output [batch, 1, embed].
    """
    x = x + self.attention.attend_step(query, cache, position, pattern)
    x = x + self.cross_attention.step(self.cross_norm(x), memory, text_mask)
    return self._feed_forward(x, None)

  def step(self, x, cache, memory, text_mask, position, pattern):
    """One position; arguments as `finish`. Returns the output and the cache with it written."""
    query, key, value = self.project(x)
    cache = attention.write_cache(cache, key, value, position, pattern)
    return self.finish(x, query, cache, memory, text_mask, position, pattern), cache


class Encoder(nn.Module):
  """Encoder blocks and a last layer norm.

  Attributes:
    num_layers: number of blocks.
    remat: name in layer_stack.REMAT_POLICIES.
    unroll: how many layers are laid out in one turn of the scan.
    Others as EncoderBlock.
  """

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'everything'
  unroll: int = 1

  def setup(self):
    self.block = EncoderBlock(
      self.width, self.mlp_width, self.heads, self.dropout, self.dtype, parent=None
    )
    self.norm = layers.LayerNorm(self.dtype)

  @nn.compact
  def __call__(self, x, mask=None, dropout_keys=None):
    """x: [batch, length, embed]; mask: bool [batch, 1, length or 1, length]. As x."""
    stacked = self.param('layers', layer_stack.initializer(self.block, self.num_layers, x[:1]))

    def layer(params, place, x, mask, keys):
      del place  # All layers are alike.
      return self.block.apply({'params': params}, x, mask, keys)

    if not self.is_initializing():
      x = layer_stack.run(layer, stacked, x, mask, dropout_keys, self.remat, self.unroll)
    return self.norm(x)


class Decoder(nn.Module):
  """Decoder blocks and a last layer norm.

  Attributes:
    patterns: which image tokens each position sees, in the first layers; the others repeat it.
    Others as Encoder.
  """

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  patterns: tuple[attention_patterns.AttentionPattern, ...]
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'everything'
  unroll: int = 1

  def setup(self):
    self.block = DecoderBlock(
      self.width, self.mlp_width, self.heads, self.dropout, self.dtype, parent=None
    )
    self.norm = layers.LayerNorm(self.dtype)

  @nn.compact
  def __call__(self, x, encoded, text_mask, dropout_keys=None, every=False):
    """All positions at once; arguments as DecoderBlock.

    Returns:
      [batch, length, embed]; or, with `every`, what each layer's output is after the last layer
      norm, [layers, batch, length, embed].
    """
    stacked = self.param(
      'layers',
      layer_stack.initializer(
        self.block, self.num_layers, x[:1], encoded[:1], text_mask[:1], self.patterns
      ),
    )

    def layer(params, place, x, beside, keys):
      return self.block.apply({'params': params}, x, *beside, self.patterns, place, keys)

    if not self.is_initializing():
      x = layer_stack.run(
        layer,
        stacked,
        x,
        (encoded, text_mask),
        dropout_keys,
        self.remat,
        self.unroll,
        every,
        len(self.patterns),
      )
    return self.norm(x)

  def start(self, encoded, layers_apart):
    """What every step needs of the text, computed once for all positions.

    Args:
      encoded: [batch, text_length, embed].
      layers_apart: parameters of each layer, cut out of the stack.

    Returns:
      A list with, for each layer, its memory: the text's keys and values,
      [batch, heads, text_length, head_dim] each.
    """
    return [
      self.block.apply({'params': params}, encoded, method='memory') for params in layers_apart
    ]

  def step(self, x, caches, layers_apart, memories, text_mask, position):
    """One position through all layers.

    Args:
      x: [batch, 1, embed].
      caches: a list with, for each layer, keys and values [batch, heads, slots, head_dim]; how
        many slots and which position is in which is the layer's pattern's matter.
      layers_apart: as `start`.
      memories: of `start`.
      text_mask: bool [batch, 1, 1, text_length].
      position: int32 [].

    Returns:
      The output [batch, 1, embed] and the caches with this position written.
    """
    written = []
    for layer, (cache, params, memory) in enumerate(
      zip(caches, layers_apart, memories, strict=True)
    ):
      x, cache = self.block.apply(
        {'params': params},
        x,
        cache,
        memory,
        text_mask,
        position,
        self._pattern(layer),
        method='step',
      )
      written.append(cache)
    return self.finish(x), written

  def step_until(
    self, x, caches, layers_apart, memories, text_mask, position, leaves, copied=None, entries=None
  ):
    """One position through as many layers as its rows need.

    A row that has left keeps its hidden state, and the keys and values of the layers that it skips
    are made of that, so that later positions find the caches whole (CALM, arXiv 2207.07061, section
    3). Once all rows have left, nothing else of a layer is computed.

    Args:
      x: as `step`, as the next ones up to `position`.
      caches: see `x`.
      layers_apart: see `x`.
      memories: see `x`.
      text_mask: see `x`.
      position: see `x`.
      leaves: (layers passed, x [batch, 1, embed], bool [batch] that have left) -> bool [batch] that
        have left now.
      copied: bool [batch], rows that have left before the first layer, and whose keys and values
        are those of `entries`; None for none.
      entries: for each layer a key and a value, [batch, 1, heads, head_dim] each.

    Returns:
      The output [batch, 1, embed]; the caches with this position written; int32 [batch], the layers
      that each row passed; int32 [], the layers that were computed; this position's `entries`.
    """
    left = jnp.zeros(x.shape[:1], bool) if copied is None else copied
    passed, computed = jnp.zeros(x.shape[:1], jnp.int32), jnp.int32(0)
    written, made = [], []
    for layer, (cache, params, memory) in enumerate(
      zip(caches, layers_apart, memories, strict=True)
    ):
      block, pattern = functools.partial(self.block.apply, {'params': params}), self._pattern(layer)
      left = leaves(layer, x, left)
      project = functools.partial(block, method='project')
      if copied is None:
        query, *entry = project(x)
      else:
        given = entries[layer]
        query, *entry = jax.lax.cond(
          jnp.all(copied), lambda x, given=given: (jnp.zeros_like(given[0]), *given), project, x
        )
        entry = [
          jnp.where(copied[:, None, None, None], there, own) for there, own in zip(given, entry)
        ]
      cache = attention.write_cache(cache, *entry, position, pattern)

      def rest(x, query, cache, memory, block=block, pattern=pattern):
        x = block(x, query, cache, memory, text_mask, position, pattern, method='finish')
        return x, jnp.int32(1)

      # The cache is written outside: a branch that returned it would return a copy.
      after, ran = jax.lax.cond(
        jnp.all(left), lambda x, *_: (x, jnp.int32(0)), rest, x, query, cache, memory
      )
      x = jnp.where(left[:, None, None], x, after)
      passed, computed = passed + ~left, computed + ran
      written.append(cache)
      made.append(tuple(entry))
    return self.finish(x), written, passed, computed, made

  def finish(self, x):
    """The last layer norm, after whichever layer was the last: [batch, length, embed]."""
    return self.norm(x)

  def _pattern(self, layer: int) -> attention_patterns.AttentionPattern:
    return self.patterns[layer % len(self.patterns)]

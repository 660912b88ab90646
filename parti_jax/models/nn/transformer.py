"""Transformer blocks, and stacks of them."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
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


@flax.struct.dataclass
class DecoderState:
  """What a decoder keeps of a text and of the positions so far, between two calls.

  Attributes:
    position: int32 [], how many positions there are, which is the index of the next one.
    caches: for each layer keys and values of its self-attention, [batch, heads, slots, head_dim]
      each; the layer's AttentionPattern says how many slots, and which position is in which.
    texts: for each layer keys and values of its cross-attention to the text,
      [batch, heads, text_length, head_dim] each.
    text_mask: bool [batch, 1, 1, text_length].
  """

  position: jax.Array
  caches: list[tuple[jax.Array, jax.Array]]
  texts: list[tuple[jax.Array, jax.Array]]
  text_mask: jax.Array


class DecoderBlock(nn.Module):
  """Causal self-attention, cross-attention to the text, MLP. Attributes as EncoderBlock."""

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.attention_norm = layers.LayerNorm(self.dtype)
    self.attention = attention.PatternedSelfAttention(self.width, self.heads, self.dtype)
    self.cross_norm = layers.LayerNorm(self.dtype)
    self.cross_attention = attention.CrossAttention(self.width, self.heads, self.dtype)
    self.mlp_norm = layers.LayerNorm(self.dtype)
    self.mlp = layers.MLP(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self,
    x,
    text,
    text_mask,
    patterns,
    index=0,
    dropout_keys=None,
    *,
    cache=None,
    position=None,
    query=None,
  ):
    """Any number of positions: a whole sequence, or with a cache the next ones.

    Args:
      x: [batch, length, embed].
      text: the text encoder's output [batch, text_length, embed], or its `keys_values`.
      text_mask: bool [batch, 1, 1, text_length].
      patterns: AttentionPatterns of the image tokens.
      index: which of them is this block's, an int or, without a cache, int32 [].
      dropout_keys: as EncoderBlock.
      cache: keys and values of the positions before x, see DecoderState; None for a whole sequence.
      position: int32 [], of x's first position, with a cache.
      query: of `project`, where the cache already holds x, a single position.

    Returns:
      [batch, length, embed], and the cache with the positions of x, or None without a cache.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    keys = [layers.fold(dropout_keys, site) for site in range(3)]
    attended, cache = self.attention(
      self.attention_norm(x), patterns, index, cache, position, query
    )
    x = x + self.drop(attended, keys[0])
    x = x + self.drop(self.cross_attention(self.cross_norm(x), text, text_mask), keys[1])
    x = x + self.drop(self.mlp(self.mlp_norm(x)), keys[2])
    return nn.with_logical_constraint(x, layers.ACTIVATION), cache

  def project(self, x):
    """Query, key and value of self-attention, for x [batch, length, embed], this block's input."""
    return self.attention.project(self.attention_norm(x))

  def keys_values(self, encoded):
    """Keys and values of the text: two of [batch, heads, text_length, head_dim]."""
    return tuple(part.swapaxes(1, 2) for part in self.cross_attention.keys_values(encoded))


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

    def layer(params, index, x, mask, keys):
      del index  # All layers are alike.
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
  def __call__(
    self, x, encoded=None, text_mask=None, state=None, dropout_keys=None, all_layers=False
  ):
    """Any number of positions: a whole sequence, or with a state the next ones.

    Args:
      x: [batch, length, embed].
      encoded: [batch, text_length, embed]; not read with a state, which has the text.
      text_mask: bool [batch, 1, 1, text_length], as `encoded`.
      state: DecoderState, of `start` or of the call before; None for a whole sequence.
      dropout_keys: layers.DropoutKeys, or None where dropout is off; without a state.
      all_layers: whether to return the outputs of all layers; without a state.

    Returns:
      [batch, length, embed], or with `all_layers` each layer's output after the last layer norm,
      [layers, batch, length, embed]; and the state with these positions, or None.
    """
    if state is not None:
      if dropout_keys is not None or all_layers:
        raise ValueError('dropout_keys and all_layers are for whole sequences, without a state')
      caches = []
      for layer, params in enumerate(self._layers()):  # One by one: their caches differ in size.
        x, cache = self.block.apply(
          {'params': params},
          x,
          state.texts[layer],
          state.text_mask,
          self.patterns,
          layer % len(self.patterns),
          cache=state.caches[layer],
          position=state.position,
        )
        caches.append(cache)
      return self.norm(x), state.replace(position=state.position + x.shape[1], caches=caches)
    stacked = self.param(
      'layers',
      layer_stack.initializer(
        self.block, self.num_layers, x[:1], encoded[:1], text_mask[:1], self.patterns
      ),
    )

    def layer(params, index, x, text, keys):
      return self.block.apply({'params': params}, x, *text, self.patterns, index, keys)[0]

    if not self.is_initializing():
      x = layer_stack.run(
        layer,
        stacked,
        x,
        (encoded, text_mask),
        dropout_keys,
        self.remat,
        self.unroll,
        all_layers,
        len(self.patterns),
      )
    return self.norm(x), None

  def start(self, encoded, text_mask, length: int) -> DecoderState:
    """The state before the first position.

    Args:
      encoded: [batch, text_length, embed].
      text_mask: bool [batch, 1, 1, text_length].
      length: the caches have slots for this many positions, those that a layer can still see.
    """
    texts = [
      self.block.apply({'params': params}, encoded, method='keys_values')
      for params in self._layers()
    ]
    caches = []
    for layer in range(self.num_layers):
      slots = self.patterns[layer % len(self.patterns)].slots(length)
      shape = (encoded.shape[0], self.heads, slots, self.width // self.heads)
      zeros = nn.with_logical_constraint(
        jnp.zeros(shape, self.dtype),
        ('activation_batch', 'activation_heads', 'activation_length', None),
      )
      caches.append((zeros, zeros))
    return DecoderState(jnp.int32(0), caches, texts, text_mask)

  def _layers(self) -> list:
    """Parameters of each layer."""
    return layer_stack.unstacked(self.get_variable('params', 'layers'), self.num_layers)

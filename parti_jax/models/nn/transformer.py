"""Transformer blocks, and stacks of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PyTree

from parti_jax.models.nn import attention
from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import block_options
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.models.nn import quantization

# Keys and values of one layer's cross-attention to the text, with heads before positions.
_OfText = Float[Array, 'batch kv_heads text_length head_dim'] | quantization.QuantizedVectors
TextKeysValues = tuple[_OfText, _OfText]

# Keys and values of some positions in one layer's self-attention.
Entry = tuple[
  Float[Array, 'batch length kv_heads head_dim'], Float[Array, 'batch length kv_heads head_dim']
]

# Logical axes of the keys and values of a cache; their scales in int8 lack the last one.
_CACHE_AXES = ('activation_batch', 'activation_heads', 'activation_length', None)


class EncoderBlock(nn.Module):
  """Self-attention and MLP, each with a norm before it and a residual connection.

  Attributes:
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    heads: number of attention heads.
    dropout: dropout rate at the outputs of attention and MLP.
    dtype: dtype of the computation.
    options: what the block consists of.
  """

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    self.attention_norm = self.options.make_norm(self.dtype)
    self.attention = attention.SelfAttention(self.width, self.heads, self.dtype, self.options)
    self.attention_out_norm = self.options.make_norm_after_attention(self.dtype)
    self.mlp_norm = self.options.make_norm(self.dtype)
    self.mlp = self.options.make_mlp(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, '#batch 1 #length length'] | None = None,
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Computes the block.

    Args:
      x: input of the block.
      mask: True where a position may attend to another one; None if it may attend to all.
      dropout_keys: keys of this block; None if dropout is off.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    keys = [layers.fold(dropout_keys, site) for site in range(2)]
    attended = _normed(self.attention_out_norm, self.attention(self.attention_norm(x), mask))
    x = x + self.drop(attended, keys[0])
    x = x + self.drop(self.mlp(self.mlp_norm(x)), keys[1])
    return nn.with_logical_constraint(x, layers.ACTIVATION)


class DecoderState(flax.struct.PyTreeNode):
  """What a decoder keeps between two calls: a text, and the keys and values of earlier positions.

  Attributes:
    position: number of positions so far, which is the index of the next one; a number for each row
      if rows have different numbers. `Decoder` then decodes one position at a time; `look_ahead` and
      `advanced` support several.
    caches: for each layer, keys and values of its self-attention. The layer's AttentionPattern
      defines the number of slots, and which slot holds which position.
    texts: for each layer, keys and values of its cross-attention to the text; or of its
      self-attention, of a text that comes before the first position. None if there is none.
    text_mask: True where a text token may be attended to.
    start: the input of the first position, if the text determines it; None if it is always the same.
  """

  position: Int[Array, ''] | Int[Array, 'batch']
  caches: list[attention_cache.KeysValues]
  texts: list[TextKeysValues | None]
  text_mask: Bool[Array, 'batch 1 1 text_length']
  start: Float[Array, 'batch embed'] | None = None

  @property
  def of_texts(self) -> dict[str, Any]:
    """The fields that depend on the texts alone and never change, by their names."""
    return {name: getattr(self, name) for name in ('texts', 'text_mask', 'start')}

  def advanced(
    self,
    entries: list[Entry],
    count: Int[Array, 'batch'],
    patterns: Sequence[attention_patterns.AttentionPattern],
  ) -> DecoderState:
    """Returns the state with some of the positions of `Decoder.look_ahead`.

    Args:
      entries: keys and values of the positions, the result of `look_ahead`.
      count: number of positions to add to each row.
      patterns: attention patterns of the first layers; the other layers repeat them.
    """
    caches = [
      attention_cache.write_counted(
        cache, *entry, self.position, count, patterns[index % len(patterns)]
      )
      for index, (cache, entry) in enumerate(zip(self.caches, entries))
    ]
    return self.replace(position=self.position + count, caches=caches)


class DecoderBlock(nn.Module):
  """Causal self-attention, cross-attention to the text, and MLP.

  Without cross-attention (`BlockOptions.cross_attention`), self-attention attends to the text, which
  comes before the image tokens. The attributes are those of EncoderBlock.
  """

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    self.attention_norm = self.options.make_norm(self.dtype)
    sizes = self.width, self.heads, self.dtype, self.options
    self.attention = attention.PatternedSelfAttention(*sizes)
    self.attention_out_norm = self.options.make_norm_after_attention(self.dtype)
    if self.options.cross_attention:
      self.cross_norm = self.options.make_norm(self.dtype)
      self.cross_attention = attention.CrossAttention(*sizes)
      self.cross_out_norm = self.options.make_norm_after_attention(self.dtype)
    self.mlp_norm = self.options.make_norm(self.dtype)
    self.mlp = self.options.make_mlp(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    text: Float[Array, 'batch text_length features'] | TextKeysValues | None,
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    patterns: Sequence[attention_patterns.AttentionPattern],
    pattern_index: int | Int[Array, ''] = 0,
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Computes a whole sequence.

    Args:
      x: input of the block. Without cross-attention it begins with the text.
      text: the output of the text encoder, or the result of `keys_values`; None without
        cross-attention.
      text_mask: True where a text token may be attended to.
      patterns: attention patterns of the image tokens.
      pattern_index: which pattern this block uses.
      dropout_keys: keys of this block; None if dropout is off.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    prefix_mask = None if self.options.cross_attention else text_mask
    attended = self.attention(self.attention_norm(x), patterns, pattern_index, prefix_mask)
    return self._after_self_attention(x, attended, text, text_mask, dropout_keys)

  def decode(
    self,
    x: Float[Array, 'batch length embed'],
    text: TextKeysValues | None,
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    cache: attention_cache.KeysValues,
    position: Int[Array, ''] | Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
  ) -> tuple[Float[Array, 'batch length embed'], attention_cache.KeysValues]:
    """Computes the next positions.

    Args:
      x: input of the block.
      text: the result of `keys_values`, or of `prefill` without cross-attention.
      text_mask: True where a text token may be attended to.
      cache: keys and values of the positions before x.
      position: the first position of x, in all rows or, if x has a single one, in each.
      pattern: attention pattern of this block.

    Returns:
      The output, and the cache with the positions of x.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    attended, cache = self.attention.decode(
      self.attention_norm(x), cache, position, pattern, self._prefix(text, text_mask)
    )
    return self._after_self_attention(x, attended, text, text_mask), cache

  def decode_from_cache(
    self,
    x: Float[Array, 'batch 1 embed'],
    text: TextKeysValues | None,
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    cache: attention_cache.KeysValues,
    position: Int[Array, ''] | Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
    query: Float[Array, 'batch 1 heads head_dim'],
  ) -> Float[Array, 'batch 1 embed']:
    """Computes a single position that the cache already holds.

    The arguments are those of `decode`, and the query of `project`.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    prefix = self._prefix(text, text_mask)
    attended = self.attention.attend_from_cache(query, cache, position, pattern, prefix)
    return self._after_self_attention(x, attended, text, text_mask)

  def decode_ahead(
    self,
    x: Float[Array, 'batch length embed'],
    text: TextKeysValues | None,
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    cache: attention_cache.KeysValues,
    position: Int[Array, 'batch'],
    pattern: attention_patterns.AttentionPattern,
    query: Float[Array, 'batch length heads head_dim'],
    entry: Entry,
  ) -> Float[Array, 'batch length embed']:
    """Computes the next positions of each row, which are not written into the cache.

    The arguments are those of `decode`, with a first position for each row, and the query and the
    entry of `project`.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    prefix = self._prefix(text, text_mask)
    attended = self.attention.attend_ahead(query, *entry, cache, position, pattern, prefix)
    return self._after_self_attention(x, attended, text, text_mask)

  def _after_self_attention(
    self,
    x: Float[Array, 'batch length embed'],
    attended: Float[Array, 'batch length embed'],
    text: Float[Array, 'batch text_length features'] | TextKeysValues | None,
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Computes what follows self-attention: the residual connection, cross-attention and MLP."""
    keys = [layers.fold(dropout_keys, site) for site in range(3)]
    x = x + self.drop(_normed(self.attention_out_norm, attended), keys[0])
    if self.options.cross_attention:
      assert text is not None
      attended = self.cross_attention(self.cross_norm(x), text, text_mask)
      x = x + self.drop(_normed(self.cross_out_norm, attended), keys[1])
    x = x + self.drop(self.mlp(self.mlp_norm(x)), keys[2])
    return nn.with_logical_constraint(x, layers.ACTIVATION)

  def project(
    self,
    x: Float[Array, 'batch length embed'],
    position: Int[Array, ''] | Int[Array, 'batch'],
  ) -> tuple[
    Float[Array, 'batch length heads head_dim'],
    Float[Array, 'batch length kv_heads head_dim'],
    Float[Array, 'batch length kv_heads head_dim'],
  ]:
    """Returns query, key and value of self-attention for the block's input x.

    Args:
      x: input of the block.
      position: the first position of x, in all rows or in each.
    """
    return self.attention.project(self.attention_norm(x), position)

  def _prefix(
    self, text: TextKeysValues | None, text_mask: Bool[Array, 'batch 1 1 text_length']
  ) -> Sequence[attention_cache.Part]:
    """Returns what self-attention attends to besides image tokens."""
    return () if self.options.cross_attention or text is None else ((*text, text_mask),)

  def prefill(
    self,
    x: Float[Array, 'batch text_length embed'],
    text_mask: Bool[Array, 'batch 1 1 text_length'],
  ) -> tuple[Float[Array, 'batch text_length embed'], TextKeysValues]:
    """Computes the text that comes before the image tokens, without cross-attention.

    Args:
      x: input of the block.
      text_mask: True where it may be attended to.

    Returns:
      The output, and keys and values of self-attention.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    attended, key, value = self.attention.prefill(self.attention_norm(x), text_mask)
    x = self._after_self_attention(x, attended, None, text_mask)
    return x, (key.swapaxes(1, 2), value.swapaxes(1, 2))

  def keys_values(self, encoded: Float[Array, 'batch text_length features']) -> TextKeysValues:
    """Returns keys and values of cross-attention to the text."""
    key, value = self.cross_attention.keys_values(encoded)
    return key.swapaxes(1, 2), value.swapaxes(1, 2)


class Encoder(nn.Module):
  """Encoder blocks and a final norm.

  Attributes:
    num_layers: number of blocks.
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    heads: number of attention heads.
    dropout: dropout rate at the outputs of attention and MLP.
    dtype: dtype of the computation.
    remat: name in layer_stack.REMAT_POLICIES.
    unroll: number of layers that each iteration of the scan computes.
    options: what the blocks consist of.
  """

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'everything'
  unroll: int = 1
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    self.block = EncoderBlock(
      self.width, self.mlp_width, self.heads, self.dropout, self.dtype, self.options, parent=None
    )
    self.norm = self.options.make_norm(self.dtype)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, 'batch 1 #length length'] | None = None,
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    """Encodes sequences; the arguments are those of EncoderBlock, with keys of the whole stack."""
    stacked = layer_stack.parameters(self, self.block, self.num_layers, x[:1])

    def layer(params, pattern_index, x, mask, keys):
      del pattern_index  # All layers are alike.
      return _apply(self.block, params, x, mask, keys)

    if not self.is_initializing():
      stack = layer_stack.LayerStack(layer, self.remat, self.unroll)
      x = stack.run(stacked, x, mask, dropout_keys)
    return self.norm(x)


class Decoder(nn.Module):
  """Decoder blocks and a final norm.

  Attributes:
    num_layers: number of blocks.
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    heads: number of attention heads.
    patterns: attention patterns of the first layers; the other layers repeat them.
    dropout: dropout rate at the outputs of attention and MLP.
    dtype: dtype of the computation.
    remat: name in layer_stack.REMAT_POLICIES.
    unroll: number of layers that each iteration of the scan computes.
    options: what the blocks consist of.
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
  options: block_options.BlockOptions = block_options.BlockOptions()

  def setup(self):
    self.block = DecoderBlock(
      self.width, self.mlp_width, self.heads, self.dropout, self.dtype, self.options, parent=None
    )
    self.norm = self.options.make_norm(self.dtype)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    encoded: Float[Array, 'batch text_length features'] | None = None,
    text_mask: Bool[Array, 'batch 1 1 text_length'] | None = None,
    state: DecoderState | None = None,
    dropout_keys: layers.DropoutKeys | None = None,
    all_layers: bool = False,
  ) -> tuple[Float[Array, '*layers batch length embed'], DecoderState | None]:
    """Decodes a whole sequence, or with a state the next positions.

    Args:
      x: input of the first layer. A whole sequence begins with the text if the blocks have no
        cross-attention, and so does the result.
      encoded: the output of the text encoder; not used with a state, which holds the text, and
        without cross-attention.
      text_mask: True where a text token may be attended to; not used with a state.
      state: the result of `init_state` or of the previous call; None for a whole sequence.
      dropout_keys: keys of the decoder, or None if dropout is off; without a state.
      all_layers: whether to return the outputs of all layers; without a state.

    Returns:
      The output of the last layer. With `all_layers` the outputs of all layers, with a leading
      axis of layers. The final norm is applied to each.
      The state with these positions, or None for a whole sequence.
    """
    if state is not None:
      if dropout_keys is not None or all_layers:
        raise ValueError('dropout_keys and all_layers are for whole sequences, without a state')
      caches = []
      for index, params in enumerate(self._layers()):  # No scan: the caches differ in size.
        x, cache = _apply(
          self.block,
          params,
          x,
          state.texts[index],
          state.text_mask,
          state.caches[index],
          state.position,
          self.patterns[index % len(self.patterns)],
          method='decode',
        )
        caches.append(cache)
      return self.norm(x), state.replace(position=state.position + x.shape[1], caches=caches)
    assert text_mask is not None and (encoded is not None) == self.options.cross_attention
    first = None if encoded is None else encoded[:1]
    inputs = x[:1], first, text_mask[:1], self.patterns
    stacked = layer_stack.parameters(self, self.block, self.num_layers, *inputs)

    def layer(params, pattern_index, x, text, keys):
      return _apply(self.block, params, x, *text, self.patterns, pattern_index, keys)

    if not self.is_initializing():
      stack = layer_stack.LayerStack(layer, self.remat, self.unroll, len(self.patterns))
      x = stack.run(stacked, x, (encoded, text_mask), dropout_keys, all_layers)
    return self.norm(x), None

  def look_ahead(
    self, x: Float[Array, 'batch length embed'], state: DecoderState
  ) -> tuple[Float[Array, 'batch length embed'], list[Entry]]:
    """Decodes the next positions, of which the caller chooses how many each row keeps.

    Args:
      x: input of the first layer, at the next positions of each row.
      state: the state before these positions, with a position for each row.

    Returns:
      The output of the last layer after the final norm, and the keys and values of the
      positions in each layer, for `DecoderState.advanced`.
    """
    entries = []
    for index, params in enumerate(self._layers()):
      query, *entry = _apply(self.block, params, x, state.position, method='project')
      x = _apply(
        self.block,
        params,
        x,
        state.texts[index],
        state.text_mask,
        state.caches[index],
        state.position,
        self.patterns[index % len(self.patterns)],
        query,
        tuple(entry),
        method='decode_ahead',
      )
      entries.append(tuple(entry))
    return self.norm(x), entries

  def init_state(
    self,
    encoded: Float[Array, 'batch text_length features'],
    text_mask: Bool[Array, 'batch 1 1 text_length'],
    length: int,
    int8_cache: bool = False,
  ) -> DecoderState:
    """Returns the state before the first position.

    Args:
      encoded: the output of the text encoder; without cross-attention, the first layer's input at the
        text that comes before the first position.
      text_mask: True where a text token may be attended to.
      length: number of positions to decode. The cache of a layer has slots for those that later
        positions attend to.
      int8_cache: whether to hold the keys and values of the text and of positions in int8.
    """
    texts = self._texts(encoded, text_mask)
    if int8_cache:
      texts = [jax.tree.map(quantization.quantize_vectors, text) for text in texts]
    kv_heads = self.heads if self.options.kv_heads is None else self.options.kv_heads
    caches: list[attention_cache.KeysValues] = []
    for index in range(self.num_layers):
      num_slots = self.patterns[index % len(self.patterns)].num_slots(length)
      shape = (encoded.shape[0], kv_heads, num_slots, self.width // self.heads)
      empty: Any = _empty_int8(shape) if int8_cache else _zeros(shape, self.dtype)
      caches.append((empty, empty))
    return DecoderState(jnp.int32(0), caches, texts, text_mask)

  def _texts(
    self,
    encoded: Float[Array, 'batch text_length features'],
    text_mask: Bool[Array, 'batch 1 1 text_length'],
  ) -> list[TextKeysValues | None]:
    """Returns `DecoderState.texts`; the arguments are those of `init_state`."""
    if self.options.cross_attention:
      return [
        _apply(self.block, params, encoded, method='keys_values') for params in self._layers()
      ]
    texts: list[TextKeysValues | None] = []
    for params in self._layers():
      text = None
      if encoded.shape[1]:
        encoded, text = _apply(self.block, params, encoded, text_mask, method='prefill')
      texts.append(text)
    return texts

  def _layers(self) -> list[PyTree]:
    """Returns the parameters of each layer."""
    return layer_stack.unstacked(self.get_variable('params', 'layers'), self.num_layers)


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  """Returns zeros of a cache, with its logical axes."""
  return nn.with_logical_constraint(jnp.zeros(shape, dtype), _CACHE_AXES[: len(shape)])


def _empty_int8(shape: tuple[int, ...]) -> quantization.QuantizedVectors:
  return quantization.QuantizedVectors(
    _zeros(shape, jnp.dtype(jnp.int8)), _zeros(shape[:-1], jnp.dtype(jnp.float32))
  )


def _normed(
  norm: nn.Module | None, x: Float[Array, 'batch length embed']
) -> Float[Array, 'batch length embed']:
  """Applies a norm, if there is one."""
  return x if norm is None else norm(x)


def _apply(block: nn.Module, params: PyTree, *args, **kwargs) -> Any:
  """Applies a block with the parameters of one layer."""
  return block.apply({'params': params}, *args, **kwargs)

"""The image-token decoder (Parti, section 2.2): the next image token from text and earlier ones."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.models import layers
from parti_jax.models import parti_config
from parti_jax.models import transformer


class ImageDecoder(nn.Module):
  """A causal Transformer over image tokens in raster order, with cross-attention to the text.

  The input at a position is the token before it; at the first one it is a learned vector, so
  that the table of tokens holds exactly the codebook and can be split evenly.

  Attributes:
    config: widths and depths.
  """

  config: parti_config.PartiConfig

  def setup(self):
    config = self.config
    rows, columns = config.grid
    self.token_embedding = layers.Embedding(config.codebook_size, config.width)
    self.begin = self.param(
        'begin', nn.with_logical_partitioning(nn.initializers.normal(0.02), ('norm',)),
        (config.width,))
    self.row_embedding = layers.Embedding(rows, config.width, ('position', 'embed'))
    self.column_embedding = layers.Embedding(columns, config.width, ('position', 'embed'))
    self.decoder = transformer.Decoder(
        config.decoder_layers, config.width, config.mlp_width, config.heads, config.patterns,
        config.dropout, config.compute_dtype, config.remat, config.unroll)
    self.logits = layers.Projection((config.codebook_size,), 1, ('embed', 'vocab'))
    self.drop = layers.Dropout(config.dropout)

  def _positions(self, positions):
    columns = self.config.grid[1]
    return self.row_embedding(positions // columns) + self.column_embedding(positions % columns)

  def predict(self, x):
    """float32 logits [..., length, codebook_size] of outputs of `states`."""
    logits = self.logits(x.astype(jnp.float32))
    return nn.with_logical_constraint(
        logits, ('activation_batch', 'activation_length', 'activation_vocab'))

  def __call__(self, image_tokens, encoded, text_mask, dropout_keys=None):
    """Logits of every image token given those before it.

    Args:
      image_tokens: int32 [batch, image_length]; the last one is not looked at.
      encoded: [batch, text_length, embed], the text encoder's output.
      text_mask: bool [batch, 1, 1, text_length].
      dropout_keys: layers.DropoutKeys of the decoder, or None where dropout is off.

    Returns:
      float32 [batch, image_length, codebook_size]; entry i predicts image_tokens[:, i].
    """
    return self.predict(self.states(image_tokens, encoded, text_mask, dropout_keys))

  def states(self, image_tokens, encoded, text_mask, dropout_keys=None, every=False):
    """What `predict` makes logits of; arguments as `__call__`.

    Returns:
      [batch, image_length, embed] of the last layer, or, with `every`, of each layer
      [layers, batch, image_length, embed].
    """
    batch, length = image_tokens.shape
    begin = jnp.broadcast_to(self.begin, (batch, 1, self.config.width))
    x = jnp.concatenate([begin, self.token_embedding(image_tokens[:, :-1])], axis=1)
    x = x + self._positions(jnp.arange(length))
    x = self.drop(x.astype(self.config.compute_dtype), layers.fold(dropout_keys, 0))
    return self.decoder(x, encoded, text_mask, layers.fold(dropout_keys, 1), every)

  def start(self, encoded, layers_apart):
    """What every step needs of the text, computed once, as `transformer.Decoder.start`."""
    return self.decoder.start(encoded, layers_apart)

  def step(self, previous_token, caches, layers_apart, memories, text_mask, position):
    """Logits of one position, with a cache of the earlier ones.

    Args:
      previous_token: int32 [batch], the token before this position; ignored at position 0.
      caches: of `empty_caches` or of the step before.
      layers_apart: parameters of each layer, cut out of the stack.
      memories: of `start`.
      text_mask: bool [batch, 1, 1, text_length].
      position: int32 [].

    Returns:
      float32 logits [batch, codebook_size] and the caches with this position written.
    """
    x = self.embed_step(previous_token, position)
    x, caches = self.decoder.step(x, caches, layers_apart, memories, text_mask, position)
    return self.predict(x)[:, 0], caches

  # The parts of `step`, for decoding that does not send every position through all layers.

  def embed_step(self, previous_token, position):
    """The first layer's input, [batch, 1, embed]; arguments as `step`."""
    x = jnp.where(position == 0, self.begin, self.token_embedding(previous_token))
    return (x + self._positions(position))[:, None].astype(self.config.compute_dtype)

  def step_layer(self, layer: int, x, cache, params, memory, text_mask, position):
    """One layer's step, as `transformer.Decoder.step_layer`."""
    return self.decoder.step_layer(layer, x, cache, params, memory, text_mask, position)

  def write_layer(self, layer: int, x, cache, params, position):
    """A skipped layer's keys and values, as `transformer.Decoder.write_layer`."""
    return self.decoder.write_layer(layer, x, cache, params, position)

  def step_logits(self, x):
    """float32 logits [batch, codebook_size] of a layer's output [batch, 1, embed]."""
    return self._logits(self.decoder.finish(x))[:, 0]

  def empty_caches(self, batch: int, length: int):
    """Caches of no position, for the first `length` of them.

    Returns:
      A list with, for each layer, keys and values [batch, heads, slots, head_dim], with the slots
      that the layer's pattern needs.
    """
    config, caches = self.config, []
    for layer in range(config.decoder_layers):
      slots = config.layer_pattern(layer).slots(length)
      zeros = nn.with_logical_constraint(
          jnp.zeros((batch, config.heads, slots, config.width // config.heads),
                    config.compute_dtype),
          ('activation_batch', 'activation_heads', 'activation_length', None))
      caches.append((zeros, zeros))
    return caches

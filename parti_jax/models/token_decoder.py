"""The image-token decoder (Parti, section 2.2): the next image token from text and earlier ones."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import early_exit
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


class TokenDecoder(nn.Module):
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
      'begin',
      nn.with_logical_partitioning(nn.initializers.normal(0.02), ('norm',)),
      (config.width,),
    )
    self.row_embedding = layers.Embedding(rows, config.width, ('position', 'embed'))
    self.column_embedding = layers.Embedding(columns, config.width, ('position', 'embed'))
    self.decoder = transformer.Decoder(
      config.decoder_layers,
      config.width,
      config.mlp_width,
      config.heads,
      config.patterns,
      config.dropout,
      config.compute_dtype,
      config.remat,
      config.unroll,
    )
    self.logits = layers.Projection((config.codebook_size,), 1, ('embed', 'vocab'))
    self.drop = layers.Dropout(config.dropout)

  def _positions(self, positions):
    columns = self.config.grid[1]
    return self.row_embedding(positions // columns) + self.column_embedding(positions % columns)

  def predict(self, x):
    """float32 logits [..., length, codebook_size] of outputs of `states`."""
    logits = self.logits(x.astype(jnp.float32))
    return nn.with_logical_constraint(
      logits, ('activation_batch', 'activation_length', 'activation_vocab')
    )

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
    x = self._embed_step(previous_token, position)
    x, caches = self.decoder.step(x, caches, layers_apart, memories, text_mask, position)
    return self.predict(x)[:, 0], caches

  def step_until(
    self,
    previous_token,
    caches,
    layers_apart,
    memories,
    text_mask,
    position,
    exit_threshold=None,
    rows: int = 1,
  ):
    """`step` in which tokens leave after the first layer that predicts them with confidence.

    Args:
      previous_token: as `step`, as the next ones up to `position`.
      caches: see `previous_token`.
      layers_apart: see `previous_token`.
      memories: see `previous_token`.
      text_mask: see `previous_token`.
      position: see `previous_token`.
      exit_threshold: float32 [], `early_exit.confidence` of a layer's prediction from which on a
        token leaves; None for none that do.
      rows: rows of an image, which leave together, by the confidence of the first of them.

    Returns:
      As `step`, and what `transformer.Decoder.step_until` counts: the layers passed int32 [batch],
      those computed int32 [], and this position's keys and values in each layer.
    """

    def sure(decoder, x):
      logits = decoder.predict(decoder.decoder.finish(x[::rows]))[:, 0]
      return jnp.repeat(early_exit.confidence(logits) >= exit_threshold, rows)

    def leaves(layer, x, left):
      if exit_threshold is None or layer == 0:
        return left
      everyone = lambda decoder, x: jnp.ones_like(left)
      return left | nn.cond(jnp.all(left), everyone, sure, self, x)

    x = self._embed_step(previous_token, position)
    x, caches, *counts = self.decoder.step_until(
      x, caches, layers_apart, memories, text_mask, position, leaves
    )
    return self.predict(x)[:, 0], caches, *counts

  def step_beside(
    self,
    previous_token,
    caches,
    layers_apart,
    memories,
    text_mask,
    position,
    passed,
    copied,
    entries,
  ):
    """`step` of guidance's pass without text, after that with text.

    Args:
      previous_token: as `step`, as the next ones up to `position`.
      caches: see `previous_token`.
      layers_apart: see `previous_token`.
      memories: see `previous_token`.
      text_mask: see `previous_token`.
      position: see `previous_token`.
      passed: int32 [batch], the layers that each token passed in the pass with text; here too it
        leaves after these.
      copied: bool [batch], tokens that do without this pass; their logits mean nothing.
      entries: keys and values of the pass with text, which the caches get for these.

    Returns:
      As `step`, and the layers that were computed, int32 [].
    """
    leaves = lambda layer, x, left: copied | (passed <= layer)
    x = self._embed_step(previous_token, position)
    x, caches, _, computed, _ = self.decoder.step_until(
      x, caches, layers_apart, memories, text_mask, position, leaves, copied, entries
    )
    nothing = lambda decoder, x: jnp.zeros(x.shape[:1] + (self.config.codebook_size,), jnp.float32)
    logits = nn.cond(jnp.all(copied), nothing, lambda decoder, x: decoder.predict(x)[:, 0], self, x)
    return logits, caches, computed

  def _embed_step(self, previous_token, position):
    """The first layer's input, [batch, 1, embed]; arguments as `step`."""
    x = jnp.where(position == 0, self.begin, self.token_embedding(previous_token))
    return (x + self._positions(position))[:, None].astype(self.config.compute_dtype)

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
        jnp.zeros((batch, config.heads, slots, config.width // config.heads), config.compute_dtype),
        ('activation_batch', 'activation_heads', 'activation_length', None),
      )
      caches.append((zeros, zeros))
    return caches

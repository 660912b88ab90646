"""The image-token decoder (Parti, section 2.2): the next image token from text and earlier ones."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

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

  def __call__(self, previous, encoded=None, text_mask=None, state=None, dropout_keys=None):
    """Logits of any number of positions: of a whole sequence, or with a state of the next ones.

    Args:
      previous: int32 [batch, length], the token before each position; at position 0 it is not read.
        See `shifted`.
      encoded: [batch, text_length, embed], the text encoder's output; not read with a state, which
        has the text.
      text_mask: bool [batch, 1, 1, text_length], as `encoded`.
      state: transformer.DecoderState of the positions before; None for a whole sequence.
      dropout_keys: layers.DropoutKeys of the decoder, or None where dropout is off.

    Returns:
      float32 [batch, length, codebook_size], and the state with these positions, or None.
    """
    position = 0 if state is None else state.position
    x = self.embed(previous, position, layers.fold(dropout_keys, 0))
    x, state = self.decoder(x, encoded, text_mask, state, layers.fold(dropout_keys, 1))
    return self.predict(x), state

  def states(self, previous, encoded, text_mask, dropout_keys=None):
    """What each layer predicts a whole sequence from; arguments as `__call__`.

    Returns:
      [layers, batch, length, embed]; `predict` of the last gives the logits of `__call__`.
    """
    x = self.embed(previous, 0, layers.fold(dropout_keys, 0))
    keys = layers.fold(dropout_keys, 1)
    return self.decoder(x, encoded, text_mask, dropout_keys=keys, all_layers=True)[0]

  def embed(self, previous, position, dropout_keys=None):
    """The first layer's input, [batch, length, embed].

    Args:
      previous: as `__call__`.
      position: int32 [], of the first of them.
      dropout_keys: layers.DropoutKeys of this input, or None where dropout is off.
    """
    positions = position + jnp.arange(previous.shape[1])
    columns = self.config.grid[1]
    x = jnp.where((positions == 0)[:, None], self.begin, self.token_embedding(previous))
    x = x + (self.row_embedding(positions // columns) + self.column_embedding(positions % columns))
    return self.drop(x.astype(self.config.compute_dtype), dropout_keys)

  def predict(self, x):
    """float32 logits [..., length, codebook_size] of outputs of `states`."""
    logits = self.logits(x.astype(jnp.float32))
    return nn.with_logical_constraint(
      logits, ('activation_batch', 'activation_length', 'activation_vocab')
    )


def shifted(image_tokens):
  """The token before each position, int32 [batch, length]; before the first, 0."""
  return jnp.pad(image_tokens[:, :-1], ((0, 0), (1, 0)))

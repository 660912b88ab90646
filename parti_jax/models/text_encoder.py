"""The text encoder (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import layers
from parti_jax.models import parti_config
from parti_jax.models import transformer


def text_mask(text_tokens):
  """Which text tokens are not padding (id 0).

  Args:
    text_tokens: int32 [batch, text_length].

  Returns:
    bool [batch, 1, 1, text_length], True where a token may be looked at.
  """
  return (text_tokens > 0)[:, None, None, :]


class TextEncoder(nn.Module):
  """A bidirectional Transformer over SentencePiece tokens.

  Attributes:
    config: widths and depths.
  """

  config: parti_config.PartiConfig

  def setup(self):
    config = self.config
    self.token_embedding = layers.Embedding(config.text_vocabulary, config.width)
    self.position_embedding = layers.Embedding(
        config.text_length, config.width, ('position', 'embed'))
    self.encoder = transformer.Encoder(
        config.encoder_layers, config.width, config.mlp_width, config.heads, config.dropout,
        config.compute_dtype, config.remat, config.unroll)
    self.drop = layers.Dropout(config.dropout)

  def __call__(self, text_tokens, dropout_keys=None):
    """Encodes text.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0.
      dropout_keys: layers.DropoutKeys of the encoder, or None where dropout is off.

    Returns:
      config.compute_dtype [batch, text_length, embed].
    """
    positions = jnp.arange(text_tokens.shape[1])
    x = self.token_embedding(text_tokens) + self.position_embedding(positions)
    x = self.drop(x.astype(self.config.compute_dtype), layers.fold(dropout_keys, 0))
    return self.encoder(x, text_mask(text_tokens), layers.fold(dropout_keys, 1))

"""The text encoder (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


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
      config.text_length, config.width, ('position', 'embed')
    )
    self.encoder = transformer.Encoder(
      config.encoder_layers,
      config.width,
      config.mlp_width,
      config.heads,
      config.dropout,
      config.compute_dtype,
      config.remat,
      config.unroll,
    )
    self.drop = layers.Dropout(config.dropout)

  def __call__(self, text_tokens, dropout_keys=None, masked=None):
    """Encodes text.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0.
      dropout_keys: layers.DropoutKeys of the encoder, or None where dropout is off.
      masked: for masked language modelling, where pieces are hidden, bool [batch, text_length],
        and the vector that stands for them, float32 [embed]; None for nowhere.

    Returns:
      config.compute_dtype [batch, text_length, embed].
    """
    pieces = self.token_embedding(text_tokens)
    if masked is not None:
      hidden, vector = masked
      pieces = jnp.where(hidden[..., None], vector, pieces)
    x = pieces + self.position_embedding(jnp.arange(text_tokens.shape[1]))
    x = self.drop(x.astype(self.config.compute_dtype), layers.fold(dropout_keys, 0))
    return self.encoder(x, text_mask(text_tokens), layers.fold(dropout_keys, 1))

  def piece_logits(self, x):
    """Products with the table of pieces: [..., embed] to float32 [..., text_vocabulary]."""
    return self.token_embedding.attend(x)

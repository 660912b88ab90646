"""Parti: the text encoder and the image-token decoder together (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import parti_config
from parti_jax.models import text_encoder
from parti_jax.models import token_decoder
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


class Parti(nn.Module):
  """Image-token logits from text and earlier image tokens.

  Attributes:
    config: widths and depths.
  """

  config: parti_config.PartiConfig

  def setup(self):
    self.text_encoder = text_encoder.TextEncoder(self.config)
    self.image_decoder = token_decoder.TokenDecoder(self.config)

  def __call__(self, text_tokens, image_tokens, dropout_keys=None):
    """Logits of every image token, given the text and the tokens before it.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0.
      image_tokens: int32 [batch, image_length], each in [0, codebook_size); the last one is not
        read.
      dropout_keys: layers.DropoutKeys of this batch, or None where dropout is off.

    Returns:
      float32 [batch, image_length, codebook_size]; entry i predicts image_tokens[:, i].
    """
    inputs, keys = self._decoder_inputs(text_tokens, image_tokens, dropout_keys)
    return self.image_decoder(*inputs, dropout_keys=keys)[0]

  def states(self, text_tokens, image_tokens, dropout_keys=None):
    """What each decoder layer predicts from, for losses over depth; arguments as `__call__`.

    Returns:
      [layers, batch, image_length, embed]; `predict` of the last is the result of `__call__`.
    """
    inputs, keys = self._decoder_inputs(text_tokens, image_tokens, dropout_keys)
    return self.image_decoder.states(*inputs, dropout_keys=keys)

  def _decoder_inputs(self, text_tokens, image_tokens, dropout_keys):
    encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    inputs = token_decoder.shifted(image_tokens), encoded, text_encoder.text_mask(text_tokens)
    return inputs, layers.fold(dropout_keys, 1)

  def predict(self, states):
    """Logits of one layer of `states`: float32 [batch, image_length, codebook_size]."""
    return self.image_decoder.predict(states)

  def start(self, text_tokens, length: int | None = None) -> transformer.DecoderState:
    """Encodes texts for sampling, which goes on with `token_decoder.TokenDecoder` alone.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0.
      length: the caches have room for this many positions; by default for all.

    Returns:
      The decoder's state before the first image token.
    """
    return self.image_decoder.decoder.start(
      self.text_encoder(text_tokens),
      text_encoder.text_mask(text_tokens),
      self.config.image_length if length is None else length,
    )


def example_inputs(config: parti_config.PartiConfig, batch: int = 1):
  """Arrays of the shapes and dtypes that `Parti.__call__` takes, for initialisation."""
  return (
    jnp.ones((batch, config.text_length), jnp.int32),
    jnp.zeros((batch, config.image_length), jnp.int32),
  )

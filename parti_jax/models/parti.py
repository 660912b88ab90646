"""Parti: the text encoder and the image-token decoder together (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import parti_config
from parti_jax.models import text_encoder
from parti_jax.models import token_decoder
from parti_jax.models.nn import layers


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
      image_tokens: int32 [batch, image_length], each in [0, codebook_size).
      dropout_keys: layers.DropoutKeys of this batch, or None where dropout is off.

    Returns:
      float32 [batch, image_length, codebook_size]; entry i predicts image_tokens[:, i].
    """
    encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    mask = text_encoder.text_mask(text_tokens)
    return self.image_decoder(image_tokens, encoded, mask, layers.fold(dropout_keys, 1))

  def states(self, text_tokens, image_tokens, dropout_keys=None):
    """What each decoder layer predicts from, for losses over depth; arguments as `__call__`.

    Returns:
      [layers, batch, image_length, embed]; `predict` of the last is the result of `__call__`.
    """
    encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    mask = text_encoder.text_mask(text_tokens)
    return self.image_decoder.states(
      image_tokens, encoded, mask, layers.fold(dropout_keys, 1), every=True
    )

  def predict(self, states):
    """Logits of one layer of `states`: float32 [batch, image_length, codebook_size]."""
    return self.image_decoder.predict(states)

  def start(self, text_tokens, layers_apart, cache_length: int | None = None):
    """What sampling needs of a text, computed once.

    Neither this nor `step` looks at the decoder's layers among the module's own parameters.

    Args:
      text_tokens: int32 [batch, text_length].
      layers_apart: parameters of each decoder layer, cut out of the stack.
      cache_length: the caches serve this many first positions; all of them by default.

    Returns:
      memories: for each decoder layer the text's keys and values,
        [batch, heads, text_length, head_dim] each.
      mask: of the text, bool [batch, 1, 1, text_length].
      caches: for each decoder layer empty keys and values, [batch, heads, slots, head_dim] each,
        with slots for the positions that the layer's attention pattern can still see.
    """
    memories = self.image_decoder.start(self.text_encoder(text_tokens), layers_apart)
    length = self.config.image_length if cache_length is None else cache_length
    caches = self.image_decoder.empty_caches(text_tokens.shape[0], length)
    return memories, text_encoder.text_mask(text_tokens), caches

  def step(self, previous_token, caches, layers_apart, memories, mask, position):
    """One position of sampling.

    Args:
      previous_token: int32 [batch]; ignored at position 0.
      caches: of `start`, or of the step before.
      layers_apart: as `start`.
      memories: of `start`.
      mask: of `start`.
      position: int32 [].

    Returns:
      float32 logits [batch, codebook_size] and the caches with this position written.
    """
    return self.image_decoder.step(previous_token, caches, layers_apart, memories, mask, position)

  def step_until(self, *args, **kwargs):
    """One position in which tokens leave early, as `token_decoder.TokenDecoder.step_until`."""
    return self.image_decoder.step_until(*args, **kwargs)

  def step_beside(self, *args, **kwargs):
    """Guidance's pass beside it, as `token_decoder.TokenDecoder.step_beside`."""
    return self.image_decoder.step_beside(*args, **kwargs)


def example_inputs(config: parti_config.PartiConfig, batch: int = 1):
  """Arrays of the shapes and dtypes that `Parti.__call__` takes, for initialisation."""
  return (
    jnp.ones((batch, config.text_length), jnp.int32),
    jnp.zeros((batch, config.image_length), jnp.int32),
  )

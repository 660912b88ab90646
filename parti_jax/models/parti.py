"""Parti: a text encoder and an image-token decoder (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import flops
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import token_decoder
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


class Parti(nn.Module):
  """Predicts image tokens from text and earlier image tokens.

  Attributes:
    config: sizes.
  """

  config: parti_config.PartiConfig

  def setup(self):
    self.text_encoder = text_encoders.module(self.config)
    self.image_decoder = token_decoder.TokenDecoder(self.config)

  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Float[Array, 'batch text_length features'] | None = None,
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits of every image token, given the text and the earlier tokens.

    Args:
      text_tokens: text tokens, padded with 0.
      image_tokens: image tokens in [0, codebook_size). The last one is not an input.
      dropout_keys: keys of this batch; None if dropout is off.
      text_features: the text encoder's output, if it was computed before; None to run it. Padding
        may have any finite values.

    Returns:
      Logits; entry i predicts image_tokens[:, i].
    """
    inputs, keys = self._decoder_inputs(text_tokens, image_tokens, dropout_keys, text_features)
    return self.image_decoder(*inputs, dropout_keys=keys)[0]

  def all_layer_outputs(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    text_features: Float[Array, 'batch text_length features'] | None = None,
  ) -> Float[Array, 'layers batch image_length embed']:
    """Returns the outputs of all decoder layers, for losses over depth.

    The arguments are those of `__call__`, whose result is `logits_from` of the last layer's output.
    """
    inputs, keys = self._decoder_inputs(text_tokens, image_tokens, dropout_keys, text_features)
    return self.image_decoder.all_layer_outputs(*inputs, dropout_keys=keys)

  def _decoder_inputs(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    image_tokens: Int[Array, 'batch image_length'],
    dropout_keys: layers.DropoutKeys | None,
    text_features: Float[Array, 'batch text_length features'] | None,
  ) -> tuple[
    tuple[
      Int[Array, 'batch image_length'],
      Float[Array, 'batch text_length features'],
      Bool[Array, 'batch 1 1 text_length'],
    ],
    layers.DropoutKeys | None,
  ]:
    if text_features is None:
      encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    else:
      encoded = text_features.astype(self.config.compute_dtype)
    inputs = token_decoder.shifted(image_tokens), encoded, self.text_mask(text_tokens)
    return inputs, layers.fold(dropout_keys, 1)

  def text_mask(
    self, text_tokens: Int[Array, 'batch text_length']
  ) -> Bool[Array, 'batch 1 1 text_length']:
    """Returns an attention mask that hides padding."""
    return text_encoders.text_mask(self.config, text_tokens)

  def logits_from(
    self, outputs: Float[Array, 'batch image_length embed']
  ) -> Float[Array, 'batch image_length codebook']:
    """Returns the float32 logits for the outputs of one layer."""
    return self.image_decoder.logits_from(outputs)

  def encode_text(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    length: int | None = None,
    int8_cache: bool = False,
  ) -> transformer.DecoderState:
    """Encodes texts for sampling, which continues with `token_decoder.TokenDecoder` alone.

    Args:
      text_tokens: text tokens, padded with 0.
      length: number of positions that the caches can hold; all positions by default.
      int8_cache: whether to hold keys and values in int8.

    Returns:
      The state of the decoder before the first image token.
    """
    return self.image_decoder.decoder.init_state(
      self.text_encoder(text_tokens),
      self.text_mask(text_tokens),
      self.config.image_length if length is None else length,
      int8_cache,
    )


def example_inputs(
  config: parti_config.PartiConfig, batch: int = 1
) -> tuple[Int[Array, 'batch text_length'], Int[Array, 'batch image_length']]:
  """Returns arrays with the shapes and dtypes of the arguments of `Parti`, for initialization."""
  return (
    jnp.ones((batch, config.text_length), jnp.int32),
    jnp.zeros((batch, config.image_length), jnp.int32),
  )


def forward_flops(config: parti_config.PartiConfig) -> int:
  """Returns the FLOPs of one text and its image tokens through Parti."""
  return text_encoders.forward_flops(config) + flops.token_decoder_forward(config)

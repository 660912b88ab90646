"""The text encoder (Parti, section 2.2)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models import parti_config
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layers
from parti_jax.models.nn import transformer


class TextEncoder(nn.Module):
  """A bidirectional Transformer over SentencePiece tokens.

  Attributes:
    config: sizes.
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
      config.encoder_options,
    )
    self.drop = layers.Dropout(config.dropout)

  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    masked: tuple[Bool[Array, 'batch text_length'], Float[Array, 'embed']] | None = None,
  ) -> Float[Array, 'batch text_length embed']:
    """Encodes texts.

    Args:
      text_tokens: text tokens, padded with 0.
      dropout_keys: keys of the encoder; None if dropout is off.
      masked: for masked language modeling: True for each piece to replace, and the mask vector
        that replaces its embedding.
    """
    pieces = self.token_embedding(text_tokens)
    if masked is not None:
      hidden, vector = masked
      pieces = jnp.where(hidden[..., None], vector, pieces)
    x = pieces + self.position_embedding(jnp.arange(text_tokens.shape[1]))
    x = self.drop(x.astype(self.config.compute_dtype), layers.fold(dropout_keys, 0))
    return self.encoder(
      x, dot_product_attention.text_mask(text_tokens), layers.fold(dropout_keys, 1)
    )

  def piece_logits(
    self, x: Float[Array, 'batch places embed']
  ) -> Float[Array, 'batch places text_vocabulary']:
    """Returns the dot products of x with the embeddings of all pieces, in float32."""
    return self.token_embedding.attend(x)


def example_inputs(
  config: parti_config.PartiConfig, batch: int = 1
) -> tuple[Int[Array, 'batch text_length']]:
  """Returns an array of the shape and dtype of the argument of `TextEncoder`, for initialization."""
  return (jnp.ones((batch, config.text_length), jnp.int32),)

"""Pretraining of the text encoder: masked language modeling, and a contrastive loss.

Parti first trains its text encoder with BERT's objective and with a contrastive loss between texts
and pictures, and then trains encoder and decoder together (Parti, section 2.2 of the arXiv
version).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import image_sizes
from parti_jax.models import coca
from parti_jax.models import contrastive
from parti_jax.models import masked_language
from parti_jax.models import parti_config
from parti_jax.models import quantizer
from parti_jax.models import text_encoder
from parti_jax.models.nn import layers


class ContrastiveHead(nn.Module):
  """An image encoder, and the contrastive vectors of pictures and texts.

  The vector of a text is a projection of the mean of the text encoder's outputs. All of them
  receive a gradient in this way, as the generator attends to all of them.

  Attributes:
    image: sizes of the image encoder and of the vectors; its sizes of texts are not used.
  """

  image: coca.CoCaConfig

  def setup(self):
    image = self.image
    feature = lambda: layers.Projection((image.feature_dim,), 1, ('embed', 'feature'))
    self.image_encoder = coca.ImageEncoder(image)
    self.image_pooler = coca.AttentionalPooler(1, image.width, image.heads, image.compute_dtype)
    self.image_feature = feature()
    self.text_feature = feature()
    self.logit_scale = contrastive.LogitScale()

  def __call__(
    self,
    images: Float[Array, 'batch height width 3'],
    encoded: Float[Array, 'batch text_length embed'],
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> tuple[
    Float[Array, 'batch feature_dim'], Float[Array, 'batch feature_dim'], Float[Array, '']
  ]:
    """Returns float32 unit vectors of the pictures and of the texts, and the scale of their products.

    Args:
      images: pictures with values in [0, 1].
      encoded: the output of the text encoder.
      text_tokens: text tokens, padded with 0.
      dropout_keys: keys of the image encoder; None if dropout is off.
    """
    pictures = self.image_pooler(self.image_encoder(images, dropout_keys))[:, 0]
    is_text = (text_tokens > 0).astype(jnp.float32)[..., None]
    texts = jnp.sum(encoded * is_text, axis=1) / jnp.maximum(jnp.sum(is_text, axis=1), 1.0)
    return (
      quantizer.normalize(self.image_feature(pictures)),
      quantizer.normalize(self.text_feature(texts)),
      self.logit_scale(),
    )


class TextPretraining(nn.Module):
  """The text encoder, with the same name as in Parti, and the heads of both losses.

  Attributes:
    config: sizes of Parti, of which only those of the text encoder are used.
    masked: whether to have a head of masked language modeling.
    image: sizes of the image encoder; None for no contrastive head.
  """

  config: parti_config.PartiConfig
  masked: bool = True
  image: coca.CoCaConfig | None = None

  def setup(self):
    self.text_encoder = text_encoder.TextEncoder(self.config)
    if self.masked:
      self.masked_head = masked_language.MaskedLanguageHead(self.config)
    if self.image:
      self.contrastive_head = ContrastiveHead(self.image)

  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    images: Float[Array, 'batch height width 3'] | None = None,
  ) -> None:
    """Runs all parts, for initialization; the arguments are those of the methods below."""
    if self.masked:
      keys = masked_language.keys_of_texts(text_tokens)
      self.piece_logits(masked_language.mask_text(text_tokens, keys, self.config.text_vocabulary))
    if self.image:
      assert images is not None
      self.features(text_tokens, images)

  def piece_logits(
    self, text: masked_language.MaskedText, dropout_keys: layers.DropoutKeys | None = None
  ) -> Float[Array, 'batch most text_vocabulary']:
    """Returns float32 logits of the chosen pieces.

    Args:
      text: the result of `mask_text`.
      dropout_keys: keys of this batch; None if dropout is off.
    """
    head = self.masked_head
    encoded = self.text_encoder(text.tokens, dropout_keys, (text.masked, head.mask))
    logits = self.text_encoder.piece_logits(head(encoded, text.places)) + head.bias
    return nn.with_logical_constraint(
      logits, ('activation_batch', 'activation_length', 'activation_vocab')
    )

  def features(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    images: Float[Array, 'batch height width 3'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> tuple[
    Float[Array, 'batch feature_dim'], Float[Array, 'batch feature_dim'], Float[Array, '']
  ]:
    """Returns the result of `ContrastiveHead`.

    Args:
      text_tokens: text tokens, padded with 0.
      images: pictures with values in [0, 1].
      dropout_keys: keys of this batch; None if dropout is off.
    """
    encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    return self.contrastive_head(images, encoded, text_tokens, layers.fold(dropout_keys, 1))


def example_inputs(
  config: parti_config.PartiConfig, image: coca.CoCaConfig | None = None, batch: int = 1
) -> (
  tuple[Int[Array, 'batch text_length']]
  | tuple[Int[Array, 'batch text_length'], Float[Array, 'batch height width 3']]
):
  """Returns arrays with the shapes and dtypes of the arguments of `TextPretraining`."""
  texts = jnp.ones((batch, config.text_length), jnp.int32)
  if image is None:
    return (texts,)
  return texts, jnp.zeros((batch, *image_sizes.sides(image.image_size), 3), jnp.float32)

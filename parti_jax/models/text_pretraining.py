"""The text encoder with what trains it before Parti: masked language modelling, a contrastive loss.

Parti warms its text encoder up with BERT's objective and with a contrastive one between texts and
pictures, and then trains encoder and decoder together (Parti, section 2.2 in the arXiv version).
"""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models import coca
from parti_jax.models import contrastive
from parti_jax.models import masked_language
from parti_jax.models import parti_config
from parti_jax.models import quantizer
from parti_jax.models import text_encoder
from parti_jax.models.nn import layers


class ContrastiveHead(nn.Module):
  """An image encoder, and what makes one vector of a picture and of a text.

  A text's vector is a projection of the mean over its pieces of the encoder's output: the
  generator looks at all of them, so all of them are to learn.

  Attributes:
    image: sizes of the image encoder and of the vectors; those of its texts are not used.
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

  def __call__(self, images, encoded, text_tokens, dropout_keys=None):
    """Vectors of pictures and texts.

    Args:
      images: float32 [batch, height, width, 3] in [0, 1].
      encoded: [batch, text_length, embed], of the text encoder.
      text_tokens: int32 [batch, text_length], padded with 0.
      dropout_keys: of the image encoder.

    Returns:
      Unit vectors float32 [batch, feature_dim] of the pictures and of the texts, and float32 [],
      the scale of their products.
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
  """The text encoder, under the name that it has in Parti, and the heads of both objectives.

  Attributes:
    config: sizes; of Parti those of the text encoder alone count.
    masked: whether there is a head of masked language modelling.
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

  def __call__(self, text_tokens, images=None):
    """All that there is, for initialisation; arguments as the methods below."""
    if self.masked:
      keys = masked_language.keys_of_texts(text_tokens)
      self.piece_logits(masked_language.mask_text(text_tokens, keys, self.config.text_vocabulary))
    if self.image:
      self.features(text_tokens, images)

  def piece_logits(self, text: masked_language.MaskedText, dropout_keys=None):
    """Logits of the chosen pieces.

    Args:
      text: of `mask_text`.
      dropout_keys: layers.DropoutKeys, or None where dropout is off.

    Returns:
      float32 [batch, most, text_vocabulary].
    """
    head = self.masked_head
    encoded = self.text_encoder(text.tokens, dropout_keys, (text.masked, head.mask))
    logits = self.text_encoder.piece_logits(head(encoded, text.places)) + head.bias
    return nn.with_logical_constraint(
      logits, ('activation_batch', 'activation_length', 'activation_vocab')
    )

  def features(self, text_tokens, images, dropout_keys=None):
    """Vectors of texts and pictures, see `ContrastiveHead`.

    Args:
      text_tokens: int32 [batch, text_length], padded with 0.
      images: float32 [batch, height, width, 3] in [0, 1].
      dropout_keys: layers.DropoutKeys, or None where dropout is off.
    """
    encoded = self.text_encoder(text_tokens, layers.fold(dropout_keys, 0))
    return self.contrastive_head(images, encoded, text_tokens, layers.fold(dropout_keys, 1))


def example_inputs(
  config: parti_config.PartiConfig, image: coca.CoCaConfig | None = None, batch: int = 1
):
  """Arrays of the shapes and dtypes that `TextPretraining.__call__` takes, for initialisation."""
  texts = jnp.ones((batch, config.text_length), jnp.int32)
  if image is None:
    return (texts,)
  return texts, jnp.zeros((batch, image.image_size, image.image_size, 3), jnp.float32)

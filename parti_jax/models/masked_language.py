"""Masked language modeling (BERT, arXiv 1810.04805, section 3.1): masking, and the output head."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import numerics
from parti_jax.models import parti_config
from parti_jax.models.nn import layers

# Number of ids that are not pieces of text: padding, the end and unknown pieces.
SPECIAL_IDS = 3
# Fraction of pieces to predict.
SHARE = 0.15


class MaskedText(flax.struct.PyTreeNode):
  """Texts in which some pieces are chosen for prediction.

  Attributes:
    tokens: text tokens, in which random pieces replace some of the chosen ones.
    masked: True where the mask vector replaces a piece.
    places: positions of the chosen pieces, in random order; `most` is `most_chosen`.
    targets: the pieces at these positions in the original text.
    weights: 1 for a chosen piece, 0 for unused entries.
  """

  tokens: Int[Array, 'batch text_length']
  masked: Bool[Array, 'batch text_length']
  places: Int[Array, 'batch most']
  targets: Int[Array, 'batch most']
  weights: Float[Array, 'batch most']


def most_chosen(text_length: int) -> int:
  """Returns the maximum number of pieces chosen in a text."""
  return max(1, int(SHARE * text_length + 0.5))


def count_chosen(text_tokens: Int[Array, 'batch text_length']) -> Int[Array, 'batch']:
  """Returns the number of pieces chosen in each text: 15%, rounded, but at least one.

  As in BERT's own data (`create_pretraining_data.py`), the number is exact rather than an average:
  short texts have at least one chosen piece, and the weight of a batch is known without a key.
  A text without pieces has none.
  """
  pieces = jnp.sum(text_tokens >= SPECIAL_IDS, axis=1)
  rounded = jnp.floor(SHARE * pieces + 0.5).astype(jnp.int32)
  return jnp.where(pieces > 0, jnp.maximum(rounded, 1), 0)


def mask_text(
  text_tokens: Int[Array, 'batch text_length'], keys: layers.DropoutKeys, vocabulary: int
) -> MaskedText:
  """Chooses 15% of the pieces, replaces 80% of these by the mask and 10% by random pieces.

  The choice depends only on the key and on the index of each example in the whole batch, like the
  masks of dropout. It doesn't depend on the mesh or on the split into microbatches.

  Args:
    text_tokens: text tokens, padded with 0. Padding, the end and unknown pieces are never chosen.
    keys: the key, and the indices of the examples.
    vocabulary: number of ids; random pieces are drawn from all ids that are not special.
  """
  length = text_tokens.shape[1]
  key_of_row = jax.vmap(lambda row: jax.random.fold_in(keys.key, row))(keys.rows)

  def draw(key):
    order, action, piece = jax.random.split(key, 3)
    return (
      jax.random.uniform(order, (length,)),
      jax.random.uniform(action, (length,)),
      jax.random.randint(piece, (length,), SPECIAL_IDS, vocabulary),
    )

  order, action, piece = jax.vmap(draw)(key_of_row)
  most = most_chosen(length)
  places = jax.lax.top_k(jnp.where(text_tokens >= SPECIAL_IDS, order, -1.0), most)[1]
  counted = jnp.arange(most) < count_chosen(text_tokens)[:, None]
  chosen = jnp.any((places[..., None] == jnp.arange(length)) & counted[..., None], axis=1)
  return MaskedText(
    jnp.where(chosen & (action >= 0.9), piece, text_tokens),
    chosen & (action < 0.8),
    places,
    jnp.take_along_axis(text_tokens, places, axis=1),
    counted.astype(jnp.float32),
  )


def keys_of_texts(text_tokens: Int[Array, 'batch text_length']) -> layers.DropoutKeys:
  """Returns keys that depend only on each text, so that evaluation always masks it the same way."""
  odd = np.random.default_rng(0).integers(0, 2**31, text_tokens.shape[1]) * 2 + 1
  mixed = text_tokens.astype(jnp.uint32) * jnp.asarray(odd, jnp.uint32)
  return layers.DropoutKeys(numerics.key(0), jnp.sum(mixed, axis=1, dtype=jnp.uint32))


class MaskedLanguageHead(nn.Module):
  """The parameters of masked language modeling that are not part of the text encoder.

  The mask vector is a parameter of this module, because the vocabulary has no mask piece and the
  text encoder must have the same parameters as in the generator. The output layers are those of
  BERT: a projection, GELU, a layer norm, and the dot products with the encoder's embeddings plus a
  bias for each piece.

  Attributes:
    config: sizes of the text encoder.
  """

  config: parti_config.PartiConfig

  def setup(self):
    config = self.config
    self.mask = layers.parameter(
      self, 'mask', nn.initializers.normal(0.02), ('norm',), (config.width,)
    )
    self.project = layers.Projection((config.width,), 1, ('embed', 'mlp'), config.compute_dtype)
    self.norm = layers.LayerNorm(config.compute_dtype)
    self.bias = layers.parameter(
      self, 'bias', nn.initializers.zeros, ('vocab',), (config.text_vocabulary,)
    )

  def __call__(
    self, encoded: Float[Array, 'batch text_length embed'], places: Int[Array, 'batch most']
  ) -> Float[Array, 'batch most embed']:
    """Returns the vectors to multiply with the embeddings, for the chosen positions only.

    Args:
      encoded: the output of the text encoder.
      places: positions of the chosen pieces.
    """
    at_places = jnp.take_along_axis(encoded, places[..., None], axis=1)
    return self.norm(nn.gelu(self.project(at_places)))

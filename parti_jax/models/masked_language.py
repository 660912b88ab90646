"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1): which pieces, and the head."""

from __future__ import annotations

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import numerics
from parti_jax.models import parti_config
from parti_jax.models.nn import layers

# Ids that stand for no piece of text: padding, the end, an unknown piece.
SPECIAL_IDS = 3
SHARE = 0.15


@flax.struct.dataclass
class MaskedText:
  """A text some of whose pieces are to be predicted.

  Attributes:
    tokens: int32 [batch, text_length], with random pieces in the place of some chosen ones.
    masked: bool [batch, text_length], where the mask's vector takes the place of a piece.
    places: int32 [batch, most], the chosen places in no order; `most` is `most_chosen`.
    targets: int32 [batch, most], the pieces that stood there.
    weights: float32 [batch, most], 1 where a place is chosen, 0 where the text has no more.
  """

  tokens: jax.Array
  masked: jax.Array
  places: jax.Array
  targets: jax.Array
  weights: jax.Array


def most_chosen(text_length: int) -> int:
  """Most places that are chosen in a text."""
  return max(1, int(SHARE * text_length + 0.5))


def count_chosen(text_tokens):
  """How many places are chosen: 15% of a text's pieces, rounded, and one where that is none.

  As in BERT's own data (`create_pretraining_data.py`) the number is exact, not one on average, so
  that short texts are not left without any, and how much a batch weighs is known without a key.

  Args:
    text_tokens: int32 [batch, text_length].

  Returns:
    int32 [batch]; 0 for a text that has no piece.
  """
  pieces = jnp.sum(text_tokens >= SPECIAL_IDS, axis=1)
  rounded = jnp.floor(SHARE * pieces + 0.5).astype(jnp.int32)
  return jnp.where(pieces > 0, jnp.maximum(rounded, 1), 0)


def mask_text(text_tokens, keys: layers.DropoutKeys, vocabulary: int) -> MaskedText:
  """Chooses 15% of the pieces; of these 80% become the mask, 10% a random piece, 10% stay.

  Which ones follows from the key and an example's place in the whole batch alone, as the masks of
  dropout do, and so neither from the mesh nor from microbatches.

  Args:
    text_tokens: int32 [batch, text_length], padded with 0. Padding, the end and unknown pieces
      are never chosen.
    keys: the key of the masks, and the examples' places.
    vocabulary: number of ids; a random piece is any that is not special.
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


def keys_of_texts(text_tokens) -> layers.DropoutKeys:
  """Keys that follow from each text alone, so that evaluation masks it the same every time.

  Args:
    text_tokens: int32 [batch, text_length].
  """
  odd = np.random.default_rng(0).integers(0, 2**31, text_tokens.shape[1]) * 2 + 1
  mixed = text_tokens.astype(jnp.uint32) * jnp.asarray(odd, jnp.uint32)
  return layers.DropoutKeys(numerics.key(0), jnp.sum(mixed, axis=1, dtype=jnp.uint32))


class MaskedLanguageHead(nn.Module):
  """What masked language modelling needs besides the text encoder.

  The vector that stands for a masked piece is a parameter here: the vocabulary has no mask piece,
  and the encoder proper stays what the generator starts from. The output is BERT's: a projection,
  GELU, a layer norm, then products with the encoder's own table of pieces and a bias for each.

  Attributes:
    config: sizes of the text encoder.
  """

  config: parti_config.PartiConfig

  def setup(self):
    config = self.config
    self.mask = self.param(
      'mask', nn.with_logical_partitioning(nn.initializers.normal(0.02), ('norm',)), (config.width,)
    )
    self.project = layers.Projection((config.width,), 1, ('embed', 'mlp'), config.compute_dtype)
    self.norm = layers.LayerNorm(config.compute_dtype)
    self.bias = self.param(
      'bias',
      nn.with_logical_partitioning(nn.initializers.zeros, ('vocab',)),
      (config.text_vocabulary,),
    )

  def __call__(self, encoded, places):
    """What the encoder's table of pieces is multiplied with, at the chosen places alone.

    Args:
      encoded: [batch, text_length, embed].
      places: int32 [batch, most].

    Returns:
      [batch, most, embed].
    """
    at_places = jnp.take_along_axis(encoded, places[..., None], axis=1)
    return self.norm(nn.gelu(self.project(at_places)))

"""The symmetric contrastive loss of pictures and texts (CLIP, CoCa) over the global batch.

Each device holds the logits of its own pictures, [batch / devices, batch], so every other text of
the batch is a negative for every picture, on whichever device it lies. The devices exchange the
features of the texts once, and two numbers per text for the softmax over pictures.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import layers

# CLIP, section 2.5: the temperature starts at 0.07, and the scale of logits is at most 100.
_FIRST_TEMPERATURE = 0.07
_LARGEST_SCALE = 100.0
# Logical axes of the logits [pictures, texts], which are split along the pictures only.
_LOGITS = ('activation_batch', None)


class LogitScale(nn.Module):
  """The learned inverse temperature of a contrastive loss.

  The parameter is its logarithm. The scale starts at 1 / 0.07 and is clipped to 100 (CLIP, arXiv
  2103.00020, section 2.5). When clipped, its gradient is 0, and only weight decay or another loss
  can decrease it.
  """

  @nn.compact
  def __call__(self) -> Float[Array, '']:
    first = nn.initializers.constant(-math.log(_FIRST_TEMPERATURE))
    log_scale = layers.parameter(self, 'log_scale', first, (), ())
    return jnp.exp(jnp.minimum(log_scale, math.log(_LARGEST_SCALE)))


def equal_rows(tokens: Int[Array, 'batch text_length']) -> Bool[Array, 'batch batch']:
  """Returns which pairs of texts of a batch are equal."""

  def compare(equal, column):
    equal &= column[:, None] == column[None, :]
    return nn.with_logical_constraint(equal, _LOGITS), None

  everything = jnp.ones((tokens.shape[0],) * 2, bool)
  # One token at a time, because [batch, batch, text_length] would not fit in memory.
  return jax.lax.scan(compare, everything, tokens.T)[0]


def contrastive_losses(
  image_features: Float[Array, 'batch feature_dim'],
  text_features: Float[Array, 'batch feature_dim'],
  scale: Float[Array, ''],
  same: Bool[Array, 'batch batch'] | None = None,
) -> tuple[Float[Array, 'batch'], Float[Array, 'batch']]:
  """Cross entropy of each picture's text among all texts, and of each text's picture.

  The negatives are all other pairs of the arguments: under jit on a mesh, those of the global
  batch. If the trainer splits a batch into microbatches, only pairs of the same microbatch are
  negatives. If many negatives matter, use fewer microbatches or a remat policy that saves less.

  Args:
    image_features: unit vectors of the pictures.
    text_features: unit vectors of their texts; row i belongs to picture i.
    scale: the inverse temperature, the result of `LogitScale`.
    same: symmetric; True for pairs with the same text, such as the result of `equal_rows`, which
      are not negatives. None if all texts differ.

  Returns:
    losses: the sum of both directions (CoCa, arXiv 2205.01917, eq. 2; CLIP takes half of it). The
      loss is the mean over the batch.
    hits: 1 where a picture is at least as close to its own text as to all negatives, else 0.
  """
  images = nn.with_logical_constraint(
    image_features.astype(jnp.float32), ('activation_batch', None)
  )
  texts = nn.with_logical_constraint(text_features.astype(jnp.float32), (None, None))
  logits = nn.with_logical_constraint(scale * images @ texts.T, _LOGITS)
  own = jnp.eye(logits.shape[0], dtype=bool)
  if same is not None:
    logits = jnp.where(same & ~own, jnp.finfo(jnp.float32).min, logits)
  # A masked sum, because taking the diagonal of a matrix that is split by rows would gather it.
  of_pair = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
  texts_of_image = jax.nn.logsumexp(logits, axis=1)
  images_of_text = jax.nn.logsumexp(logits, axis=0)
  hits = of_pair >= jnp.max(jax.lax.stop_gradient(logits), axis=1)
  return texts_of_image + images_of_text - 2.0 * of_pair, hits.astype(jnp.float32)

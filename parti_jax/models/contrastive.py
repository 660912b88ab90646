"""The symmetric contrastive loss of pictures and texts (CLIP, CoCa), over the whole mesh's batch.

The loss is written for the global batch: each device holds the rows of the logits that belong to
its own pictures, [batch / devices, batch], so every text of the batch is a negative of every
picture, wherever either lies. What moves between devices are the texts' features, gathered once,
and two numbers a text for the softmax over pictures.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

# CLIP, section 2.5: the temperature begins at 0.07, and no logit is scaled by more than 100.
_FIRST_TEMPERATURE = 0.07
_LARGEST_SCALE = 100.0
# Logical axes of the logits: pictures by texts, split along the pictures alone.
_LOGITS = ('activation_batch', None)


class LogitScale(nn.Module):
  """The learned inverse temperature of a contrastive loss, float32 [].

  It is stored as its logarithm, begins at 1 / 0.07, and stays at most 100 (CLIP, arXiv 2103.00020,
  section 2.5). At that bound its gradient is 0 until weight decay or another loss moves it back.
  """

  @nn.compact
  def __call__(self):
    first = nn.initializers.constant(-math.log(_FIRST_TEMPERATURE))
    log_scale = self.param('log_scale', nn.with_logical_partitioning(first, ()), ())
    return jnp.exp(jnp.minimum(log_scale, math.log(_LARGEST_SCALE)))


def equal_rows(tokens):
  """Which texts of a batch are the same: int32 [batch, text_length] to bool [batch, batch]."""

  def compare(equal, column):
    equal &= column[:, None] == column[None, :]
    return nn.with_logical_constraint(equal, _LOGITS), None

  everything = jnp.ones((tokens.shape[0],) * 2, bool)
  # One token after another: [batch, batch, text_length] would not fit the memory.
  return jax.lax.scan(compare, everything, tokens.T)[0]


def contrastive_losses(image_features, text_features, scale, same=None):
  """Cross entropy of each picture's text among all texts, and of each text's picture.

  Negatives are all other pairs of the arrays given: under jit on a mesh that is the global batch.
  A batch that the trainer cuts into microbatches has the negatives of its own microbatch only,
  since a microbatch's features are gone before the next one's are computed; choose fewer
  microbatches, or a remat policy that keeps less, where many negatives matter.

  Args:
    image_features: [batch, dim], unit vectors.
    text_features: [batch, dim], unit vectors; pair i is row i of both.
    scale: float32 [], the inverse temperature, of `LogitScale`.
    same: bool [batch, batch], symmetric: pairs whose texts say the same, such as of `equal_rows`;
      they are no negatives of one another. None where all texts differ.

  Returns:
    losses: float32 [batch], the sum of both directions (CoCa, arXiv 2205.01917, eq. 2; CLIP takes
      half of it); its mean over the batch is the loss.
    hits: float32 [batch], 1 where the picture's own text is the nearest of all negatives and it.
  """
  images = nn.with_logical_constraint(
    image_features.astype(jnp.float32), ('activation_batch', None)
  )
  texts = nn.with_logical_constraint(text_features.astype(jnp.float32), (None, None))
  logits = nn.with_logical_constraint(scale * images @ texts.T, _LOGITS)
  own = jnp.eye(logits.shape[0], dtype=bool)
  if same is not None:
    logits = jnp.where(same & ~own, jnp.finfo(jnp.float32).min, logits)
  # By a sum, as the diagonal of a matrix that is split by rows would be gathered.
  of_pair = jnp.sum(jnp.where(own, logits, 0.0), axis=1)
  texts_of_image = jax.nn.logsumexp(logits, axis=1)
  images_of_text = jax.nn.logsumexp(logits, axis=0)
  hits = of_pair >= jnp.max(jax.lax.stop_gradient(logits), axis=1)
  return texts_of_image + images_of_text - 2.0 * of_pair, hits.astype(jnp.float32)

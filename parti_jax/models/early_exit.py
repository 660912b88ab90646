"""How sure a prediction is, for decoding that does not compute everything for every token."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def confidence(logits):
  """The likeliest token's probability less that of the next one (CALM, section 3).

  CALM (arXiv 2207.07061) calls it the softmax response. The logits are taken as they are, whatever
  temperature the token is drawn with.

  Args:
    logits: float32 [..., codebook_size].

  Returns:
    float32 [...], from 0 to 1.
  """
  chances = jax.nn.softmax(logits, axis=-1)
  first = jnp.argmax(chances, axis=-1, keepdims=True)
  # Not by top_k: it sorts, and gathers a codebook that is split over devices.
  codes = jax.lax.broadcasted_iota(jnp.int32, chances.shape, chances.ndim - 1)
  second = jnp.max(jnp.where(codes == first, 0.0, chances), axis=-1)
  return jnp.max(chances, axis=-1) - second

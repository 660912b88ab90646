"""Vector quantization with factorised, l2-normalised codes (ViT-VQGAN, section 3.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.models.nn import layers


def normalize(x):
  """x over its l2 norm along the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


class VectorQuantizer(nn.Module):
  """The nearest of a table of unit vectors.

  Attributes:
    codebook_size: number of codes.
    code_dim: length of a code; low, since codes live behind a projection.
    commitment: weight β of the term that draws latents to their codes.
  """

  codebook_size: int
  code_dim: int
  commitment: float = 0.25

  def setup(self):
    self.codebook = layers.Embedding(
      self.codebook_size, self.code_dim, ('codebook', 'code'), stddev=1.0
    )

  def __call__(self, latents):
    """Quantizes latents.

    Args:
      latents: [batch, length, code_dim], of any norm.

    Returns:
      codes: float32 [batch, length, code_dim], unit vectors whose gradient goes straight to
        the latents.
      tokens: int32 [batch, length].
      loss: float32 [], ‖sg[z] − e‖² + β‖z − sg[e]‖² (ViT-VQGAN, section 3.1), as a mean over
        positions and over the dimensions of a code.
    """
    latents = normalize(latents)
    tokens = self.nearest(latents)
    codes = self.lookup(tokens)
    stop = jax.lax.stop_gradient
    loss = jnp.mean(jnp.square(stop(latents) - codes)) + self.commitment * jnp.mean(
      jnp.square(latents - stop(codes))
    )
    return latents + stop(codes - latents), tokens, loss

  def nearest(self, latents):
    """Token of the nearest code: [batch, length, code_dim] to int32 [batch, length]."""
    similarity = normalize(latents) @ normalize(self.codebook.table).T
    return jnp.argmax(similarity, axis=-1).astype(jnp.int32)

  def lookup(self, tokens):
    """Codes of tokens: int32 [batch, length] to float32 unit vectors [..., code_dim]."""
    return normalize(self.codebook(tokens))

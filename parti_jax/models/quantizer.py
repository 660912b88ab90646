"""Vector quantization with factorized, l2-normalized codes (ViT-VQGAN, section 3.1)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import layers


def normalize(x: Float[Array, '*places code_dim']) -> Float[Array, '*places code_dim']:
  """Divides x by its l2 norm along the last axis, in float32."""
  x = x.astype(jnp.float32)
  return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)


class VectorQuantizer(nn.Module):
  """Replaces each latent vector by the nearest code, a unit vector of the codebook.

  Attributes:
    codebook_size: number of codes.
    code_dim: length of a code, which is small because the encoder projects to it.
    commitment: weight β of the term that moves latents towards their codes.
  """

  codebook_size: int
  code_dim: int
  commitment: float = 0.25

  def setup(self):
    self.codebook = layers.Embedding(
      self.codebook_size, self.code_dim, ('codebook', 'code'), stddev=1.0
    )

  def __call__(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> tuple[Float[Array, 'batch tokens code_dim'], Int[Array, 'batch tokens'], Float[Array, '']]:
    """Quantizes latents, which need not be unit vectors.

    Returns:
      codes: float32 unit vectors; their gradient is passed straight through to the latents.
      tokens: indices of the codes.
      loss: ‖sg[z] − e‖² + β‖z − sg[e]‖² (ViT-VQGAN, section 3.1), as a mean over positions and over
        the dimensions of a code.
    """
    latents = normalize(latents)
    tokens = self.nearest(latents)
    codes = self.lookup(tokens)
    stop = jax.lax.stop_gradient
    loss = jnp.mean(jnp.square(stop(latents) - codes)) + self.commitment * jnp.mean(
      jnp.square(latents - stop(codes))
    )
    return latents + stop(codes - latents), tokens, loss

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the code nearest to each latent vector."""
    similarity = normalize(latents) @ normalize(self.codebook.table).T
    return jnp.argmax(similarity, axis=-1).astype(jnp.int32)

  def lookup(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens code_dim']:
    """Returns the code of each token, a float32 unit vector."""
    return normalize(self.codebook(tokens))

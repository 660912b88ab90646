"""Revival of dead codes: those that no latent is nearest to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import PRNGKeyArray

from parti_jax.models import quantizer


def revive(
  table: Float[Array, 'codebook code_dim'],
  use: Float[Array, 'codebook'],
  dead: Bool[Array, 'codebook'],
  latents: Float[Array, 'batch tokens code_dim'],
  rng: PRNGKeyArray,
  distance: str = 'cosine',
) -> tuple[Float[Array, 'codebook code_dim'], Float[Array, 'codebook']]:
  """Sets dead codes to latents that are far from all codes.

  The probability of a latent grows with its squared distance to the nearest code, as for the centers
  of k-means++. With equal probabilities, most latents would be of blank patches, which already have
  enough codes.

  Args:
    table: the codebook.
    use: use of each code per batch.
    dead: whether a code is dead.
    latents: the latents of a batch.
    rng: a key.
    distance: 'euclidean', or 'cosine' for the distance of unit vectors.

  Returns:
    The new codebook, and the use, which is 0.1 for each code that was set.
  """
  latents = latents.reshape(-1, table.shape[1])
  if distance == 'cosine':
    latents = quantizer.normalize(latents)
    apart = 1.0 - jnp.max(latents @ quantizer.normalize(table).T, axis=-1)
  else:
    offsets = 0.5 * jnp.sum(jnp.square(table), axis=-1)
    scores = jnp.matmul(latents, table.T, precision=jax.lax.Precision.HIGHEST) - offsets
    apart = 0.5 * jnp.sum(jnp.square(latents), axis=-1) - jnp.max(scores, axis=-1)
  chance = jnp.log(jnp.maximum(apart, 1e-6)) + jax.random.gumbel(
    rng, apart.shape, jnp.float32, mode='low'
  )
  count = min(table.shape[0], latents.shape[0])
  chosen = latents[jax.lax.top_k(chance, count)[1]]
  turn = jnp.cumsum(dead) - 1
  revived = dead & (turn < count)
  table = jnp.where(revived[:, None], chosen[jnp.clip(turn, 0, count - 1)], table)
  return table, jnp.where(revived, 0.1, use)

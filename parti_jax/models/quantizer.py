"""Quantizers: from the latents of an image tokenizer to a finite set of codes.

| class | code of a latent |
|---|---|
| `VectorQuantizer` | the unit vector of a table at the smallest angle (ViT-VQGAN, section 3.1) |
| `EuclideanQuantizer` | the row of a table at the smallest distance (VQGAN, arXiv 2012.09841) |
| `DotQuantizer` | the row of a table with the largest dot product (IBQ, arXiv 2412.02692) |
| `FiniteScalarQuantizer` | each dimension rounded to a few levels (FSQ, arXiv 2309.15505) |
| `LookupFreeQuantizer` | the sign of each dimension (LFQ, arXiv 2310.05737) |

All of them have the methods `__call__`, `nearest`, `lookup` and `continuous`.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import layers

# Number of codes whose scores are in memory at once in the search for the nearest one.
_CODES_AT_ONCE = 2**14


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
    precision: precision of the products that find the nearest code; None for JAX's default, which
      rounds their inputs on accelerators.
  """

  codebook_size: int
  code_dim: int
  commitment: float = 0.25
  precision: jax.lax.Precision | None = None

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
    latents = self.continuous(latents)
    tokens = self.nearest(latents)
    codes = self.lookup(tokens)
    stop = jax.lax.stop_gradient
    loss = jnp.mean(jnp.square(stop(latents) - codes)) + self.commitment * jnp.mean(
      jnp.square(latents - stop(codes))
    )
    return latents + stop(codes - latents), tokens, loss

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the code nearest to each latent vector."""
    return _best(normalize(latents), normalize(self.codebook.table), self.precision)

  def lookup(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens code_dim']:
    """Returns the code of each token, a float32 unit vector."""
    return normalize(self.codebook(tokens))

  def continuous(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns what the decoder gets without quantization: unit vectors, like the codes."""
    return normalize(latents)


class EuclideanQuantizer(VectorQuantizer):
  """Replaces each latent vector by the row of a table at the smallest Euclidean distance."""

  precision: jax.lax.Precision | None = jax.lax.Precision.HIGHEST

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the nearest code."""
    # |z − e|² = |z|² − 2 (z·e − |e|²/2), and the first term is the same for all codes.
    offsets = -0.5 * jnp.sum(jnp.square(self._table), axis=-1)
    return _best(latents, self._table, self.precision, offsets)

  def lookup(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens code_dim']:
    """Returns the code of each token."""
    return self.codebook(tokens)

  def continuous(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns the latents that the decoder gets without quantization."""
    return latents.astype(jnp.float32)

  @property
  def _table(self) -> Any:
    return self.codebook.table


class DotQuantizer(EuclideanQuantizer):
  """The row of a table with the largest dot product, trained by index backpropagation (IBQ).

  Attributes:
    entropy_weight: weight of `entropy_penalty` in the loss.
    temperature: divisor of the scores in the entropy penalty.
  """

  entropy_weight: float = 0.05
  temperature: float = 0.01

  def __call__(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> tuple[Float[Array, 'batch tokens code_dim'], Int[Array, 'batch tokens'], Float[Array, '']]:
    """Quantizes latents.

    Returns:
      codes: the codes; their gradient passes through the softmax of all scores, to the latents and
        to the whole table.
      tokens: indices of the codes.
      loss: ‖z − e‖² + ‖z − sg[e]‖² + β‖sg[z] − e‖², as a mean over positions and over the
        dimensions of a code, and the weighted entropy penalty. The gradient of the first term
        goes through the softmax too.
    """
    stop = jax.lax.stop_gradient
    latents = self.continuous(latents)
    scores = jnp.matmul(latents, self._table.T, precision=self.precision)
    tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    chosen = self.lookup(tokens)
    soft = jax.nn.softmax(scores, axis=-1)
    hard = jax.nn.one_hot(tokens, self.codebook_size)
    codes = (soft + stop(hard - soft)) @ self._table
    codes = codes + stop(chosen - codes)  # Without the rounding of the sum.
    loss = (
      jnp.mean(jnp.square(latents - codes))
      + jnp.mean(jnp.square(latents - stop(chosen)))
      + self.commitment * jnp.mean(jnp.square(stop(latents) - chosen))
    )
    if self.entropy_weight:
      loss += self.entropy_weight * entropy_penalty(scores / self.temperature)
    return codes, tokens, loss

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the code with the largest dot product."""
    return _best(latents, self._table, self.precision)


class FiniteScalarQuantizer(nn.Module):
  """Each dimension rounded to one of a few levels between −1 and 1; it has no parameters.

  Attributes:
    levels: number of levels of each dimension; their product is the number of codes.
  """

  levels: tuple[int, ...]

  def __call__(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> tuple[Float[Array, 'batch tokens code_dim'], Int[Array, 'batch tokens'], Float[Array, '']]:
    """Quantizes latents.

    Returns:
      codes: the codes; their gradient is passed straight through to the bounded latents.
      tokens: indices of the codes.
      loss: always 0.
    """
    latents = self.continuous(latents)
    codes = latents + jax.lax.stop_gradient(self._rounded(latents) - latents)
    return codes, self._tokens(latents), jnp.zeros(())

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the nearest code."""
    return self._tokens(self.continuous(latents))

  def lookup(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens code_dim']:
    """Returns the code of each token."""
    levels = jnp.asarray(self.levels)
    places = tokens[..., None] // jnp.asarray(self._strides) % levels
    return (places - levels // 2) / self._half

  def continuous(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns what the decoder gets without quantization: latents within the range of the codes."""
    # An even number of levels has one more below 0 than above, so tanh is shifted. Its range ends
    # slightly beyond the outermost levels; otherwise two levels would have no shift.
    levels = jnp.asarray(self.levels, jnp.float32)
    reach = 0.5 * (levels - 1.0) * 1.001
    offset = jnp.where(levels % 2 == 1, 0.0, 0.5)
    shift = jnp.arctanh(offset / reach)
    return (jnp.tanh(latents.astype(jnp.float32) + shift) * reach - offset) / self._half

  @property
  def _half(self):
    """The number of levels below 0."""
    return jnp.asarray([level // 2 for level in self.levels], jnp.float32)

  @property
  def _strides(self) -> list[int]:
    """The place value of each dimension in a token."""
    return [math.prod(self.levels[:place]) for place in range(len(self.levels))]

  def _rounded(self, bounded):
    return jnp.round(bounded * self._half) / self._half

  def _tokens(self, bounded):
    places = jnp.round(bounded * self._half) + self._half
    return jnp.sum(places.astype(jnp.int32) * jnp.asarray(self._strides), axis=-1)


class LookupFreeQuantizer(nn.Module):
  """The sign of each dimension: 2^code_dim codes of −1 and 1; it has no parameters.

  Attributes:
    code_dim: length of a code.
    commitment: weight β of the term that moves latents towards their codes.
    entropy_weight: weight of the entropy penalty in the loss. Each dimension is a choice between
      two codes with the scores −(z ± 1)² / temperature, and the penalties of all dimensions are
      summed. The sum is the penalty over all codes, with an upper bound in place of the entropy of
      their use (arXiv 2406.07548, section 4).
    temperature: divisor of the scores in the entropy penalty.
  """

  code_dim: int
  commitment: float = 0.25
  entropy_weight: float = 0.05
  temperature: float = 0.01

  def __call__(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> tuple[Float[Array, 'batch tokens code_dim'], Int[Array, 'batch tokens'], Float[Array, '']]:
    """Quantizes latents.

    Returns:
      codes: the codes; their gradient is passed straight through to the latents.
      tokens: indices of the codes.
      loss: β‖z − sg[e]‖², as a mean over positions and dimensions, and the weighted entropy
        penalty.
    """
    latents = self.continuous(latents)
    tokens = self.nearest(latents)
    codes = self.lookup(tokens)
    loss = self.commitment * jnp.mean(jnp.square(latents - codes))
    if self.entropy_weight:
      scores = jnp.stack([latents, -latents], axis=-1) * (2.0 / self.temperature)
      of_dimensions = jax.vmap(entropy_penalty, in_axes=2)(scores)
      loss += self.entropy_weight * jnp.sum(of_dimensions)
    return latents + jax.lax.stop_gradient(codes - latents), tokens, loss

  def nearest(self, latents: Float[Array, 'batch tokens code_dim']) -> Int[Array, 'batch tokens']:
    """Returns the token of the nearest code: bit i is 1 where dimension i is above 0."""
    bits = 2 ** jnp.arange(self.code_dim)
    return jnp.sum(jnp.where(latents > 0, bits, 0), axis=-1, dtype=jnp.int32)

  def lookup(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'batch tokens code_dim']:
    """Returns the code of each token."""
    bits = tokens[..., None] >> jnp.arange(self.code_dim) & 1
    return (2 * bits - 1).astype(jnp.float32)

  def continuous(
    self, latents: Float[Array, 'batch tokens code_dim']
  ) -> Float[Array, 'batch tokens code_dim']:
    """Returns the latents that the decoder gets without quantization."""
    return latents.astype(jnp.float32)


def entropy_penalty(scores: Float[Array, '*places codes']) -> Float[Array, '']:
  """Returns a penalty that is low if choices are certain and all codes are used.

  It is the one of MAGVIT-v2 (arXiv 2310.05737, section 3.1).

  Args:
    scores: unnormalized log probabilities of the codes.

  Returns:
    The mean entropy of the choices minus the entropy of their mean, in nats.
  """
  log_chances = jax.nn.log_softmax(scores, axis=-1)
  chances = jnp.exp(log_chances)
  use = jnp.mean(chances, axis=tuple(range(scores.ndim - 1)))
  of_choices = -jnp.mean(jnp.sum(chances * log_chances, axis=-1))
  return of_choices + jnp.sum(use * jnp.log(jnp.maximum(use, 1e-30)))


def _best(latents, table, precision, offsets=None):
  """Returns the row of a table with the largest product with each latent, plus the row's offset.

  Args:
    latents: [batch, length, code_dim].
    table: float32 [codes, code_dim].
    precision: precision of the products.
    offsets: float32 [codes]; None for zeros.

  Returns:
    int32 [batch, length]; the first row among equally large ones.
  """
  codes = table.shape[0]
  if codes <= _CODES_AT_ONCE:
    scores = jnp.matmul(latents, table.T, precision=precision)
    scores = scores if offsets is None else scores + offsets
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)
  latents, table = jax.lax.stop_gradient((latents, table))
  offsets = jnp.zeros(codes) if offsets is None else jax.lax.stop_gradient(offsets)
  beyond = -codes % _CODES_AT_ONCE
  parts = jnp.pad(table, ((0, beyond), (0, 0))).reshape(-1, _CODES_AT_ONCE, table.shape[1])
  offsets = jnp.pad(offsets, (0, beyond), constant_values=-jnp.inf).reshape(-1, _CODES_AT_ONCE)

  def best_of_both(before, part):
    rows, offsets, start = part
    scores = jnp.matmul(latents, rows.T, precision=precision) + offsets
    found = jnp.max(scores, axis=-1), jnp.argmax(scores, axis=-1).astype(jnp.int32) + start
    better = found[0] > before[0]
    return tuple(jnp.where(better, new, old) for new, old in zip(found, before)), None

  first = jnp.full(latents.shape[:-1], -jnp.inf), jnp.zeros(latents.shape[:-1], jnp.int32)
  starts = jnp.arange(parts.shape[0], dtype=jnp.int32) * _CODES_AT_ONCE
  (_, tokens), _ = jax.lax.scan(best_of_both, first, (parts, offsets, starts))
  return tokens

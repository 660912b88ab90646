"""The Fréchet distance between two sets of pictures, over given features.

Each set is summarized as a Gaussian over its features. The distance is the squared 2-Wasserstein
distance of the Gaussians (Heusel et al. 2017, arXiv 1706.08500, equation 6):

  |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

Over Inception's 2,048 features it is the FID. Other features give another scale, whose values are
comparable only with each other. The distance is biased: it grows as the number of pictures falls,
so only distances over the same numbers of pictures are comparable.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """Mean and covariance of a set's features.

  Attributes:
    mean: the mean.
    covariance: the unbiased estimate of the covariance.
  """

  mean: Float64[np.ndarray, 'dim']
  covariance: Float64[np.ndarray, 'dim dim']

  @classmethod
  def of(cls, features: Float[np.ndarray, 'pictures dim']) -> Gaussian:
    """Estimates the Gaussian of the features of at least two pictures."""
    if features.ndim != 2 or len(features) < 2:
      raise ValueError(f'features are {list(features.shape)}; at least two pictures are needed')
    features = features.astype(np.float64)
    return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(one: Gaussian, other: Gaussian) -> float:
  """Returns the squared 2-Wasserstein distance of two Gaussians.

  tr((Σ₁ Σ₂)^½) is the sum of the singular values of Σ₁^½ Σ₂^½. This form also works for singular
  covariances of fewer pictures than features. The square root of the product itself, which isn't
  symmetric, would need special care there.

  Args:
    one: a Gaussian.
    other: a Gaussian over the same features.

  Returns:
    The distance; nonnegative up to rounding.
  """
  product = _root(one.covariance) @ _root(other.covariance)
  between = np.sum(np.square(one.mean - other.mean))
  within = np.trace(one.covariance) + np.trace(other.covariance)
  return float(between + within - 2 * np.linalg.svd(product, compute_uv=False).sum())


def _root(covariance: Float64[np.ndarray, 'dim dim']) -> Float64[np.ndarray, 'dim dim']:
  """Returns the symmetric square root of a covariance."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(
  features: Float[np.ndarray, 'pictures dim'], others: Float[np.ndarray, 'others dim']
) -> float:
  """Returns the Fréchet distance of two sets of features."""
  return distance(Gaussian.of(features), Gaussian.of(others))

"""The Fréchet distance between two sets of pictures, over given features.

Both sets are summed up as a Gaussian over their features; the distance is the 2-Wasserstein
distance of the two, squared (Heusel et al. 2017, arXiv 1706.08500, equation 6):

  |μ₁ − μ₂|² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½)

Over Inception's 2,048 features it is the FID. Over other features it has another scale, and its
values compare only with each other. It is biased: the fewer pictures, the larger it gets, so that
only distances over the same numbers of pictures compare.
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Gaussian:
  """What the Fréchet distance knows of a set of pictures.

  Attributes:
    mean: float64 [dim].
    covariance: float64 [dim, dim], the unbiased estimate.
  """

  mean: np.ndarray
  covariance: np.ndarray

  @classmethod
  def of(cls, features: np.ndarray) -> Gaussian:
    """Takes features, float [pictures, dim], of two pictures at least."""
    if features.ndim != 2 or len(features) < 2:
      raise ValueError(f'features are {list(features.shape)}; two pictures at least are needed')
    features = features.astype(np.float64)
    return cls(features.mean(axis=0), np.atleast_2d(np.cov(features, rowvar=False)))


def distance(one: Gaussian, other: Gaussian) -> float:
  """Returns the squared 2-Wasserstein distance of two Gaussians.

  tr((Σ₁ Σ₂)^½) is the sum of the singular values of Σ₁^½ Σ₂^½. Taken so, covariances of fewer
  pictures than features, which are singular, need no special care, as they do with a square root
  of the product itself, which isn't symmetric.

  Args:
    one: a Gaussian over [dim] features.
    other: a Gaussian over the same.

  Returns:
    The distance; not negative but for rounding.
  """
  product = _root(one.covariance) @ _root(other.covariance)
  between = np.sum(np.square(one.mean - other.mean))
  within = np.trace(one.covariance) + np.trace(other.covariance)
  return float(between + within - 2 * np.linalg.svd(product, compute_uv=False).sum())


def _root(covariance: np.ndarray) -> np.ndarray:
  """Returns the symmetric square root of a covariance, [dim, dim]."""
  values, vectors = np.linalg.eigh(covariance)
  return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def frechet_distance(features: np.ndarray, others: np.ndarray) -> float:
  """Returns the Fréchet distance of two sets of features, float [pictures, dim] each."""
  return distance(Gaussian.of(features), Gaussian.of(others))

"""The Fréchet distance between two sets of pictures, over given features, and its standard error.

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
from jaxtyping import Int

# Share of a covariance's largest entry that may be rounding in a file.
_ROUNDING = 1e-5


@dataclasses.dataclass(frozen=True)
class Moments:
  """Sums over a set's features, which batches and processes compute separately and then add.

  They are kept about the mean (Chan et al. 1979), so that float64 loses nothing where the features'
  deviations are small compared with their mean.

  Attributes:
    count: number of pictures.
    mean: mean of their features.
    scatter: sum of the products of the features' deviations from the mean.
  """

  count: int
  mean: Float64[np.ndarray, 'dim']
  scatter: Float64[np.ndarray, 'dim dim']

  @classmethod
  def of(cls, features: Float[np.ndarray, 'pictures dim']) -> Moments:
    """Sums over the features of at least one picture."""
    if features.ndim != 2 or not len(features):
      raise ValueError(f'features are {list(features.shape)}; at least one picture is needed')
    features = features.astype(np.float64)
    mean = features.mean(axis=0)
    features -= mean
    return cls(len(features), mean, features.T @ features)

  def __add__(self, other: Moments) -> Moments:
    count = self.count + other.count
    apart = other.mean - self.mean
    return Moments(
      count,
      self.mean + apart * (other.count / count),
      self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count),
    )

  def gaussian(self) -> Gaussian:
    """Estimates the Gaussian of at least two pictures."""
    if self.count < 2:
      raise ValueError('the features of at least two pictures are needed')
    return Gaussian(self.mean, self.scatter / (self.count - 1))


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
    return Moments.of(features).gaussian()


def is_covariance(matrix: Float64[np.ndarray, 'dim dim']) -> bool:
  """Returns whether a finite matrix is symmetric and has no negative eigenvalue, but for rounding."""
  # Statistics may have been computed and stored in float32, and from fewer pictures than features.
  most = _ROUNDING * np.abs(matrix).max(initial=0.0)
  if np.abs(matrix - matrix.T).max(initial=0.0) > most:
    return False
  return bool(np.linalg.eigvalsh(_symmetric(matrix)).min(initial=0.0) >= -len(matrix) * most)


def distance(one: Gaussian, other: Gaussian) -> float:
  """Returns the squared 2-Wasserstein distance of two Gaussians.

  tr((Σ₁ Σ₂)^½) is the sum of the square roots of the eigenvalues of the symmetric Σ₁^½ Σ₂ Σ₁^½. They are
  found as the singular values of its factor Σ₁^½ Σ₂^½, since the root of an eigenvalue of 0, but for
  rounding, wouldn't be small. This form also works for singular covariances of fewer pictures than
  features. The square root of the product itself, which isn't symmetric, would need special care there.

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


class Influence:
  """How much each picture of a set moves the distance to another set: its influence function.

  The standard error of a distance is the standard deviation of its pictures' influences, divided by
  the root of their number (the delta method). The other set counts as fixed. The gradient of the
  distance by the covariance Σ₁ is I − T, where T = Σ₁^−½ (Σ₁^½ Σ₂ Σ₁^½)^½ Σ₁^−½ transports one
  Gaussian to the other (Dowson and Landau 1982).

  Args:
    one: the Gaussian of the pictures, with a covariance that isn't singular.
    other: the Gaussian of the other set.
  """

  def __init__(self, one: Gaussian, other: Gaussian):
    root = _root(one.covariance)
    inner = _root(_symmetric(root @ other.covariance @ root))
    inverse = _root(one.covariance, inverse=True)
    self._mean = one.mean
    self._slope = 2 * (one.mean - other.mean)
    self._gradient = np.eye(len(root)) - inverse @ inner @ inverse
    self._offset = float(np.sum(self._gradient * one.covariance))

  def of(self, features: Float[np.ndarray, 'pictures dim']) -> Float64[np.ndarray, 'pictures']:
    """Returns the influence of pictures of the set; its mean over the set is 0."""
    apart = features.astype(np.float64) - self._mean
    return apart @ self._slope + np.einsum('pd,pd->p', apart @ self._gradient, apart) - self._offset


def standard_error(
  influence: Float64[np.ndarray, 'pictures'], group_of: Int[np.ndarray, 'pictures']
) -> float | None:
  """Returns the standard error of a distance whose pictures were drawn in groups.

  Pictures of one prompt resemble each other, so that only prompts are independent, and the influences of
  a prompt's pictures are summed first (Liang and Zeger 1986). If each picture is a group, this is the
  deviation of the influences divided by the root of their number.

  Args:
    influence: the influence of each picture, from `Influence`.
    group_of: index of the group of each picture, such as its prompt.

  Returns:
    The error; None for fewer than two groups.
  """
  sums = np.bincount(group_of, influence)[np.bincount(group_of) > 0]
  if len(sums) < 2:
    return None
  apart = sums - sums.mean()
  return float((np.sum(np.square(apart)) * len(sums) / (len(sums) - 1)) ** 0.5 / len(influence))


def _symmetric(matrix: Float64[np.ndarray, 'dim dim']) -> Float64[np.ndarray, 'dim dim']:
  """Removes what rounding makes asymmetric."""
  return (matrix + matrix.T) / 2


def _root(
  covariance: Float64[np.ndarray, 'dim dim'], inverse: bool = False
) -> Float64[np.ndarray, 'dim dim']:
  """Returns the symmetric square root of a covariance, or the inverse of that."""
  values, vectors = np.linalg.eigh(covariance)
  values = values.clip(min=0)
  if inverse:
    # Directions without variance, but for rounding, have no influence.
    kept = values > values.max(initial=0.0) * len(values) * np.finfo(np.float64).eps
    values = np.divide(1.0, values, out=np.zeros_like(values), where=kept)
  return (vectors * np.sqrt(values)) @ vectors.T


def frechet_distance(
  features: Float[np.ndarray, 'pictures dim'], others: Float[np.ndarray, 'others dim']
) -> float:
  """Returns the Fréchet distance of two sets of features."""
  return distance(Gaussian.of(features), Gaussian.of(others))

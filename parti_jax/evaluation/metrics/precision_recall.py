"""Precision and recall of pictures, over given features (Kynkäänniemi et al. 2019).

arXiv 1904.06991, section 3: the manifold of a set is the union of balls around its pictures'
features. The radius of each ball is the distance to the k-th nearest neighbor in the set.
Precision is the share of generated pictures on the manifold of the real ones (are they good?).
Recall is the share of real pictures on the manifold of the generated ones (are they all covered?).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float
from jaxtyping import Float64

NEIGHBORS = 3

# Bytes of distances held at once.
_BLOCK_BYTES = 1 << 27
# Squared distances below this share of the largest squared norm are rounding errors, set to 0, and so
# are such differences of them.
_ROUNDING = 1e-13


@dataclasses.dataclass(frozen=True)
class PrecisionRecall:
  """Both shares, in [0, 1]."""

  precision: float
  recall: float


def precision_recall(
  generated: Float[np.ndarray, 'generated dim'],
  real: Float[np.ndarray, 'real dim'],
  neighbors: int = NEIGHBORS,
) -> PrecisionRecall:
  """Measures precision and recall.

  The distances are computed in blocks of at most 128 MiB, regardless of the number of pictures.

  Args:
    generated: features of generated pictures.
    real: features of real pictures.
    neighbors: k; the paper uses 3.

  Returns:
    Precision and recall.

  Raises:
    ValueError: a set has at most k pictures, so the balls are undefined.
  """
  for name, features in (('generated', generated), ('real', real)):
    if len(features) <= neighbors:
      raise ValueError(f'{len(features)} {name} pictures; more than {neighbors} are needed')
  # Relative to an origin near both sets, float64 represents the squared distances accurately
  # enough.
  origin = real.mean(axis=0, dtype=np.float64)
  generated = generated.astype(np.float64) - origin
  real = real.astype(np.float64) - origin
  return PrecisionRecall(
    precision=_share_inside(generated, real, _squared_radii(real, neighbors)),
    recall=_share_inside(real, generated, _squared_radii(generated, neighbors)),
  )


def _squared_radii(
  features: Float64[np.ndarray, 'points dim'], neighbors: int
) -> Float64[np.ndarray, 'points']:
  """Returns each point's squared distance to its k-th neighbor, excluding itself."""
  radii = []
  for block, distances in _squared_distances(features, features):
    # A point isn't its own neighbor, but other points at the same position are.
    distances[np.arange(len(distances)), np.arange(block.start, block.start + len(distances))] = (
      np.inf
    )
    radii.append(np.partition(distances, neighbors - 1, axis=1)[:, neighbors - 1])
  return np.concatenate(radii)


def _share_inside(
  points: Float64[np.ndarray, 'points dim'],
  centers: Float64[np.ndarray, 'balls dim'],
  squared_radii: Float64[np.ndarray, 'balls'],
) -> float:
  """Returns the share of points that lie in any of the balls."""
  # A point on the surface of a ball is inside, whatever rounding makes of its distance.
  norms = np.einsum('pd,pd->p', centers, centers)
  squared_radii = squared_radii + _ROUNDING * norms.max()
  inside = [
    (distances <= squared_radii).any(axis=1) for _, distances in _squared_distances(points, centers)
  ]
  return float(np.concatenate(inside).mean())


def _squared_distances(
  points: Float64[np.ndarray, 'points dim'], others: Float64[np.ndarray, 'others dim']
) -> Iterator[tuple[slice, Float64[np.ndarray, 'block others']]]:
  """Yields blocks of points, as slices, and their squared distances to all others."""
  rows = max(1, _BLOCK_BYTES // (8 * len(others)))
  norms = np.einsum('pd,pd->p', others, others)
  for start in range(0, len(points), rows):
    block = slice(start, start + rows)
    chosen = points[block]
    distances = chosen @ others.T
    distances *= -2
    distances += np.einsum('pd,pd->p', chosen, chosen)[:, None]
    distances += norms
    distances[distances < _ROUNDING * norms.max()] = 0.0
    yield block, distances

"""How well pictures are reconstructed: PSNR and SSIM of pairs of pictures, and the use of codes."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Float32
from jaxtyping import Float64
from jaxtyping import Int
from jaxtyping import UInt8

# Squared differences below this one count as this one, so that the PSNR of equal pictures is finite.
_LEAST_ERROR = 1e-6
# SSIM (Wang et al. 2004): a Gaussian window of 11 × 11 pixels with a deviation of 1.5, and the constants
# K₁ and K₂ for values in [0, 1].
WINDOW = 11
_DEVIATION = 1.5
_C1, _C2 = 0.01**2, 0.03**2


def psnr(
  images: UInt8[np.ndarray, 'pictures height width 3'],
  originals: UInt8[np.ndarray, 'pictures height width 3'],
) -> Float64[np.ndarray, 'pictures']:
  """Returns the PSNR of each picture in dB, of at most 108: 10 · log₁₀(255² / mean squared error)."""
  error = np.mean((images.astype(np.float64) - originals) ** 2, axis=(1, 2, 3))
  return 10.0 * np.log10(255.0**2 / np.maximum(error, _LEAST_ERROR))


def ssim(
  images: UInt8[Array, 'pictures height width 3'],
  originals: UInt8[Array, 'pictures height width 3'],
) -> Float32[Array, 'pictures']:
  """Returns the structural similarity of each pair, in [-1, 1].

  As Wang et al. 2004 define it, over each color by itself: a Gaussian window, and the mean over all
  places where the window lies within the picture. scikit-image has it as
  `structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False)`; without these
  arguments it uses a uniform window of 7 × 7, which gives other numbers.

  Args:
    images: pictures of at least WINDOW pixels in height and width.
    originals: the pictures to compare them with.
  """
  x, y = (array.astype(jnp.float32) / 255.0 for array in (images, originals))
  mean_x, mean_y = _averaged(x), _averaged(y)
  # Deviations from a constant keep float32 accurate where pictures are bright.
  x, y = x - 0.5, y - 0.5
  near_x, near_y = mean_x - 0.5, mean_y - 0.5
  variance_x = _averaged(x * x) - near_x**2
  variance_y = _averaged(y * y) - near_y**2
  covariance = _averaged(x * y) - near_x * near_y
  places = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
    (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
  )
  return jnp.mean(places, axis=(1, 2, 3))


def _averaged(x: Float[Array, 'pictures height width 3']) -> Float[Array, 'pictures _ _ 3']:
  """Averages with the window, one axis after the other, where it lies within the picture."""
  window = _window()
  for axis in (1, 2):
    size = x.shape[axis] - WINDOW + 1
    parts = (
      weight * jax.lax.slice_in_dim(x, start, start + size, axis=axis)
      for start, weight in enumerate(window.tolist())
    )
    x = functools.reduce(jnp.add, parts)
  return x


def _window() -> Float64[np.ndarray, 'window']:
  places = np.arange(WINDOW) - WINDOW // 2
  weights = np.exp(-(places**2) / (2 * _DEVIATION**2))
  return weights / weights.sum()


class CodeUse(NamedTuple):
  """How a set of pictures uses the codes of a tokenizer.

  Attributes:
    used: share of the codes that occur.
    perplexity: exp of the entropy of the codes, the number of equally frequent codes with it.
  """

  used: float
  perplexity: float


def code_use(counts: Int[np.ndarray, 'codes']) -> CodeUse:
  """Returns the use of codes that occur `counts` times, at least one of them."""
  shares = counts[counts > 0] / counts.sum()
  return CodeUse(float(np.mean(counts > 0)), float(np.exp(-np.sum(shares * np.log(shares)))))

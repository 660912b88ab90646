"""PSNR, SSIM and the use of codes against plain copies of their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage

from parti_jax.evaluation.metrics import reconstruction

DRAW = np.random.default_rng(0)
ORIGINALS = scipy.ndimage.gaussian_filter(
  DRAW.integers(0, 256, (3, 20, 24, 3)).astype(float), (0, 1, 1, 0)
).astype(np.uint8)
ORIGINALS[0] = 250  # Flat and bright, where float32 sums of squares lose the most.
IMAGES = np.clip(ORIGINALS.astype(int) + DRAW.integers(-30, 31, ORIGINALS.shape), 0, 255).astype(
  np.uint8
)


def _ssim(one, other):
  """Of two channels with values in [0, 1], by scipy's filter."""
  average = lambda x: scipy.ndimage.gaussian_filter(x, 1.5, truncate=3.5)[5:-5, 5:-5]
  mean_1, mean_2 = average(one), average(other)
  variance_1, variance_2 = average(one**2) - mean_1**2, average(other**2) - mean_2**2
  covariance = average(one * other) - mean_1 * mean_2
  return np.mean(
    (2 * mean_1 * mean_2 + 0.01**2)
    * (2 * covariance + 0.03**2)
    / ((mean_1**2 + mean_2**2 + 0.01**2) * (variance_1 + variance_2 + 0.03**2))
  )


def test_ssim_is_wangs():
  expected = [
    np.mean([_ssim(one[..., color] / 255, other[..., color] / 255) for color in range(3)])
    for one, other in zip(IMAGES, ORIGINALS)
  ]
  found = jax.jit(reconstruction.ssim)(jnp.asarray(IMAGES), jnp.asarray(ORIGINALS))
  np.testing.assert_allclose(found, expected, atol=1e-4)
  assert 0.05 < min(expected) < max(expected) < 0.95
  same = jax.jit(reconstruction.ssim)(jnp.asarray(ORIGINALS), jnp.asarray(ORIGINALS))
  np.testing.assert_allclose(same, 1, atol=1e-5)


def test_ssim_is_scikit_images():
  metrics = pytest.importorskip('skimage.metrics')
  expected = [
    metrics.structural_similarity(
      one, other, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    for one, other in zip(IMAGES, ORIGINALS)
  ]
  found = reconstruction.ssim(jnp.asarray(IMAGES), jnp.asarray(ORIGINALS))
  np.testing.assert_allclose(found, expected, atol=1e-4)


def test_psnr_by_hand():
  one = np.zeros((2, 4, 4, 3), np.uint8)
  other = one.copy()
  other[0, 0, 0, 0] = 48  # A mean squared error of 48.
  np.testing.assert_allclose(
    reconstruction.psnr(one, other), [10 * np.log10(255**2 / 48), 10 * np.log10(255**2 / 1e-6)]
  )


def test_the_use_of_codes():
  found = reconstruction.code_use(np.array([5, 5, 0, 5, 5, 0, 0, 0]))
  assert found.used == 0.5 and found.perplexity == pytest.approx(4)
  assert reconstruction.code_use(np.array([7, 0])) == (0.5, 1.0)

"""The FID's resizing against loops; tests/references/test_inception.py compares the network."""

import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import inception


def _resized(image, size):
  """As TensorFlow 1's resize_bilinear with align_corners=False, by loops."""
  height, width = image.shape[:2]
  found = np.empty((size, size, 3))
  for row in range(size):
    for column in range(size):
      y, x = row * height / size, column * width / size
      top, left = int(y), int(x)
      bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
      upper = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
      lower = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
      found[row, column] = upper + (lower - upper) * (y - top)
  return found


@pytest.mark.parametrize('shape', [(5, 9), (17, 13), (40, 31)])
def test_resizing_is_tensorflow_1s(shape):
  images = np.random.default_rng(0).uniform(0, 255, (2, *shape, 3)).astype(np.float32)
  found = inception.resized(jnp.asarray(images), 13)
  expected = [_resized(image.astype(np.float64), 13) for image in images]
  np.testing.assert_allclose(found, expected, atol=1e-2)


def test_a_picture_of_the_size_stays_as_it_is():
  images = np.random.default_rng(0).uniform(0, 255, (1, 13, 13, 3)).astype(np.float32)
  np.testing.assert_array_equal(inception.resized(jnp.asarray(images), 13), images)

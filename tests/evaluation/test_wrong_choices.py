"""How much each wrong choice in the preparation of pictures changes a Fréchet distance.

The same pictures of OpenMoji, prepared as they should be and in another way: the right distance is 0.
`pytest -s` prints the table of docs/measurements.md.
"""

import io

import numpy as np
import pytest
from PIL import Image

from parti_jax.data import openmoji
from parti_jax.evaluation.metrics import features
from parti_jax.evaluation.metrics import frechet
from parti_jax.sampling import text_to_image

LARGE, SIZE, COUNT = 160, 64, 160


@pytest.fixture(scope='module', name='pictures')
def fixture_pictures():
  """Pictures of OpenMoji at a size above that of the network."""
  every = openmoji.pictures()
  return np.stack([openmoji.render(every[place].code, LARGE) for place in range(0, 20 * COUNT, 20)])


@pytest.fixture(scope='module', name='gaussian')
def fixture_gaussian():
  """Computes the Gaussian of pictures over the features of the demo's ranker."""
  ranker = text_to_image.load(None).ranker

  def gaussian(images):
    return frechet.Gaussian.of(ranker.image_features(images))

  return gaussian


def _pillow(images, filter_):
  return np.stack(
    [np.asarray(Image.fromarray(image).resize((SIZE, SIZE), filter_)) for image in images]
  )


def _plain_bilinear(images):
  """Bilinear without antialiasing, as torch's and TensorFlow's functions do unless told otherwise."""
  places = (np.arange(SIZE) + 0.5) * LARGE / SIZE - 0.5
  lower = np.floor(places).astype(int)
  weight = places - lower
  mixed = lambda x, axis: np.moveaxis(
    np.moveaxis(np.take(x, lower, axis), axis, -1) * (1 - weight)
    + np.moveaxis(np.take(x, lower + 1, axis), axis, -1) * weight,
    -1,
    axis,
  )
  return mixed(mixed(images.astype(float), 1), 2)


def _jpeg(images, quality):
  found = []
  for image in images:
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'JPEG', quality=quality)
    found.append(np.asarray(Image.open(file)))
  return np.stack(found)


@pytest.mark.slow
def test_each_wrong_choice_changes_the_distance(pictures, gaussian):
  rounded = lambda values: np.clip(np.round(values), 0, 255).astype(np.uint8)
  exact = features.clean_resized(pictures, SIZE)
  right = rounded(exact)
  wrong = {
    'bicubic of bytes, which are rounded between its passes': features.resized(pictures, SIZE),
    'bilinear with antialiasing': _pillow(pictures, Image.Resampling.BILINEAR),
    'Lanczos with antialiasing': _pillow(pictures, Image.Resampling.LANCZOS),
    'box (average of areas)': _pillow(pictures, Image.Resampling.BOX),
    'bilinear without antialiasing': rounded(_plain_bilinear(pictures)),
    'nearest neighbor': _pillow(pictures, Image.Resampling.NEAREST),
    'JPEG, quality 95': _jpeg(right, 95),
    'JPEG, quality 75': _jpeg(right, 75),
    'bytes cut off instead of rounded': exact.astype(np.uint8),
    'drawn at 32 pixels and enlarged': _pillow(
      features.resized(pictures, SIZE // 2), Image.Resampling.BICUBIC
    ),
  }
  of_right = gaussian(right)
  assert frechet.distance(of_right, gaussian(right.copy())) == pytest.approx(0, abs=1e-9)
  distances = {name: frechet.distance(of_right, gaussian(images)) for name, images in wrong.items()}
  print('\n| prepared by | Fréchet distance |\n|---|---:|')
  for name, distance in distances.items():
    print(f'| {name} | {distance:.6f} |')
  assert min(distances.values()) > 1e-7
  assert distances['nearest neighbor'] > distances['bilinear without antialiasing']
  assert distances['JPEG, quality 75'] > distances['JPEG, quality 95']

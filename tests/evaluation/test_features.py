"""Tests of the networks that compute features."""

import evaluation_fakes as fakes
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from parti_jax.core.errors import UserError
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features
from parti_jax.importers import inception_file
from parti_jax.models import inception


def test_pictures_are_resized_without_aliasing():
  stripes = np.zeros((2, 64, 64, 3), np.uint8)
  stripes[:, :, ::2] = 255
  small = features.resized(stripes, 8)
  assert small.shape == (2, 8, 8, 3) and abs(small.astype(int) - 127).max() < 40
  assert features.resized(stripes, 64) is stripes


def test_the_rankers_features_come_in_batches_of_any_size():
  extractor = features.RankerFeatures(fakes.FakeRanker(fakes.render), 'demo')
  images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
  whole = features.extract(extractor, [images])
  parts = features.extract(extractor, [images[:2], images[2:]])
  assert whole.values.shape == (5, 3 * fakes.SIZE**2) and whole.logits is None
  np.testing.assert_array_equal(whole.values, parts.values)
  assert 'ranker of the model demo' in extractor.name


def test_captions_that_the_ranker_cuts_are_counted_with_the_longest_prefix():
  ranker = fakes.FakeRanker(lambda text, _: fakes.render(text))
  ranker.longest = len('A photo depicts ') + 5
  extractor = features.RankerFeatures(ranker, 'demo')
  captions = ['five.', 'six...', 'a' * ranker.longest, 'a' * (ranker.longest + 1)]
  assert extractor.cut(captions) == 1
  ranker.kind = 'clip'
  assert extractor.cut(captions) == 3
  images = np.zeros((4, 16, 16, 3), np.uint8)
  table = distribution.of_pictures(
    extractor, captions, np.arange(4), images, images, images[:, None]
  )
  assert [line for line in table.remarks if line.endswith('its text length: 3 captions.')]


def test_available_networks_are_used():
  pipeline = fakes.FakePipeline(fakes.render)
  assert features.of_flags(pipeline, None, 256) == []
  pipeline.ranker = fakes.FakeRanker(fakes.render)
  (extractor,) = features.of_flags(pipeline, None, 256)
  assert extractor.image_size == fakes.SIZE


SMALL = inception.Inception(size=75, divisor=16)


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tmp_path_factory):
  """A file in the format of Inception's weights, of a small network."""
  draw = np.random.default_rng(0)
  arrays = {}
  shapes = traverse_util.flatten_dict(inception.abstract_params(SMALL), sep='/')
  for path, source in inception_file.key_map(SMALL).items():
    shape = shapes[path].shape
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[len(shape)]
    scale = (2 / np.prod(shape[:-1])) ** 0.5 if len(shape) == 4 else 0.1
    values = draw.normal(size=shape, scale=scale)
    values += path.endswith(('scale', 'variance'))
    arrays[source.names[0]] = np.ascontiguousarray(values.astype(np.float32).transpose(order))
  path = tmp_path_factory.mktemp('weights') / 'inception.safetensors'
  safetensors.numpy.save_file(arrays, path)
  return str(path)


def test_inceptions_features_come_in_batches_of_any_size(weights):
  extractor = features.Inception(weights, image_size=32, spatial=True, module=SMALL)
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
  found = features.extract(extractor, [images[:1], images[1:]])
  whole = features.extract(extractor, [images])
  assert found.values.shape == (3, 128) and found.logits.shape == (3, 1008)
  assert found.spatial.shape == (3, 3 * 3 * 7)
  for name in ('values', 'logits', 'spatial'):
    np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    assert np.ptp(getattr(found, name), axis=0).max() > 0
  np.testing.assert_array_equal(found[[2, 0]].spatial, whole.spatial[[2, 0]])
  assert 'inception.safetensors' in extractor.name and '32 pixels' in extractor.name
  assert extractor.texts(['a']) is None and len(extractor.digest) == 64


def test_pictures_are_resized_as_clean_fid_does():
  """By the definition: bicubic with a = -0.5, stretched by the factor, in both directions."""
  images = np.random.default_rng(0).integers(0, 256, (2, 24, 30, 3), dtype=np.uint8)

  def matrix(old, new):
    factor = max(old / new, 1)
    centers = (np.arange(new) + 0.5) * old / new
    x = np.abs((np.arange(old) + 0.5 - centers[:, None]) / factor)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0))
    return weights / weights.sum(axis=1, keepdims=True)

  expected = np.einsum('ah,bw,nhwc->nabc', matrix(24, 9), matrix(30, 9), images.astype(float))
  found = features.clean_resized(images, 9)
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, expected.clip(0, 255), atol=1e-2)


def test_inception_sees_cleanly_resized_pictures_as_they_are(weights):
  images = np.random.default_rng(0).integers(0, 256, (2, 160, 160, 3), dtype=np.uint8)
  extractor = features.Inception(weights, None, module=SMALL, resize='clean')
  assert extractor.resizes and 'their own size' in extractor.name
  found = extractor(images)
  assert found.spatial is None
  # Pictures of the network's size stay as they are.
  rounded = extractor(features.resized(images, SMALL.size)).values
  aliased = inception.resized(jnp.asarray(images, jnp.float32), SMALL.size)
  others = extractor(np.asarray(aliased).astype(np.uint8)).values
  assert np.abs(others - found.values).max() > 3 * np.abs(rounded - found.values).max() > 0


@pytest.mark.parametrize('content', [b'no weights', b''])
def test_a_file_with_other_content(tmp_path, content):
  path = tmp_path / 'weights.pth'
  path.write_bytes(content)
  with pytest.raises(UserError, match='weights.pth does not hold the weights of Inception v3'):
    features.Inception(str(path))


def test_the_weights_of_another_network(weights):
  with pytest.raises(UserError, match='does not hold the weights.*Conv2d_1a_3x3'):
    features.Inception(weights)

"""Tests of the networks that compute features."""

import evaluation_fakes as fakes
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.evaluation.metrics import distribution
from parti_jax.evaluation.metrics import features


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
  assert [line for line in table.remarks if line.startswith('Alignment: 3 captions are longer')]


def test_available_networks_are_used():
  pipeline = fakes.FakePipeline(fakes.render)
  assert features.of_flags(pipeline, None, 256) == []
  pipeline.ranker = fakes.FakeRanker(fakes.render)
  (extractor,) = features.of_flags(pipeline, None, 256)
  assert extractor.image_size == fakes.SIZE


@pytest.fixture(name='weights', scope='module')
def fixture_weights(tmp_path_factory):
  """A file in the format of Inception's weights, with random values."""
  torch = pytest.importorskip('torch')
  module = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
  torch.manual_seed(0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(module, 'load_state_dict_from_url', lambda *args, **kwargs: {})
    patch.setattr(module.FeatureExtractorInceptionV3, 'load_state_dict', lambda self, state: None)
    network = module.FeatureExtractorInceptionV3('random', ['2048'])
  path = tmp_path_factory.mktemp('weights') / features.INCEPTION_FILE
  torch.save(network.state_dict(), path)
  return path


def test_inception_through_torch_fidelity(weights):
  extractor = features.Inception(str(weights), image_size=32)
  images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)
  found = features.extract(extractor, [images[:1], images[1:]])
  assert found.values.shape == (3, 2048) and found.logits.shape == (3, 1008)
  assert np.ptp(found.values, axis=0).max() > 0
  assert features.INCEPTION_FILE in extractor.name and '32 pixels' in extractor.name
  assert extractor.texts(['a']) is None


@pytest.mark.parametrize('content', [b'no weights', b'', {'fc.weight': [1.0]}])
def test_a_file_with_other_content(tmp_path, content):
  torch = pytest.importorskip('torch')
  pytest.importorskip('torch_fidelity')
  path = tmp_path / 'weights.pth'
  if isinstance(content, bytes):
    path.write_bytes(content)
  else:
    torch.save({key: torch.tensor(value) for key, value in content.items()}, path)
  with pytest.raises(UserError, match='weights.pth does not hold weights of Inception v3'):
    features.Inception(str(path))

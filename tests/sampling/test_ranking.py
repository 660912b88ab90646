"""The ranker's features and scores, and pictures in the order of their scores."""

import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.models import coca
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import ranking
from parti_jax.sampling import text_to_image


@pytest.fixture(scope='session', name='part')
def fixture_part(parts):
  """A ranker with random parameters, as a part of a model folder."""
  config = coca.CoCaConfig(
    image_size=8,
    patch_size=4,
    image_layers=1,
    unimodal_layers=1,
    multimodal_layers=1,
    width=16,
    mlp_width=32,
    heads=2,
    caption_queries=2,
    feature_dim=8,
    text_vocabulary=parts['generator_config'].text_vocabulary,
    text_length=24,
    dtype='float32',
  )
  params = random_parameters.of(coca.CoCa(config), coca.example_inputs(config), 2, factor=2.0)
  return model_folder.Part(config, params)


@pytest.fixture(scope='session', name='ranker')
def fixture_ranker(part, parts):
  return ranking.Ranker(*part[:2], vocabulary.TextVocabulary(parts['vocabulary_path']))


@pytest.fixture(scope='session', name='pipeline')
def fixture_pipeline(part, parts, tmp_path_factory):
  folder = model_folder.save(
    tmp_path_factory.mktemp('models') / 'ranked', dtype='float32', parts={'ranker': part}, **parts
  )
  return text_to_image.load(folder)


def _images(count, size=8):
  return np.random.default_rng(0).integers(0, 256, (count, size, size, 3)).astype(np.uint8)


def test_features_are_unit_vectors_whatever_the_batch(ranker):
  features = ranker.image_features(_images(5))
  assert features.shape == (5, 8) and features.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
  np.testing.assert_allclose(ranker.image_features(_images(5)[3:4]), features[3:4], atol=1e-5)
  texts = ranker.text_features(['red apple', 'green apple'])
  np.testing.assert_allclose(ranker.text_features(['green apple']), texts[1:], atol=1e-5)
  assert np.abs(texts[0] - texts[1]).max() > 1e-3
  assert ranker.image_features(_images(0)).shape == (0, 8)


def test_scores_are_the_cosines_of_pairs(ranker):
  texts, images = ['red apple', 'blue ball', 'red apple'], _images(3)
  scores = ranker.scores(texts, images)
  expected = np.sum(ranker.text_features(texts) * ranker.image_features(images), axis=1)
  np.testing.assert_allclose(scores, expected, atol=1e-6)
  assert scores.dtype == np.float32
  with pytest.raises(UserError, match='3 texts for 2 pictures'):
    ranker.scores(texts, images[:2])


@pytest.mark.parametrize(
  'texts, images, message',
  [
    (None, np.zeros((1, 8, 8, 3), np.uint8), 'texts=None must be a string or a list of strings'),
    ([5], np.zeros((1, 8, 8, 3), np.uint8), 'text 1 is 5, which is not a string'),
    (['red'], None, 'images are object'),
    (['red'], [[1], [1, 2]], 'images='),
  ],
)
def test_what_can_not_be_judged(ranker, texts, images, message):
  with pytest.raises(UserError, match=f'^{message}'):
    ranker.scores(texts, images)


def test_pictures_of_another_size_are_resized(ranker):
  colors = np.array([[200, 30, 60], [10, 90, 250]], np.uint8)[:, None, None]
  small, large = (np.tile(colors, (1, size, size, 1)) for size in (8, 20))
  features = ranker.image_features(small)
  assert np.abs(features[0] - features[1]).max() > 1e-3
  np.testing.assert_allclose(ranker.image_features(large), features, atol=1e-5)
  with pytest.raises(UserError, match='uint8'):
    ranker.image_features(small.astype(np.float32))


def test_generated_pictures_stand_best_first(pipeline, tmp_path):
  prompts = ['red apple', 'blue ball']
  plain = pipeline.generate(prompts, num_images=5, seed=3)
  ranked = pipeline.generate(prompts, num_images=5, seed=3, rank=True)
  assert plain.scores is None and ranked.scores.shape == (2, 5)
  assert (np.diff(ranked.scores, axis=1) <= 0).all() and np.ptp(ranked.scores) > 0
  for row, prompt in enumerate(prompts):
    assert sorted(ranked.image_index[row]) == list(range(5))
    np.testing.assert_array_equal(ranked.images[row], plain.images[row][ranked.image_index[row]])
    np.testing.assert_array_equal(ranked.tokens[row], plain.tokens[row][ranked.image_index[row]])
    np.testing.assert_allclose(
      ranked.scores[row], pipeline.ranker.scores([prompt] * 5, ranked.images[row]), atol=1e-5
    )
  files = ranked.save(tmp_path)
  assert files[:5] == sorted(files[:5]) and 'rank1' in files[0].name
  metadata = images_lib.read_metadata(files[1])
  assert metadata['rank'] == '2' and metadata['score'] == f'{ranked.scores[0, 1]:.4f}'
  assert metadata['image_index'] == str(ranked.image_index[0, 1])
  assert images_lib.read_metadata(ranked.save_grid(tmp_path))['order'] == 'ranked, best first'


def test_a_mesh_gives_the_same_features(part, parts, ranker):
  place = text_to_image.placement.Placement(mesh_lib.make_mesh(2, 2, 2, 1))
  spread = ranking.Ranker(*part[:2], vocabulary.TextVocabulary(parts['vocabulary_path']), place)
  np.testing.assert_allclose(
    spread.image_features(_images(5)), ranker.image_features(_images(5)), atol=1e-5
  )


def test_a_model_without_a_ranker_says_so(tiny_folder):
  pipeline = text_to_image.load(tiny_folder)
  assert pipeline.ranker is None
  with pytest.raises(UserError, match='has no ranker.*export'):
    pipeline.generate('red apple', num_images=2, rank=True)


def test_a_ranker_of_another_vocabulary_is_refused(part, parts):
  config = coca.CoCaConfig(**{**vars(part.config), 'text_vocabulary': 8})
  with pytest.raises(UserError, match='the ranker knows 8'):
    ranking.Ranker(config, part.params, vocabulary.TextVocabulary(parts['vocabulary_path']))

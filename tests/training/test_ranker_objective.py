"""The ranker's losses by formula, how it varies pictures, retrieval, and a run from a folder."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import coca
from parti_jax.models import contrastive
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import ranker_objective

SIZES = tiny_configs.RANKER
TOKENIZER = tiny_configs.TOKENIZER


def _batch():
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
  texts = np.array([[3, 4, 1, 0], [5, 1, 0, 0], [3, 4, 1, 0], [6, 7, 8, 1]], np.int32)
  return {'images': images, 'encoder_input_tokens': texts}


def _keys(batch=4):
  return layers.dropout_keys(jax.random.key(1), batch)


def test_the_loss_is_the_weighted_sum_of_both():
  objective = ranker_objective.RankerObjective(SIZES, contrastive_weight=0.5, caption_weight=3.0)
  params, batch = random_parameters.of_objective(objective), _batch()
  loss, aux = jax.jit(objective.loss)(params, batch, _keys(), 0)
  out = jax.jit(coca.CoCa(SIZES).apply)(
    {'params': params}, batch['images'] / np.float32(255), batch['encoder_input_tokens']
  )
  same = np.zeros((4, 4), bool)
  same[0, 2] = same[2, 0] = True  # The same text twice.
  pairs, _ = contrastive.contrastive_losses(
    out['image_features'], out['text_features'], out['logit_scale'], jnp.asarray(same)
  )
  chance = np.asarray(jax.nn.log_softmax(out['logits']))
  captions = [
    -np.mean([chance[row, i, token] for i, token in enumerate(text) if token])
    for row, text in enumerate(batch['encoder_input_tokens'])
  ]
  np.testing.assert_allclose(loss, 0.5 * np.mean(pairs) + 3.0 * np.mean(captions), rtol=1e-5)
  np.testing.assert_allclose(aux['metrics']['caption_loss'], np.mean(captions), rtol=1e-5)
  each = jax.jit(objective.evaluate)(params, batch)
  np.testing.assert_allclose(each['caption_loss'], captions, rtol=1e-5)
  np.testing.assert_allclose(each['image_features'], out['image_features'], atol=2e-6)


def test_pictures_move_by_at_most_so_many_pixels_and_repeat_their_edge():
  images = jnp.asarray(np.random.default_rng(2).uniform(size=(40, 6, 5, 3)), jnp.float32)
  moved = np.asarray(ranker_objective.shifted(images, jax.random.split(jax.random.key(0), 40), 2))
  seen = set()
  for image, other in zip(images, moved):
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)), 'edge')
    found = [
      (down, right)
      for down in range(5)
      for right in range(5)
      if np.array_equal(padded[down : down + 6, right : right + 5], other)
    ]
    assert len(found) == 1
    seen.add(found[0])
  assert len(seen) > 15 and {0, 4} <= {down for down, _ in seen}


def test_noise_is_bounded_and_differs_by_picture():
  grey = jnp.full((50, 4, 4, 3), 0.5)
  noise = (
    np.asarray(ranker_objective.noisy(grey, jax.random.split(jax.random.key(0), 50), 0.1)) - 0.5
  )
  deviations = noise.std(axis=(1, 2, 3))
  assert deviations.max() < 0.14 and deviations.min() < 0.02
  assert np.mean(deviations) == pytest.approx(0.05, abs=0.01)
  white = np.asarray(
    ranker_objective.noisy(grey + 0.5, jax.random.split(jax.random.key(0), 50), 0.1)
  )
  assert white.max() <= 1


@pytest.fixture(name='tokenizer')
def fixture_tokenizer(monkeypatch):
  """A tokenizer with random parameters in place of a trained one; its module and parameters."""
  module = vit_vqgan.ViTVQGAN(TOKENIZER)
  params = jax.device_put(random_parameters.of(module, vit_vqgan.example_inputs(TOKENIZER), seed=3))
  monkeypatch.setattr(
    frozen_tokenizer, 'load', lambda path: frozen_tokenizer.FrozenTokenizer(path, TOKENIZER, params)
  )
  return module, params


def test_one_picture_of_so_many_goes_through_the_tokenizer(tokenizer):
  module, params = tokenizer
  objective = ranker_objective.RankerObjective(SIZES, tokenizer='run', reconstruct_every=2)
  images = _batch()['images']
  constants = objective.constants()
  varied = np.asarray(jax.jit(objective._varied)(constants, images, _keys()))
  plain = images / np.float32(255)
  tokens = module.apply({'params': params}, jnp.asarray(plain[::2]), method='tokenize')
  again = module.apply({'params': params}, tokens, method='detokenize')
  np.testing.assert_allclose(varied[::2], again, atol=1e-5)
  np.testing.assert_allclose(varied[1::2], plain[1::2], atol=1e-7)
  with pytest.raises(UserError, match='reconstruct_every=3 .* 4 examples'):
    jax.eval_shape(
      ranker_objective.RankerObjective(SIZES, tokenizer='run', reconstruct_every=3)._varied,
      constants,
      images,
      _keys(),
    )


def test_retrieval_counts_own_candidates_that_are_nearest():
  candidates = np.eye(4)[[0, 1, 2, 2]]
  queries = np.eye(4)[[0, 2, 2, 2]]
  assert ranker_objective.retrieval(queries, candidates) == 0.75


def test_values_that_can_not_be():
  with pytest.raises(UserError, match='RankerObjective.shift=-1'):
    ranker_objective.RankerObjective(SIZES, shift=-1)


def test_a_run_learns_captions_and_pictures_of_a_folder(tmp_path, pictures_folder):
  gin_config.parse(
    ['gin_configs/runs/tiny_ranker.gin'],
    [
      f"folder.path = '{pictures_folder}'",
      "folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}",
      "train.eval_split = 'validation'",
      'train.steps = 12',
      'train.log_every = 12',
      'warmup_cosine.warmup_steps = 2',
      'warmup_cosine.decay_steps = 100',
    ],
  )
  measured = train_loop.train(str(tmp_path / 'run'))
  assert measured['validation/caption_loss'] < 6  # log(2000) = 7.6 of the vocabulary.
  assert {'validation/text_of_image_top1', 'validation/image_of_text_top1'} <= set(measured)

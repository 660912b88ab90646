"""Objectives for pictures that aren't square: shapes, and what doesn't fit."""

import dataclasses
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_configs

from parti_jax.core.errors import UserError
from parti_jax.models import discriminator
from parti_jax.models import super_resolution
from parti_jax.models.nn import layers
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import tokenizer_objective

WIDE = (8, 16)
TOKENIZER = dataclasses.replace(tiny_configs.TOKENIZER, image_size=WIDE)
JUDGE = discriminator.DiscriminatorConfig(channels=16)
NETWORK = super_resolution.SuperResolutionConfig(
  factor=2, blocks=1, width=4, expansion=2, dtype='float32'
)
RANKER = dataclasses.replace(tiny_configs.RANKER, image_size=WIDE)


@pytest.fixture(autouse=True)
def tokenizer_of_wide_pictures(monkeypatch):
  abstract = tokenizer_objective.TokenizerObjective(TOKENIZER).init
  params = jax.tree.map(
    lambda leaf: np.full(leaf.shape, 0.1, leaf.dtype),
    nn.meta.unbox(jax.eval_shape(abstract, jax.random.key(0))),
  )
  monkeypatch.setattr(
    frozen_tokenizer,
    'load',
    lambda path: frozen_tokenizer.FrozenTokenizer(path, TOKENIZER, params),
  )


def upscaling(**more):
  return super_resolution_objective.SuperResolutionObjective(NETWORK, **more)


OBJECTIVES = {
  'tokenizer': lambda: tokenizer_objective.TokenizerObjective(
    TOKENIZER, adversarial_weight=0.1, discriminator=JUDGE
  ),
  'super-resolution': lambda: upscaling(
    image_size=(16, 32), tokenizer='runs/wide', adversarial_weight=0.1, discriminator=JUDGE
  ),
  'super-resolution of crops': lambda: upscaling(image_size=(16, 32), crop=8),
  'ranker': lambda: ranker_objective.RankerObjective(RANKER, tokenizer='runs/wide', shift=2),
}


@pytest.mark.parametrize('name', OBJECTIVES)
def test_objectives_train_on_wide_pictures(name):
  objective = OBJECTIVES[name]()
  batch = objective.abstract_batch(4)
  height, width = objective.feature_lengths()['images']
  assert width == 2 * height and batch['images'].shape == (4, height, width, 3)
  params = nn.meta.unbox(jax.eval_shape(objective.init, jax.random.key(0)))
  params |= objective.abstract_constants()
  keys = layers.dropout_keys(jax.random.key(1), 4)
  loss, _ = jax.eval_shape(objective.loss, params, batch, keys, jnp.int32(5))
  assert loss.shape == () and objective.step_flops(4) == 4 * objective.step_flops(1) > 0


def test_crops_come_from_the_whole_width():
  """The left and the right half of a picture differ; a crop of 8×8 of 8×16 sees either or both."""
  objective = upscaling(image_size=(16, 32), crop=8)
  params = nn.meta.unbox(jax.jit(objective.init)(jax.random.key(0)))
  images = np.zeros((64, 16, 32, 3), np.uint8)
  images[:, :, 16:] = 255
  keys = layers.dropout_keys(jax.random.key(1), 1)
  loss = jax.jit(objective.loss)
  seen = set()
  for row in range(24):
    key = dataclasses.replace(keys, rows=jnp.array([row], keys.rows.dtype))
    _, aux = loss(params, {'images': images[:1]}, key, 0)
    seen.add(float(aux['metrics']['l2']) > 1e-6)
  # Without an edge, a picture of one color is enlarged exactly.
  assert seen == {False, True}


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda: upscaling(image_size=(16, 31)), 'image_size=(16, 31) is not divisible by 2'),
    (lambda: upscaling(image_size=(16, 32), crop=16), 'crop=16 must be .* at most 8'),
    (
      lambda: upscaling(image_size=(32, 16), tokenizer='runs/wide').constants(),
      'image_size=(32, 16) is not .*factor=2 times the 8×16 pixels of the tokenizer',
    ),
    (
      lambda: ranker_objective.RankerObjective(
        dataclasses.replace(RANKER, image_size=8), tokenizer='runs/wide'
      ).constants(),
      'has images of 8×16 pixels, but CoCaConfig.image_size=8',
    ),
    (
      lambda: tokenizer_objective.TokenizerObjective(TOKENIZER, perceptual_weight=0.1),
      'images of at least 16 pixels; .*image_size=(8, 16)',
    ),
  ],
)
def test_what_does_not_fit_ends_before_the_first_step(make, message):
  pattern = '.*'.join(map(re.escape, message.split('.*')))
  with pytest.raises(UserError, match=pattern):
    make()

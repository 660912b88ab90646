"""Networks for pictures that aren't square."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_configs

from parti_jax.core import errors
from parti_jax.exported_model import model_config
from parti_jax.models import discriminator
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import rankers
from parti_jax.models import vit_vqgan

TOKENIZERS = {'vit_vqgan': tiny_configs.TOKENIZER, 'vqgan': tiny_configs.VQGAN}


@pytest.mark.parametrize('kind', TOKENIZERS)
@pytest.mark.parametrize('size', [(8, 16), (12, 4)])
def test_tokenizers_encode_and_decode(kind, size):
  config = dataclasses.replace(TOKENIZERS[kind], image_size=size)
  module = image_tokenizers.module(config)
  images = jax.random.uniform(jax.random.key(0), (2, *size, 3))
  assert image_tokenizers.example_inputs(config)[0].shape == (1, *size, 3)
  params = {'params': jax.device_put(random_parameters.of(module, [images]))}
  patch = 4 if kind == 'vit_vqgan' else 2
  assert config.grid == (size[0] // patch, size[1] // patch)
  apply = jax.jit(module.apply, static_argnames='method')
  tokens = apply(params, images, method='tokenize')
  assert tokens.shape == (2, config.image_length) == (2, config.grid[0] * config.grid[1])
  assert apply(params, tokens, method='detokenize').shape == (2, *size, 3)
  # Training's path leads to the same tokens.
  np.testing.assert_array_equal(apply(params, images)['tokens'], tokens)


@pytest.mark.parametrize('kind', TOKENIZERS)
def test_sizes_in_config_json(kind):
  """A number stays a number, a pair becomes a list, and both come back as they were."""
  for size, stored in ((8, 8), ((8, 16), [8, 16])):
    config = dataclasses.replace(TOKENIZERS[kind], image_size=size)
    kinds = image_tokenizers.KINDS.configs
    entry = json.loads(json.dumps(model_config.entry(kinds, config, None)))
    assert entry['image_size'] == stored
    found = model_config.sizes(kinds, {'tokenizer': entry}, 'tokenizer', 'float32', 'config.json')
    assert found == config and found.image_size == size
  entry['image_size'] = [8, 0]
  with pytest.raises(errors.UserError, match=r'config\.json: tokenizer\.image_size=\[8, 0\]'):
    model_config.sizes(kinds, {'tokenizer': entry}, 'tokenizer', 'float32', 'config.json')


@pytest.mark.parametrize(
  ('given', 'size'),
  [([8, 16], (8, 16)), ((np.int64(8), np.int32(16)), (8, 16)), ((8, 8), 8), ([np.int64(8), 8], 8)],
)
def test_one_size_has_one_form(given, size):
  """So that checkpoints, token caches and models of the same size compare as equal."""
  for config in TOKENIZERS.values():
    found = dataclasses.replace(config, image_size=given)
    assert found == dataclasses.replace(config, image_size=size)
    assert json.dumps(found.image_size) == json.dumps(size)


@pytest.mark.parametrize(
  'given', [0, -8, (0, 16), (16, -4), (8, 16, 4), (8,), (), '16x8', (8.0, 16), (True, 8), None]
)
def test_what_is_not_a_size(given):
  for config in TOKENIZERS.values():
    with pytest.raises(errors.UserError, match='image_size=.* whole number.* height and width$'):
      dataclasses.replace(config, image_size=given)


def test_sides_that_do_not_fit():
  with pytest.raises(errors.UserError, match=r'patch_size=4 does not divide image_size=\(8, 18\)'):
    dataclasses.replace(TOKENIZERS['vit_vqgan'], image_size=(8, 18))
  with pytest.raises(errors.UserError, match=r'image_size=\(9, 8\) is not a multiple of 2'):
    dataclasses.replace(TOKENIZERS['vqgan'], image_size=(9, 8))


def test_patches_of_a_tall_picture_keep_their_places():
  images = jnp.arange(8 * 4 * 3, dtype=jnp.float32).reshape(1, 8, 4, 3)
  patches = vit_vqgan.to_patches(images, 4)
  np.testing.assert_array_equal(patches[0, 1], images[0, 4:].reshape(-1))
  np.testing.assert_array_equal(vit_vqgan.from_patches(patches, 4, (2, 1)), images)


def test_the_ranker_embeds_wide_pictures():
  config = dataclasses.replace(tiny_configs.RANKER, image_size=(8, 16), text_length=3)
  assert config.patches == 8
  module, inputs = rankers.module(config), rankers.example_inputs(config)
  assert inputs[0].shape == (1, 8, 16, 3)
  params = {'params': random_parameters.of(module, inputs)}
  apply = jax.jit(module.apply, static_argnames='method')
  assert apply(params, inputs[0], method='image_features').shape == (1, 4)


@pytest.mark.parametrize('size', [(8, 16), (24, 8), (16, 24)])
def test_the_discriminator_halves_both_sides(size):
  config = discriminator.DiscriminatorConfig(channels=16, minibatch_group=1)
  module, images = discriminator.Discriminator(config), jnp.zeros((2, *size, 3))
  params = {'params': random_parameters.of(module, [images])}
  assert jax.jit(module.apply)(params, images).shape == (2,)
  assert config.sizes(size) == config.sizes(min(size))


def test_the_discriminator_refuses_sides_that_cannot_be_halved():
  with pytest.raises(errors.UserError, match='side of 18 is not a multiple of 4'):
    discriminator.DiscriminatorConfig().sizes((16, 18))


def test_flops_grow_with_the_area():
  config = discriminator.DiscriminatorConfig(channels=16)
  logits = 2 * config.width(4)
  square, wide = (flops.discriminator_forward(config, size) for size in (16, (16, 32)))
  assert wide - logits == 2 * (square - logits)
  assert flops.vgg16_forward((32, 64)) == 2 * flops.vgg16_forward(32)
  of_tokenizer = image_tokenizers.training(TOKENIZERS['vqgan']).forward_flops
  square, wide = (
    of_tokenizer(dataclasses.replace(TOKENIZERS['vqgan'], image_size=size)) for size in (8, (8, 16))
  )
  assert wide == 2 * square

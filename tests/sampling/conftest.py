"""A tiny model folder with random parameters."""

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest
import tiny_configs

from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan

CAPTIONS = (
  'red apple',
  'green apple',
  'blue ball',
  'waving hand: dark skin tone',
  'woman firefighter: light skin tone',
  'man cook: medium skin tone',
)


def random_params(model, inputs, seed):
  init = jax.jit(functools.partial(model.init, jax.random.key(seed)))
  return jax.tree.map(lambda leaf: 2.0 * leaf, nn.meta.unbox(init(*inputs))['params'])


@pytest.fixture(scope='session')
def parts(tmp_path_factory):
  """Arguments of `model_folder.save`: sizes, random parameters, a small vocabulary."""
  vocabulary_path = tmp_path_factory.mktemp('vocabulary') / 'vocabulary.model'
  size = vocabulary.train_vocabulary(CAPTIONS, 36, str(vocabulary_path)).size
  config = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=2,
    width=16,
    mlp_width=32,
    heads=2,
    text_vocabulary=size,
    text_length=24,
    codebook_size=12,
    grid=(2, 2),
    dtype='float32',
  )
  tokenizer_config = dataclasses.replace(tiny_configs.TOKENIZER, codebook_size=12, code_dim=4)
  return {
    'generator_config': config,
    'generator_params': random_params(parti.Parti(config), parti.example_inputs(config), 0),
    'tokenizer_config': tokenizer_config,
    'tokenizer_params': random_params(
      vit_vqgan.ViTVQGAN(tokenizer_config), vit_vqgan.example_inputs(tokenizer_config), 1
    ),
    'vocabulary_path': vocabulary_path,
    'sampling': sampling_settings.SamplingSettings(guidance_scale=2.0, top_p=0.99),
    'provenance': {'data': 'none, random parameters'},
  }


@pytest.fixture(scope='session')
def tiny_folder(parts, tmp_path_factory):
  return model_folder.save(tmp_path_factory.mktemp('models') / 'tiny', dtype='float32', **parts)


@pytest.fixture(scope='session')
def enlarger():
  """A super-resolution network with random parameters, as a part of a model."""
  config = super_resolution.SuperResolutionConfig(
    factor=2, blocks=1, width=4, expansion=2, low_rank=0.5, unshuffle=2, dtype='float32'
  )
  abstract = nn.meta.unbox(model_folder.abstract('super_resolution', config))
  draw = np.random.default_rng(2)
  return model_folder.Part(
    config,
    jax.tree.map(lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), abstract),
  )

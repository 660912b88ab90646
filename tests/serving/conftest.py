"""A tiny model with random parameters, and a service that a test can hold up."""

import dataclasses
import functools
import threading

import flax.linen as nn
import jax
import numpy as np
import pytest
import random_parameters
import tiny_configs

import parti_jax
from parti_jax.data import vocabulary
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import parti
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.sampling import continuous
from parti_jax.serving import image_requests
from parti_jax.serving import image_service

random_params = functools.partial(random_parameters.of, factor=2.0)


@pytest.fixture(scope='session')
def served_folder(tmp_path_factory):
  """A model of pictures of 16×16 pixels from 4×4 tokens, with super-resolution."""
  folder = tmp_path_factory.mktemp('served')
  captions = ('red apple', 'green apple', 'blue ball', 'waving hand: dark skin tone')
  size = vocabulary.train_vocabulary(
    captions, 36, str(folder / 'vocabulary.model'), at_most=True
  ).size
  tokenizer = dataclasses.replace(
    tiny_configs.TOKENIZER, image_size=16, codebook_size=24, code_dim=4
  )
  generator = dataclasses.replace(
    tiny_configs.GENERATOR,
    text_vocabulary=size,
    text_length=24,
    grid=(4, 4),
    codebook_size=24,
    dropout=0.0,
  )
  enlarger = super_resolution.SuperResolutionConfig(
    factor=2, blocks=1, width=4, expansion=2, low_rank=0.5, unshuffle=2, dtype='float32'
  )
  abstract = nn.meta.unbox(model_folder.abstract('super_resolution', enlarger))
  draw = np.random.default_rng(2)
  weights = jax.tree.map(
    lambda leaf: 0.3 * draw.normal(size=leaf.shape).astype(np.float32), abstract
  )
  return model_folder.save(
    folder / 'tiny',
    generator_config=generator,
    generator_params=random_params(parti.Parti(generator), parti.example_inputs(generator)),
    tokenizer_config=tokenizer,
    tokenizer_params=random_params(
      vit_vqgan.ViTVQGAN(tokenizer), vit_vqgan.example_inputs(tokenizer)
    ),
    vocabulary_path=folder / 'vocabulary.model',
    parts={'super_resolution': model_folder.Part(enlarger, weights)},
    sampling=sampling_settings.SamplingSettings(guidance_scale=2.0),
    dtype='float32',
  )


class _Ranker:
  """Prefers dark pictures."""

  def scores(self, texts, images):
    return -np.asarray(images, np.float32).mean(axis=(1, 2, 3)) / 255

  def encode(self, texts):
    return np.zeros([len(texts), 4], np.int32), [text[30:] for text in texts]


@pytest.fixture(scope='session')
def served_model(served_folder):
  model = parti_jax.load(served_folder)
  model.ranker = _Ranker()
  return model


@pytest.fixture
def gate(monkeypatch):
  """An event that is set; while a test has cleared it, nothing is sampled."""
  event = threading.Event()
  event.set()
  step = continuous.ContinuousSampler._step

  def held(sampler):
    event.wait(60)
    step(sampler)

  monkeypatch.setattr(continuous.ContinuousSampler, '_step', held)
  return event


@pytest.fixture
def service_of(served_model, gate):
  """Returns a function that starts a service; the services are closed in the end."""
  found = []

  def start(batch_size=4, **limits):
    limits = image_requests.Limits(**{'images': 4, 'queue': 40} | limits)
    found.append(image_service.ImageService(served_model, limits, batch_size, 4))
    return found[-1]

  yield start
  gate.set()
  for service in found:
    service.close(cancel=True)

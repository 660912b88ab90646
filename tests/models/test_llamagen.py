"""LlamaGen's generators against their formulas in NumPy (`tiny_llamagen`)."""

import dataclasses
import functools

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import tiny_llamagen

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.importers import key_map
from parti_jax.importers import llamagen as importer
from parti_jax.models import generators
from parti_jax.models import llamagen
from parti_jax.models import t5_encoder
from parti_jax.models.nn import attention
from parti_jax.models.nn import dot_product_attention
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.sampling import slots
from parti_jax.sampling import speculative

T5 = t5_encoder.T5EncoderConfig(
  layers=1,
  width=tiny_llamagen.FEATURES,
  mlp_width=8,
  heads=2,
  head_dim=4,
  text_vocabulary=20,
  text_length=tiny_llamagen.TEXT_LENGTH,
  dropout=0.0,
)
# Texts of different lengths, which end with the id 1.
TEXTS = jnp.array([[5, 7, 1, 0, 0, 0], [9, 3, 4, 8, 6, 1]])
NUMBERS = jnp.array([[3], [0]])


class Stored:
  """An array in a file."""

  def __init__(self, array):
    self._array, self.shape, self.dtype = array, array.shape, array.dtype

  def read(self):
    return self._array


@functools.cache
def tiny(texts):
  """A config, its parameters and the weights that they were read from."""
  weights = tiny_llamagen.state(texts)
  stored = {name: Stored(array) for name, array in weights.items()}
  encoder = T5 if texts else None
  config = importer.config_of(stored, tiny_llamagen.GRID, encoder, tiny_llamagen.HEADS)
  config = dataclasses.replace(config, dtype='float32', dropout=0.0)
  found = key_map.convert(importer.key_map(config, stored), stored)
  params = flax.traverse_util.unflatten_dict(
    {path: np.asarray(array) for path, array in found.items()}, sep='/'
  )
  if texts:
    made = random_parameters.of(generators.module(config), generators.example_inputs(config), 1)
    params['text_encoder'] = jax.tree.map(lambda leaf: leaf * 3, made['text_encoder'])
  return config, params, weights


@functools.cache
def conditions(texts):
  """For each row of the text tokens: its condition, guidance's other one, and what is visible."""
  config, params, weights = tiny(texts)
  if not texts:
    other = tiny_llamagen.class_condition(weights, tiny_llamagen.CLASSES)
    return [
      (tiny_llamagen.class_condition(weights, number), other, None)
      for number in np.asarray(NUMBERS)[:, 0]
    ]
  module = generators.module(config)
  encode = functools.partial(module.apply, method=lambda m, x: m.text_encoder(x))
  features = jax.jit(encode)({'params': params}, TEXTS)
  found = []
  for row, text in zip(np.asarray(features), np.asarray(TEXTS)):
    count = int(np.sum(text > 0))
    left = np.concatenate([row[count:], row[:count]])
    visible = np.arange(len(text)) >= len(text) - count
    made = tiny_llamagen.text_condition(weights, left)
    found.append((made, tiny_llamagen.text_condition(weights, None), visible))
  return found


@functools.cache
def _apply(config):
  return jax.jit(generators.module(config).apply)


def inputs(texts):
  return TEXTS if texts else NUMBERS


IMAGES = jnp.array(np.random.default_rng(2).integers(0, tiny_llamagen.CODES, (2, 9)), jnp.int32)
BOTH = pytest.mark.parametrize('texts', [False, True], ids=['classes', 'texts'])


def reference(texts, without=False):
  _, _, weights = tiny(texts)
  return np.stack(
    [
      tiny_llamagen.logits(weights, other if without else condition, image[:-1], visible)
      for (condition, other, visible), image in zip(conditions(texts), np.asarray(IMAGES))
    ]
  )


@BOTH
@pytest.mark.parametrize('without', [False, True], ids=['with', 'without'])
def test_whole_sequences_and_steps_with_a_cache_follow_the_formulas(texts, without):
  config, params, _ = tiny(texts)
  module, tokens = generators.module(config), inputs(texts)
  if without:
    tokens = generators.empty_text(config, tokens)
  wanted = reference(texts, without)
  apply = jax.jit(functools.partial(module.apply, {'params': params}), static_argnames='method')
  np.testing.assert_allclose(apply(tokens, IMAGES), wanted, atol=1e-4, rtol=1e-4)
  outputs = apply(tokens, IMAGES, method='all_layer_outputs')
  assert outputs.shape == (2, 2, 9, 16)
  np.testing.assert_allclose(apply(outputs[-1], method='logits_from'), wanted, atol=1e-4, rtol=1e-4)
  sampling = parameters.for_sampling(config, params)
  state = generators.module(config).apply({'params': sampling}, tokens, method='encode_text')
  step = jax.jit(
    functools.partial(generators.decoder(config).apply, {'params': sampling['image_decoder']})
  )
  for position in range(9):
    previous = IMAGES[:, position - 1 : position] if position else jnp.full((2, 1), 7)
    logits, state = step(previous, state=state)
    np.testing.assert_allclose(logits[:, 0], wanted[:, position], atol=1e-4, rtol=1e-4)


@BOTH
@pytest.mark.parametrize('scale', [1.0, 2.5])
def test_greedy_tokens_are_those_of_the_formulas_however_they_are_sampled(texts, scale):
  config, params, weights = tiny(texts)
  sampling = parameters.for_sampling(config, params)
  keys = decoding.image_keys(0, jnp.arange(2))
  texts_in = inputs(texts)
  wanted = [
    tiny_llamagen.greedy(weights, condition, None if scale == 1 else other, scale, visible)
    for condition, other, visible in conditions(texts)
  ]
  assert len({tuple(row) for row in wanted}) == 2
  settings = sampling_settings.SamplingSettings(temperature=0, guidance_scale=scale)
  how = decoding.Sampling.of(settings, 9)
  found = decoding.sample_tokens(config, sampling, texts_in, keys, how)
  np.testing.assert_array_equal(found, wanted)
  # Thresholds that no token reaches.
  exits = how.replace(exit_threshold=jnp.float32(1.1))
  if scale != 1:
    exits = exits.replace(skip_threshold=jnp.float32(1.1))
  found, usage = adaptive.sample_tokens(config, sampling, texts_in, keys, exits)
  np.testing.assert_array_equal(found, wanted)
  assert np.all(usage.layers == 2)
  found, passes, _ = speculative.sample_tokens(
    config, sampling, texts_in, keys, how.replace(window=3)
  )
  np.testing.assert_array_equal(found, wanted)
  assert np.all(passes.needed <= 9)
  batch = slots.begin(
    sampling, jnp.zeros_like(texts_in), config=config, guided=scale != 1, cache='float'
  )
  encoded = slots.encode(
    sampling,
    texts_in,
    jnp.full_like(texts_in, -1),
    config=config,
    guided=scale != 1,
    cache='float',
  )
  batch = slots.insert(jnp.arange(2), batch, encoded)
  requests = slots.Requests.empty(2, 9)
  for slot in range(2):
    requests.set(slot, 0, slot, settings)
  for _ in range(3):
    batch, _ = slots.advance(sampling, requests, batch, config=config, guided=scale != 1, count=3)
    requests = requests.replace(position=requests.position + 3)
  np.testing.assert_array_equal(batch.tokens, wanted)


@BOTH
@pytest.mark.parametrize('read_first_from', [512, 1])
def test_an_int8_cache_holds_the_condition_too(texts, read_first_from, monkeypatch):
  monkeypatch.setattr(attention, '_READ_FIRST_FROM', read_first_from)
  config, params, _ = tiny(texts)
  sampling = parameters.for_sampling(config, params)
  module, decoder = generators.module(config), generators.decoder(config)
  encode = functools.partial(module.apply, {'params': sampling}, inputs(texts))
  apply = jax.jit(decoder.apply)
  found = []
  for int8 in (False, True):
    state = encode(None, int8, method='encode_text')
    logits = []
    for position in range(9):
      previous = IMAGES[:, max(position - 1, 0)][:, None]
      step, state = apply({'params': sampling['image_decoder']}, previous, state=state)
      logits.append(step)
    found.append(np.concatenate(logits, axis=1))
  difference = np.abs(found[1] - found[0])
  assert 0 < difference.max() < 0.1 * np.abs(found[0]).max()


def test_long_sequences_are_attended_to_in_blocks(monkeypatch):
  config, params, _ = tiny(True)
  monkeypatch.setattr(dot_product_attention, '_BLOCKWISE_FROM', 1)
  monkeypatch.setitem(dot_product_attention._BLOCK, 'global', 4)
  found = jax.jit(generators.module(config).apply)({'params': params}, TEXTS, IMAGES)
  np.testing.assert_allclose(found, reference(True), atol=1e-4, rtol=1e-4)


def test_texts_dropped_in_training_see_all_vectors_of_the_condition_without_text():
  config, params, weights = tiny(True)
  empty = jnp.array([[1, 0, 0, 0, 0, 0]] * 2)
  found = _apply(config)({'params': params}, empty, IMAGES)
  other = tiny_llamagen.text_condition(weights, None)
  wanted = [tiny_llamagen.logits(weights, other, image[:-1]) for image in np.asarray(IMAGES)]
  np.testing.assert_allclose(found, wanted, atol=1e-4, rtol=1e-4)
  for_training = dataclasses.replace(config, guidance_slots='all')
  for tokens in (TEXTS, empty):
    without = generators.empty_text(for_training, tokens)
    again = _apply(for_training)({'params': params}, without, IMAGES)
    np.testing.assert_array_equal(again, found)


@BOTH
def test_text_features_stand_for_the_text_encoder(texts):
  config, params, _ = tiny(texts)
  module, tokens = generators.module(config), inputs(texts)
  features = module.apply({'params': params}, tokens, method=lambda m, x: m.text_encoder(x))
  if not texts:
    return  # A class has no text encoder that could run before.
  apply = _apply(config)
  found = apply({'params': params}, tokens, IMAGES, None, features)
  np.testing.assert_array_equal(found, apply({'params': params}, tokens, IMAGES))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'classes': None}, 'classes=None and .text_encoder=None: one of them must be None'),
    ({'text_encoder': T5}, 'one of them must be None'),
    ({'heads': 5}, 'LlamaGenConfig.heads=5 does not divide width=16'),
    ({'heads': 8}, 'must be a multiple of 4; it is 2'),
    ({'guidance_slots': 'none'}, "guidance_slots='none' is not one of all, text"),
    ({'dropout': 1.0}, 'LlamaGenConfig.dropout=1.0 must lie in'),
    ({'text_encoder': 'T5', 'classes': None}, "LlamaGenConfig.text_encoder='T5' must be None, or"),
    ({'text_encoder': {}, 'classes': None}, 'LlamaGenConfig.text_encoder.kind=None is not one of'),
    (
      {'text_encoder': {'kind': 't5'}, 'classes': None},
      'LlamaGenConfig.text_encoder has other fields than T5EncoderConfig',
    ),
  ],
)
def test_sizes_that_make_no_network_are_refused(changes, message):
  with pytest.raises(UserError) as caught:
    dataclasses.replace(tiny(False)[0], **changes)
  assert message in str(caught.value)


def test_the_published_widths_have_the_published_mlps():
  assert [llamagen.mlp_width(width) for width in (768, 1024, 1280, 1536, 3200)] == [
    2048, 2816, 3584, 4096, 8704
  ]  # fmt: skip


def test_an_abstract_network_has_no_parameter_of_cross_attention():
  config, params, _ = tiny(False)
  shapes = jax.tree.map(lambda leaf: leaf.shape, model_folder.abstract('generator', config))
  assert nn.meta.unbox(shapes) == jax.tree.map(np.shape, params)

"""Sampling with keys and values in int8."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parti_jax
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention
from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import quantization
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding
from parti_jax.sampling import images
from parti_jax.sampling import parameters
from parti_jax.sampling import text_to_image

# Each pattern, on a grid whose rows and columns differ. All other dimensions differ too.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=4,
  width=48,
  mlp_width=64,
  heads=4,
  text_vocabulary=20,
  text_length=5,
  codebook_size=32,
  grid=(5, 3),
  conv_kernel=3,
  attention_patterns=attention_patterns.PATTERNS,
  dtype='float32',
)
TEXTS = jnp.asarray(np.random.default_rng(0).integers(2, 20, (8, 5)), jnp.int32)


@pytest.fixture(scope='module')
def params():
  init = functools.partial(parti.Parti(CONFIG).init, jax.random.key(0))
  params = nn.meta.unbox(jax.jit(init)(*parti.example_inputs(CONFIG)))['params']
  return parameters.for_sampling(CONFIG, params)


def logits_of(config, params, texts, tokens, cache):
  """Logits of every position, computed one position after the other."""

  @jax.jit
  def run(params):
    state = decoding.init_state(config, params, texts, config.image_length, cache)
    model = token_decoder.TokenDecoder(config)

    def body(state, previous):
      decoder = {'params': params['image_decoder']}
      found, state = model.apply(decoder, previous[:, None], state=state)
      return state, found[:, 0]

    return jax.lax.scan(body, state, token_decoder.shifted(tokens).T)[1].swapaxes(0, 1)

  return np.asarray(run(params))


def dequantized(part):
  return np.asarray(part.values, np.float32) * np.asarray(part.scale)[..., None]


def filled(random, *shape):
  """Keys or values in float32, and the same in int8."""
  part = jnp.asarray(random.normal(size=shape) * 10.0 ** random.uniform(-1, 1, shape[:-1] + (1,)))
  part = part.astype(jnp.float32)
  return part, quantization.quantize_vectors(part)


def test_the_error_of_attention_is_within_its_bound():
  """Rounding changes a score by half a scale times the query's sum, a value by half a scale."""
  random = np.random.default_rng(0)
  query = jnp.asarray(random.normal(size=(3, 2, 4, 16)), jnp.float32)
  (keys, int8_keys), (values, int8_values) = (filled(random, 3, 4, 9, 16) for _ in range(2))
  mask = jnp.asarray(random.uniform(size=(2, 9)) < 0.7).at[:, 0].set(True)
  expected = np.asarray(attention_cache.attend_cached(query, keys, values, mask))
  found = np.asarray(attention_cache.attend_cached(query, int8_keys, int8_values, mask))
  rounded = [jnp.asarray(dequantized(part)) for part in (int8_keys, int8_values)]
  np.testing.assert_allclose(found, attention_cache.attend_cached(query, *rounded, mask), atol=1e-5)
  sums = np.abs(query).sum(-1).swapaxes(1, 2) / 4  # A query is divided by the root of 16.
  step = (sums[..., None] * int8_keys.scale[:, :, None] / 2).max(-1)
  largest = np.abs(values).max((2, 3))[..., None]
  bound = np.expm1(2 * step) * largest + np.asarray(int8_values.scale).max(-1)[..., None] / 2
  error = np.abs(found - expected).max(-1).swapaxes(1, 2)
  assert 1e-4 < error.max() and np.all(error <= 1.001 * bound)


@pytest.mark.parametrize('name', attention_patterns.PATTERNS)
def test_a_cache_holds_the_rounded_keys_and_values(name):
  pattern = attention_patterns.AttentionPattern(name, (4, 3), 3)
  slots, random = pattern.num_slots(12), np.random.default_rng(0)
  cache, int8_cache = zip(*(filled(random, 4, 2, slots, 8) for _ in range(2)))
  new = [jnp.asarray(random.normal(size=(4, 7, 2, 8)), jnp.float32) for _ in range(2)]
  one = [part[:, :1] for part in new]
  start, count = jnp.array([0, 4, 9, 5]), jnp.array([7, 2, 3, 0])
  for write in (
    lambda cache: attention_cache.write_cache(cache, *new, jnp.int32(5), pattern),
    lambda cache: attention_cache.write_cache(cache, *one, jnp.int32(5), pattern),
    lambda cache: attention_cache.write_cache(cache, *one, start, pattern),
    lambda cache: attention_cache.write_counted(cache, *new, start, count, pattern),
  ):
    for found, old, expected in zip(write(int8_cache), int8_cache, write(cache)):
      expected = quantization.quantize_vectors(expected)
      np.testing.assert_array_equal(found.values, expected.values)
      np.testing.assert_allclose(found.scale, expected.scale, rtol=1e-6)
      assert np.any(np.asarray(found.values) != np.asarray(old.values))
  for read in (
    lambda cache: attention_cache.read_cache(cache, jnp.int32(5), pattern),
    lambda cache: attention_cache.read_cache(cache, start, pattern),
    lambda cache: attention_cache.read_cache_and_chunk(cache, *new, jnp.int32(5), pattern),
    lambda cache: attention_cache.read_cache_and_chunk(cache, *new, start, pattern),
  ):
    *found, mask = read(int8_cache)
    *expected, expected_mask = read(cache)
    np.testing.assert_array_equal(mask, expected_mask)
    for part, other in zip(found, expected):
      np.testing.assert_allclose(dequantized(part), other, atol=0.51 * np.max(part.scale))


@pytest.mark.parametrize('name', attention_patterns.PATTERNS)
def test_a_position_attends_before_it_is_written_as_after(name):
  pattern = attention_patterns.AttentionPattern(name, (4, 3), 3)
  random = np.random.default_rng(0)
  cache = tuple(filled(random, 4, 2, pattern.num_slots(12), 8)[1] for _ in range(2))
  query, *new = (jnp.asarray(random.normal(size=(4, 1, 2, 8)), jnp.float32) for _ in range(3))
  for position in (*map(jnp.int32, (0, 5, 11)), jnp.array([0, 4, 9, 5])):
    found = attention_cache.attend_before_write(query, *new, cache, position, pattern)
    written = attention_cache.write_cache(cache, *new, position, pattern)
    expected = attention_cache.attend_cached(
      query, *attention_cache.read_cache(written, position, pattern)
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('read_first_from', [1, 512])
def test_logits_are_close(params, read_first_from, monkeypatch):
  monkeypatch.setattr(attention, '_READ_FIRST_FROM', read_first_from)
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (8, 15)), jnp.int32)
  found, expected = (logits_of(CONFIG, params, TEXTS, tokens, cache) for cache in ('int8', 'float'))
  size = expected.std()
  assert 1e-5 < (found - expected).std() / size < 0.006
  assert np.abs(found - expected).max() / size < 0.03


def test_the_demos_logits_are_close_and_its_likeliest_tokens_mostly_the_same():
  prompts = ['waving hand: dark skin tone', 'thumbs up: light skin tone']
  tokens = jnp.asarray(parti_jax.load().generate(prompts, num_images=1).tokens[:, 0])
  model = model_folder.load(text_to_image.DEMO_FOLDER)
  config = model.generator_config
  params = parameters.for_sampling(config, jax.tree.map(jnp.asarray, model.generator_params))
  vocabulary = text_tokenizer.open_tokenizer(model.vocabulary_path)
  texts = jnp.asarray([vocabulary.encode(prompt, config.text_length)[0] for prompt in prompts])
  found, expected = (logits_of(config, params, texts, tokens, cache) for cache in ('int8', 'float'))
  assert 1e-5 < (found - expected).std() / expected.std() < 0.02
  assert (found.argmax(-1) == expected.argmax(-1)).mean() > 0.9


@functools.partial(jax.jit, static_argnames='sampling')
def greedy_tokens(params, sampling):
  keys = decoding.image_keys(0, jnp.arange(len(TEXTS)))
  return decoding.sample_tokens(CONFIG, params, TEXTS, keys, sampling)


def test_greedy_tokens_are_mostly_the_same(params, monkeypatch):
  monkeypatch.setattr(decoding, '_MIN_SEGMENT', 4)  # The caches grow.
  params = jax.tree.map(lambda leaf: leaf * 2.0, params)
  expected, found = (
    np.asarray(greedy_tokens(params, decoding.Sampling(greedy=True, cache=cache)))
    for cache in ('float', 'int8')
  )
  assert len(np.unique(expected)) > 4
  assert np.cumprod(expected == found, axis=1).mean() > 0.7


def test_a_loaded_model(tiny_folder, tmp_path):
  plain = parti_jax.load(tiny_folder)
  model = parti_jax.load(tiny_folder, weights='int8', cache='int8')
  assert (plain.cache, model.cache) == ('float', 'int8')
  settings = {'num_images': 4, 'temperature': 0, 'guidance_scale': 2.0}
  expected, drawn = (part.generate('red apple', **settings) for part in (plain, model))
  assert (drawn.tokens == expected.tokens).mean() > 0.5
  metadata = images.read_metadata(drawn.save(tmp_path)[0])
  assert metadata['weights'] == metadata['cache'] == 'int8'
  assert 'cache' not in images.read_metadata(expected.save(tmp_path)[0])


def test_a_state_in_int8(params):
  state = decoding.init_state(CONFIG, params, TEXTS, 15, 'int8')
  for layer, (cache, text) in enumerate(zip(state.caches, state.texts)):
    slots = CONFIG.layer_pattern(layer).num_slots(15)
    for part, length in (*((part, slots) for part in cache), *((part, 5) for part in text)):
      assert part.values.dtype == jnp.int8 and part.values.shape == (8, 4, length, 12)
      assert part.scale.dtype == jnp.float32 and part.scale.shape == (8, 4, length)


@pytest.mark.parametrize(
  'other',
  [
    {'exit_threshold': 0.9999},
    {'exit_threshold': 0.9999, 'guidance_skip_threshold': 0.9999},
    {'speculative_window': 3, 'speculative_rule': 'equal'},
    {'speculative_window': 3, 'speculative_rule': 'equal', 'exit_threshold': 0.9999},
  ],
)
def test_other_ways_to_the_same_tokens(tiny_folder, other):
  """No token is sure enough to exit early, and equal drafts change no token."""
  model = parti_jax.load(tiny_folder, cache='int8')
  settings = {'num_images': 3, 'temperature': 0, 'guidance_scale': 2.0}
  plain, careful = (
    model.generate('red apple', **settings, **changed).tokens for changed in ({}, other)
  )
  np.testing.assert_array_equal(careful, plain)


def test_on_a_mesh_the_pictures_are_the_same(tiny_folder):
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  mesh = mesh_lib.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  sharded, alone = (parti_jax.load(tiny_folder, of, cache='int8') for of in (mesh, None))
  draw = lambda model: model.generate(['red apple', 'blue ball'], num_images=2, seed=3).tokens
  np.testing.assert_array_equal(draw(sharded), draw(alone))

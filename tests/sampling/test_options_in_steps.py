"""Sampling with other norms, MLPs, positions and heads gives what a whole sequence gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

import parti_jax
from parti_jax.exported_model import model_folder
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import token_decoder
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import quantization
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.sampling import speculative

# All options, and a layer of each pattern on a grid whose rows and columns differ.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=4,
  width=32,
  mlp_width=24,
  heads=4,
  text_vocabulary=20,
  text_length=5,
  codebook_size=11,
  grid=(4, 3),
  conv_kernel=3,
  attention_patterns=attention_patterns.PATTERNS,
  dtype='float32',
  norm='rms',
  mlp='swiglu',
  qk_norm=True,
  positions='rotary_2d',
  kv_heads=2,
)
TEXTS = jnp.array([[4, 7, 1, 0, 0], [3, 9, 8, 5, 1]], jnp.int32)
IMAGES = np.random.default_rng(1).integers(0, 11, (2, 12)).astype(np.int32)
TOO_SMALL = 'the parameters of `params` are too small for texts and tokens to matter; scale them up'
PREVIOUS = jnp.pad(IMAGES[:, :-1], ((0, 0), (1, 0)))


@functools.cache
def params(config=CONFIG):
  """Parameters large enough for texts and tokens to matter."""
  inputs = parti.example_inputs(config)
  return jax.device_put(random_parameters.of(parti.Parti(config), inputs, factor=1.5))


@functools.cache
def whole():
  return np.asarray(jax.jit(parti.Parti(CONFIG).apply)({'params': params()}, TEXTS, IMAGES))


def apply(params, *args, **kwargs):
  decoder = {'params': params['image_decoder']}
  return token_decoder.TokenDecoder(CONFIG).apply(decoder, *args, **kwargs)


@functools.partial(jax.jit, static_argnames=('prefill', 'cache'))
def cached_logits(params, prefill=0, cache='float'):
  """Logits of `prefill` positions at once, and of the others one after the other."""
  state = decoding.init_state(CONFIG, params, TEXTS, CONFIG.image_length, cache)
  first = []
  if prefill:
    logits, state = apply(params, PREVIOUS[:, :prefill], state=state)
    first.append(logits)

  def step(state, previous):
    logits, state = apply(params, previous[:, None], state=state)
    return state, logits[:, 0]

  rest = jax.lax.scan(step, state, PREVIOUS[:, prefill:].T)[1].swapaxes(0, 1)
  return jnp.concatenate([*first, rest], axis=1)


def test_caches_have_the_heads_of_keys():
  init = functools.partial(decoding.init_state, CONFIG, length=CONFIG.image_length, cache='int8')
  state = jax.eval_shape(init, parameters.for_sampling(CONFIG, params()), TEXTS)
  assert {part.values.shape[:2] for pair in state.caches + state.texts for part in pair} == {(2, 2)}
  assert {part.scale.shape[:2] for pair in state.caches + state.texts for part in pair} == {(2, 2)}


@pytest.mark.parametrize('prefill', [0, 5])
def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(prefill):
  found = cached_logits(parameters.for_sampling(CONFIG, params()), prefill)
  np.testing.assert_allclose(found, whole(), atol=2e-5 * np.abs(whole()).max())


def test_rows_at_positions_of_their_own_give_the_logits_of_the_whole_sequence():
  """Windows of which the rows keep different numbers, then a single position of each row."""

  @jax.jit
  def run(params):
    state = decoding.init_state(CONFIG, params, TEXTS, CONFIG.image_length)
    state, found = state.replace(position=jnp.zeros(2, jnp.int32)), []
    for count in ([3, 1], [2, 4], [1, 3]):
      at = state.position[:, None] + jnp.arange(4)
      logits, entries = apply(
        params, jnp.take_along_axis(PREVIOUS, at, axis=1), state, method='look_ahead'
      )
      found.append((at, logits))
      state = state.advanced(entries, jnp.array(count), CONFIG.patterns)
    at = state.position[:, None]
    logits, state = apply(params, jnp.take_along_axis(PREVIOUS, at, axis=1), state=state)
    return [*found, (at, logits)], state.position

  found, position = run(parameters.for_sampling(CONFIG, params()))
  assert position.tolist() == [7, 9]
  for at, logits in found:
    expected = np.take_along_axis(whole(), np.asarray(at)[..., None], axis=1)
    np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(whole()).max())


@functools.partial(jax.jit, static_argnums=0)
def drawn(sample_tokens, params, sampling):
  keys = decoding.image_keys(jnp.uint32(0), jnp.arange(2))
  return sample_tokens(CONFIG, parameters.for_sampling(CONFIG, params), TEXTS, keys, sampling)


def test_speculative_and_adaptive_decoding_choose_the_same_tokens():
  sampling = decoding.Sampling(guided=True, guidance_scale=1.5, greedy=True, window=4)
  expected = drawn(decoding.sample_tokens, params(), sampling)
  assert len(np.unique(expected)) > 2, TOO_SMALL
  for sample_tokens in (speculative.sample_tokens, adaptive.sample_tokens):
    np.testing.assert_array_equal(drawn(sample_tokens, params(), sampling)[0], expected)


def test_tokens_exit_and_skip_guidance_as_in_sequential_sampling():
  sampling = decoding.Sampling(
    guided=True, guidance_scale=2.0, exit_threshold=0.6, skip_threshold=0.6, rule='equal'
  )
  expected, usage = drawn(adaptive.sample_tokens, params(), sampling)
  tokens, _, found = drawn(speculative.sample_tokens, params(), sampling.replace(window=4))
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_array_equal(found.layers, usage.layers)
  assert len(np.unique(usage.layers)) > 1 and usage.unguided.any()


def test_int8_weights_are_those_of_every_kernel():
  stacked = jax.tree.map(jnp.asarray, parameters.for_sampling(CONFIG, params(), 'int8'))
  rounded = jax.tree_util.tree_map_with_path(parameters.quantized, stacked)
  layer = rounded['image_decoder']['decoder']['layers'][0]
  kernel = lambda module, name: layer[module][name]['kernel']
  scales = [
    (kernel('mlp', 'project_gate').scale.shape, (24,)),
    (kernel('attention', 'project_query').scale.shape, (4, 8)),
    (kernel('attention', 'project_keys_values').scale.shape, (2, 2, 8)),
    (kernel('cross_attention', 'project_memory').scale.shape, (2, 2, 8)),
  ]
  assert all(found == expected for found, expected in scales)
  assert layer['attention']['key_norm']['scale'].dtype == jnp.float32
  is_kernel = lambda leaf: isinstance(leaf, quantization.QuantizedKernel)
  floats = jax.tree.map(
    lambda leaf: leaf.values * leaf.scale if is_kernel(leaf) else leaf, rounded, is_leaf=is_kernel
  )
  expected = cached_logits(floats, 5)
  np.testing.assert_allclose(
    cached_logits(rounded, 5), expected, atol=1e-4 * jnp.abs(expected).max()
  )


@pytest.mark.parametrize('prefill', [0, 5])
def test_an_int8_cache_changes_logits_little(prefill):
  found = cached_logits(parameters.for_sampling(CONFIG, params()), prefill, 'int8')
  assert 0 < (found - whole()).std() < 0.03 * whole().std()


@pytest.mark.parametrize('int8', [False, True])
def test_attention_with_shared_keys_is_that_with_repeated_ones(int8):
  draw = np.random.default_rng(0)
  query, keys, values = (
    jnp.asarray(draw.normal(size=shape), jnp.float32)
    for shape in ((2, 3, 6, 8), (2, 2, 5, 8), (2, 2, 5, 8))
  )
  mask = jnp.asarray(np.tri(3, 5, 2, bool))
  shared, plain = (keys, values), (keys, values)
  if int8:
    shared = tuple(quantization.quantize_vectors(part) for part in shared)
    plain = tuple(part.values * part.scale[..., None] for part in shared)
  repeated = (part[:, [0, 0, 0, 1, 1, 1]].swapaxes(1, 2) for part in plain)
  found = attention_cache.attend_cached(query, *shared, mask)
  np.testing.assert_allclose(found, dot_product_attention.attend(query, *repeated, mask), atol=1e-5)


def test_shared_keys_can_be_read_before_a_position_is_written():
  draw = np.random.default_rng(0)
  query, key, value = (
    jnp.asarray(draw.normal(size=(2, 1, heads, 8)), jnp.float32) for heads in (6, 2, 2)
  )
  of_cache = lambda: jnp.asarray(draw.normal(size=(2, 2, 5, 8)), jnp.float32)
  cache = tuple(quantization.quantize_vectors(of_cache()) for _ in range(2))
  at = jnp.int32(3), attention_patterns.AttentionPattern('global', (1, 5))
  found = attention_cache.attend_before_write(query, key, value, cache, *at)
  written = attention_cache.write_cache(cache, key, value, *at)
  expected = attention_cache.attend_cached(query, *attention_cache.read_cache(written, *at))
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.fixture(scope='module')
def folder(parts, tmp_path_factory):
  """A model with all options, whose rings turn within a picture of 3×3 tokens."""
  config = dataclasses.replace(
    CONFIG,
    width=16,
    text_vocabulary=parts['generator_config'].text_vocabulary,
    text_length=24,
    codebook_size=12,
    grid=(3, 3),
  )
  tokenizer = dataclasses.replace(parts['tokenizer_config'], image_size=12)
  changed = parts | {
    'generator_config': config,
    'generator_params': params(config),
    'tokenizer_config': tokenizer,
    'tokenizer_params': random_parameters.of(
      vit_vqgan.ViTVQGAN(tokenizer), vit_vqgan.example_inputs(tokenizer)
    ),
  }
  return model_folder.save(
    tmp_path_factory.mktemp('models') / 'options', dtype='float32', **changed
  )


def test_pictures_are_the_same_on_a_mesh_and_in_a_running_batch(folder):
  """With each kind of cache. The folder's config.json has all options."""
  prompts = ['red apple', 'blue ball']
  for cache in ('float', 'int8'):
    model = parti_jax.load(folder, cache=cache)
    expected = model.generate(prompts, num_images=1, seed=3)
    assert len(np.unique(expected.tokens)) > 2, TOO_SMALL
    with parti_jax.ContinuousSampler(model, 2) as sampler:
      first = sampler.submit(prompts[0], seed=3)
      first.result()
      pictures = [first, sampler.submit(prompts[1], seed=3)]
      for picture, tokens in zip(pictures, expected.tokens, strict=True):
        np.testing.assert_array_equal(picture.result().tokens[0], tokens)
    if len(jax.devices()) >= 4:
      mesh = mesh_lib.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
      sharded = parti_jax.load(folder, mesh, cache=cache).generate(prompts, num_images=1, seed=3)
      np.testing.assert_array_equal(sharded.tokens, expected.tokens)

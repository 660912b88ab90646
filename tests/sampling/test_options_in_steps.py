"""Sampling with other norms, MLPs and positions gives what a whole sequence gives."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import quantization
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
)
TEXTS = jnp.array([[4, 7, 1, 0, 0], [3, 9, 8, 5, 1]], jnp.int32)
IMAGES = np.random.default_rng(1).integers(0, 11, (2, 12)).astype(np.int32)
PREVIOUS = jnp.pad(IMAGES[:, :-1], ((0, 0), (1, 0)))


@functools.cache
def params():
  """Parameters large enough for texts and tokens to matter."""
  init = functools.partial(parti.Parti(CONFIG).init, jax.random.key(0))
  stacked = nn.meta.unbox(jax.jit(init)(*parti.example_inputs(CONFIG)))['params']
  return jax.tree.map(lambda leaf: 1.5 * leaf, stacked)


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


def test_speculative_and_adaptive_decoding_choose_the_same_tokens():
  @functools.partial(jax.jit, static_argnums=0)
  def draw(sample_tokens):
    keys = decoding.image_keys(jnp.uint32(0), jnp.arange(2))
    sampling = decoding.Sampling(guided=True, guidance_scale=1.5, greedy=True, window=4)
    return sample_tokens(CONFIG, parameters.for_sampling(CONFIG, params()), TEXTS, keys, sampling)

  expected = draw(decoding.sample_tokens)
  assert len(np.unique(expected)) > 2
  np.testing.assert_array_equal(draw(speculative.sample_tokens)[0], expected)
  np.testing.assert_array_equal(draw(adaptive.sample_tokens)[0], expected)


def test_int8_weights_and_caches_change_logits_little():
  stacked = jax.tree.map(jnp.asarray, parameters.for_sampling(CONFIG, params(), 'int8'))
  rounded = jax.tree_util.tree_map_with_path(parameters.quantized, stacked)
  layer = rounded['image_decoder']['decoder']['layers'][0]
  gate, norm = layer['mlp']['project_gate']['kernel'], layer['attention']['key_norm']['scale']
  assert isinstance(gate, quantization.QuantizedKernel) and gate.scale.shape == (24,)
  assert norm.dtype == jnp.float32
  for prefill in (0, 5):
    error = np.asarray(cached_logits(rounded, prefill, 'int8')) - whole()
    assert 0 < error.std() < 0.03 * whole().std()

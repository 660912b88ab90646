"""The decoding loop: its cache, its guidance, its draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models import token_decoder
from parti_jax.models.nn import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters

CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=16,
  mlp_width=32,
  heads=2,
  text_vocabulary=20,
  text_length=5,
  codebook_size=11,
  grid=(2, 3),
  dtype='float32',
)
TEXTS = np.array([[4, 7, 1, 0, 0], [3, 1, 0, 0, 0], [9, 9, 8, 5, 1]], np.int32)


@pytest.fixture(scope='module')
def params():
  """Parameters large enough for texts and tokens to matter."""
  return random_parameters.of(parti.Parti(CONFIG), parti.example_inputs(CONFIG), factor=3.0)


@functools.partial(jax.jit, static_argnames='segment')
def draw_jitted(params, texts, image_index, seed, sampling, segment):
  del segment  # Only there to compile again when the tests change it.
  keys = decoding.image_keys(seed, image_index)
  return decoding.sample_tokens(
    CONFIG, parameters.for_sampling(CONFIG, params), texts, keys, sampling
  )


def draw(params, texts, image_index, seed=0, **sampling):
  """sample_tokens under jit, plain conditional sampling by default."""
  return np.asarray(
    draw_jitted(
      params,
      np.asarray(texts),
      np.asarray(image_index, np.int32),
      np.uint32(seed),
      decoding.Sampling(**sampling),
      decoding._MIN_SEGMENT,
    )
  )


@functools.partial(jax.jit, static_argnames='config')
def cached_logits(params, texts, tokens, config=CONFIG):
  """Logits of every position, computed one position after the other."""
  params = parameters.for_sampling(config, params)
  state = parti.Parti(config).apply({'params': params}, texts, method='encode_text')

  def body(state, previous):
    logits, state = decode(params, previous[:, None], state, config)
    return state, logits[:, 0]

  return jax.lax.scan(body, state, token_decoder.shifted(tokens).T)[1].swapaxes(0, 1)


def decode(params, previous, state, config):
  """Logits of the next positions, and the state with them."""
  model = token_decoder.TokenDecoder(config)
  return model.apply({'params': params['image_decoder']}, previous, state=state)


@functools.partial(jax.jit, static_argnames='config')
def all_logits(params, texts, tokens, config=CONFIG):
  return parti.Parti(config).apply({'params': params}, texts, tokens)


@pytest.fixture(scope='module')
def tokens():
  shape = (len(TEXTS), CONFIG.image_length)
  return np.random.default_rng(0).integers(0, CONFIG.codebook_size, shape).astype(np.int32)


# The first places of which a pattern hides an earlier one: of a square of 3 in the first row the
# third, in the second row the first and the third; of a row the fifth; of a column the second.
@pytest.mark.parametrize(
  'patterns, same, different',
  [
    (('global',), 6, []),
    (('conv',), 2, [2, 3, 5]),
    (('row',), 4, [4, 5]),
    (('column',), 1, [1, 2, 3, 4, 5]),
    (('row', 'column'), 1, [1, 2]),
  ],
)
def test_cached_logits_are_those_of_the_whole_sequence(params, tokens, patterns, same, different):
  config = dataclasses.replace(CONFIG, attention_patterns=patterns, conv_kernel=3)
  expected = all_logits(params, TEXTS, tokens, config)
  assert np.std(expected) > 0.1
  # Logits up to 17, of which float32 keeps 2e-6.
  np.testing.assert_allclose(
    cached_logits(params, TEXTS, tokens, config), expected, rtol=2e-6, atol=2e-5
  )
  differs = np.abs(expected - all_logits(params, TEXTS, tokens)).max(axis=(0, 2)) > 1e-3
  assert not differs[:same].any() and differs[different].all()


@pytest.fixture(scope='module')
def tall():
  """A grid on which rings turn more than once, with a layer of each pattern."""
  config = dataclasses.replace(
    CONFIG,
    grid=(7, 2),
    conv_kernel=3,
    decoder_layers=4,
    attention_patterns=('conv', 'row', 'column', 'global'),
  )
  params = random_parameters.of(parti.Parti(config), parti.example_inputs(config), 1, factor=2.0)
  texts = jnp.asarray(np.resize(TEXTS, (8, CONFIG.text_length)))
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 11, (8, 14)), jnp.int32)
  return config, params, texts, tokens


def test_a_mixed_schedule_with_rings_that_turn(tall):
  config, params, texts, tokens = tall
  expected = all_logits(params, texts, tokens, config)
  np.testing.assert_allclose(cached_logits(params, texts, tokens, config), expected, atol=5e-5)
  state = parti.Parti(config).apply({'params': params}, texts, method='encode_text')
  assert [keys.shape for keys, _ in state.caches] == [(8, 2, slots, 8) for slots in (4, 3, 14, 14)]


def test_any_number_of_positions_at_once(tall):
  """Chunks longer and shorter than the rings give the logits and the state of single steps."""
  config, params, texts, tokens = tall
  expected = all_logits(params, texts, tokens, config)
  encode_text = jax.jit(functools.partial(parti.Parti(config).apply, method='encode_text'))
  step = jax.jit(functools.partial(decode, config=config))
  previous = token_decoder.shifted(tokens)
  states = []
  for chunks in ((1,) * 14, (14,), (3, 1, 4, 6)):
    state, found = encode_text({'params': params}, texts), []
    for length, first in zip(chunks, np.cumsum((0,) + chunks)):
      assert state.position == first
      logits, state = step(params, previous[:, first : first + length], state)
      found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1), expected, atol=5e-5)
    states.append(state)
  for state in states[1:]:
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=5e-4), state, states[0])


def test_rows_at_positions_of_their_own(tall):
  """Each row starts at another step, over keys and values that an earlier picture left."""
  config, params, texts, tokens = tall
  rows, length = tokens.shape
  expected = np.asarray(all_logits(params, texts, tokens, config))
  params = parameters.for_sampling(config, params)
  previous = np.asarray(token_decoder.shifted(tokens))
  state = parti.Parti(config).apply({'params': params}, texts, method='encode_text')
  step = jax.jit(functools.partial(decode, config=config))
  started = np.zeros(rows, bool)
  found = np.full(expected.shape, np.nan)
  for turn in range(2 * length):
    position = (turn + 3 * np.arange(rows)) % length
    started |= position == 0
    state = state.replace(position=jnp.asarray(position, jnp.int32))
    logits, state = step(params, previous[np.arange(rows), position][:, None], state)
    found[started, position[started]] = logits[started, 0]
  np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_mixed_schedule_on_a_mesh(tall):
  config, params, texts, tokens = tall
  expected = all_logits(params, texts, tokens, config)
  with rules.partitioned(mesh_lib.make_mesh(data=4, tensor=2), rules.logical_axis_rules()):
    found = jax.jit(functools.partial(cached_logits.__wrapped__, config=config))(
      params, texts, tokens
    )
  np.testing.assert_allclose(found, expected, atol=5e-5)


def test_a_later_token_changes_no_earlier_logit(params, tokens):
  before = np.asarray(all_logits(params, TEXTS, tokens))
  for position in range(CONFIG.image_length):
    changed = tokens.copy()
    changed[:, position] = (changed[:, position] + 1) % CONFIG.codebook_size
    after = np.asarray(all_logits(params, TEXTS, changed))
    np.testing.assert_array_equal(after[:, : position + 1], before[:, : position + 1])
    if position + 1 < CONFIG.image_length:
      assert np.any(after[:, position + 1 :] != before[:, position + 1 :])


def test_greedy_sampling_follows_the_logits_of_the_whole_sequence(params):
  drawn = draw(params, TEXTS, [0, 0, 0], greedy=True)
  logits = all_logits(params, TEXTS, drawn)
  np.testing.assert_array_equal(drawn, np.argmax(logits, axis=-1))


def test_guidance_scale_one_is_conditional_sampling(params):
  texts, index = np.repeat(TEXTS, 4, axis=0), [0, 1, 2, 3] * 3
  plain = draw(params, texts, index)
  np.testing.assert_array_equal(draw(params, texts, index, guided=True, guidance_scale=1.0), plain)
  assert np.any(draw(params, texts, index, guided=True, guidance_scale=4.0) != plain)


def test_guidance_leads_from_the_logits_without_text_to_those_with_it(params, tokens):
  empty = text_encoders.empty_text(CONFIG, jnp.asarray(TEXTS))
  np.testing.assert_array_equal(empty[0], [1, 0, 0, 0, 0])
  both = np.stack([TEXTS, empty], axis=1).reshape(-1, CONFIG.text_length)
  doubled = np.asarray(cached_logits(params, both, np.repeat(tokens, 2, axis=0)))
  conditional = np.asarray(all_logits(params, TEXTS, tokens))
  unconditional = np.asarray(all_logits(params, np.asarray(empty), tokens))
  for scale in (0.0, 1.0, 3.0):
    for position in range(CONFIG.image_length):
      expected = unconditional + scale * (conditional - unconditional)
      np.testing.assert_allclose(
        decoding.guide(jnp.asarray(doubled[:, position]), scale), expected[:, position], atol=1e-4
      )


def test_a_ramp_of_guidance_is_a_loop_with_a_scale_for_each_position(params):
  scales = np.linspace(1.0, 4.0, CONFIG.image_length, dtype=np.float32)
  drawn = draw(params, TEXTS, [0, 0, 0], guided=True, greedy=True, guidance_scale=scales)
  empty = np.asarray(text_encoders.empty_text(CONFIG, jnp.asarray(TEXTS)))
  expected = np.zeros_like(drawn)
  for position, scale in enumerate(scales):
    conditional, unconditional = (
      np.asarray(all_logits(params, texts, expected))[:, position] for texts in (TEXTS, empty)
    )
    guided = unconditional + scale * (conditional - unconditional)
    expected[:, position] = guided.argmax(axis=-1)
  np.testing.assert_array_equal(drawn, expected)
  constant = draw(params, TEXTS, [0, 0, 0], guided=True, greedy=True, guidance_scale=4.0)
  assert np.any(constant != drawn)
  np.testing.assert_array_equal(
    constant,
    draw(
      params,
      TEXTS,
      [0, 0, 0],
      guided=True,
      greedy=True,
      guidance_scale=np.full(CONFIG.image_length, 4.0, np.float32),
    ),
  )


def test_an_image_does_not_depend_on_the_others_of_its_batch(params):
  texts, index = np.repeat(TEXTS, 3, axis=0), np.tile([0, 1, 2], 3)
  settings = {'seed': 5, 'guided': True, 'guidance_scale': 1.5, 'temperature': 4.0}
  whole = draw(params, texts, index, **settings)
  assert len(np.unique(whole, axis=0)) == len(whole)
  order = np.array([4, 0, 8, 2, 6])
  for size in (1, 2, 5):
    chosen = order[:size]
    part = draw(params, texts[chosen], index[chosen], **settings)
    np.testing.assert_array_equal(part, whole[chosen])


def test_a_seed_and_an_index_choose_the_image(params):
  texts = np.repeat(TEXTS[:1], 4, axis=0)
  np.testing.assert_array_equal(draw(params, texts, [0] * 4)[0], draw(params, texts, [0] * 4)[3])
  assert np.any(draw(params, texts, range(4), seed=0) != draw(params, texts, range(4), seed=1))


def test_one_token_left_is_the_likeliest(params):
  index = [0, 1, 2]
  greedy = draw(params, TEXTS, index, greedy=True)
  np.testing.assert_array_equal(draw(params, TEXTS, index, filtered=True, top_k=1), greedy)
  np.testing.assert_array_equal(draw(params, TEXTS, index, filtered=True, top_p=1e-6), greedy)
  assert np.any(draw(params, TEXTS, index) != greedy)


def test_long_sequences_grow_their_cache(monkeypatch, params):
  whole = draw(params, TEXTS, [0, 1, 2])
  monkeypatch.setattr(decoding, '_MIN_SEGMENT', 2)
  assert decoding._segment_ends(CONFIG.patterns) == [2, 4, 6]
  np.testing.assert_array_equal(draw(params, TEXTS, [0, 1, 2]), whole)


@pytest.mark.parametrize('cache, sizes', [('float', {'data': 4, 'tensor': 2}), ('int8', {})])
def test_growing_caches_of_all_patterns_give_the_same_tokens(tall, monkeypatch, cache, sizes):
  config, params, texts, _ = tall
  params = parameters.for_sampling(config, params)
  sampling = decoding.Sampling(2.0, guided=True, greedy=True, cache=cache)

  @jax.jit
  def whole(params):
    keys = decoding.image_keys(0, jnp.arange(len(texts)))
    return decoding.sample_tokens(config, params, texts, keys, sampling)

  in_segments = jax.jit(whole.__wrapped__)
  expected = np.asarray(whole(params))
  monkeypatch.setattr(decoding, '_MIN_SEGMENT', 3)
  monkeypatch.setattr(decoding, '_MAX_SEGMENTS', 5)
  assert decoding._segment_ends(config.patterns) == [3, 6, 9, 12, 14]
  with rules.partitioned(mesh_lib.make_mesh(**sizes), rules.logical_axis_rules()):
    found = in_segments(params)
  np.testing.assert_array_equal(found, expected)
  assert len(np.unique(expected)) > 4


def test_segments_cover_every_length():
  pattern = attention_patterns.AttentionPattern
  assert decoding._segment_ends([pattern('global', (8, 8))]) == [64]
  assert decoding._segment_ends([pattern('global', (32, 32))]) == [256, 512, 768, 1024]
  assert decoding._segment_ends([pattern('global', (13, 10))]) == [64, 128, 130]
  # Once no cache grows any more one loop draws the rest.
  assert decoding._segment_ends([pattern('conv', (32, 32)), pattern('row', (32, 32))]) == [1024]
  assert decoding._segment_ends([pattern('conv', (32, 32), 23)]) == [256, 1024]


def kept(logits, top_k=0, top_p=1.0):
  """Which logits are left, as a list of indices per row."""
  filtered = np.asarray(
    decoding.filter_logits(jnp.asarray(logits, jnp.float32), jnp.int32(top_k), jnp.float32(top_p))
  )
  finite = np.isfinite(filtered)
  np.testing.assert_array_equal(filtered[finite], np.asarray(logits, np.float32)[finite])
  return [list(np.flatnonzero(row)) for row in finite]


def test_top_k_keeps_the_likeliest():
  logits = [[0.5, -3.0, 2.0, 1.0, -0.5], [-9.0, -1.0, -8.0, -7.0, -2.0]]
  assert kept(logits, top_k=1) == [[2], [1]]
  assert kept(logits, top_k=3) == [[0, 2, 3], [1, 3, 4]]
  assert kept(logits, top_k=0) == kept(logits, top_k=99) == [[0, 1, 2, 3, 4]] * 2


def test_top_p_keeps_the_smallest_set_with_that_probability():
  logits = np.log([[0.1, 0.5, 0.05, 0.35], [0.25, 0.2, 0.15, 0.4]])
  assert kept(logits, top_p=0.5 - 1e-4) == [[1], [0, 3]]
  assert kept(logits, top_p=0.6) == [[1, 3], [0, 3]]
  assert kept(logits, top_p=0.84) == [[1, 3], [0, 1, 3]]
  assert kept(logits, top_p=0.9) == [[0, 1, 3], [0, 1, 2, 3]]
  assert kept(logits, top_p=1.0) == [[0, 1, 2, 3]] * 2


def test_top_p_counts_among_what_top_k_leaves():
  logits = np.log([[0.1, 0.5, 0.05, 0.35]])
  # Of the two that are left the likelier has 0.5 / 0.85 = 0.59.
  assert kept(logits, top_k=2, top_p=0.58) == [[1]]
  assert kept(logits, top_k=2, top_p=0.6) == [[1, 3]]


def test_filters_agree_with_sorting():
  logits = np.random.default_rng(1).normal(size=(6, 50)) * 4.0
  for top_k, top_p in ((7, 1.0), (0, 0.8), (20, 0.95)):
    expected = []
    for row in logits.astype(np.float32):
      order = np.argsort(-row)[: top_k or None]
      mass = np.exp(row[order] - row.max())
      before = np.cumsum(mass) - mass
      expected.append(sorted(order[before < top_p * mass.sum()]))
    assert kept(logits, top_k, top_p) == expected


def test_the_likeliest_token_is_the_first_with_the_largest_logit():
  logits = np.random.default_rng(0).normal(size=(2, 3, 7)).astype(np.float32)
  np.testing.assert_array_equal(decoding.likeliest(jnp.asarray(logits)), logits.argmax(axis=-1))
  ties = jnp.float32([[-np.inf, 1.0, 1.0], [-np.inf, -np.inf, -np.inf]])
  assert decoding.likeliest(ties).tolist() == [1, 0]


def test_draws_have_the_softmax_of_the_logits():
  probabilities = np.array([0.5, 0.3, 0.15, 0.05])
  count = 4000
  logits = jnp.broadcast_to(jnp.log(probabilities), (count, 4)).astype(jnp.float32)
  keys = decoding.image_keys(jnp.uint32(0), jnp.arange(count))

  def shares(temperature, top_k, top_p):
    sampling = decoding.Sampling(1.0, temperature, top_k, top_p, filtered=True)
    drawn = decoding.choose(logits, keys, jnp.int32(3), sampling)
    return np.bincount(drawn, minlength=4) / count

  np.testing.assert_allclose(shares(1.0, 0, 1.0), probabilities, atol=0.03)
  sharper = probabilities**2 / np.sum(probabilities**2)
  np.testing.assert_allclose(shares(0.5, 0, 1.0), sharper, atol=0.03)
  np.testing.assert_allclose(shares(1.0, 2, 1.0), [0.625, 0.375, 0.0, 0.0], atol=0.03)
  np.testing.assert_allclose(shares(1.0, 0, 0.9), np.array([50, 30, 15, 0]) / 95, atol=0.03)

"""Speculative decoding: the tokens of sequential sampling, or their distribution, in fewer passes."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters
import scipy.stats

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models.nn import attention_cache
from parti_jax.models.nn import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.sampling import speculative

CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=16,
  mlp_width=32,
  heads=2,
  text_vocabulary=20,
  text_length=5,
  codebook_size=11,
  grid=(4, 3),
  dtype='float32',
  conv_kernel=3,
)
# A layer of each pattern. The rings of 'conv' and 'row' have 5 and 4 slots.
MIXED = dataclasses.replace(
  CONFIG, decoder_layers=4, attention_patterns=('conv', 'row', 'column', 'global')
)
# A picture is one of 81.
TOY = dataclasses.replace(CONFIG, decoder_layers=1, codebook_size=3, grid=(2, 2))
TEXTS = np.array([[4, 7, 1, 0, 0], [3, 1, 0, 0, 0], [9, 9, 8, 5, 1], [2, 6, 1, 0, 0]], np.int32)


@functools.cache
def params_of(config):
  """Parameters large enough for texts and tokens to matter; of TOY, for many pictures to be likely."""
  factor = 1.5 if config == TOY else 2.0
  inputs = parti.example_inputs(config)
  return jax.device_put(random_parameters.of(parti.Parti(config), inputs, factor=factor))


def drawing(config, sample_tokens):
  """A jitted function of parameters, texts, indices and the Sampling."""

  def draw(params, texts, index, sampling):
    keys = decoding.image_keys(jnp.uint32(0), index)
    params = parameters.for_sampling(config, params)
    return sample_tokens(config, params, texts, keys, sampling)

  return jax.jit(draw)


cached_drawing = functools.cache(drawing)


def draw(config, sample_tokens, texts=TEXTS, index=None, **sampling):
  index = np.arange(len(texts), dtype=np.int32) if index is None else np.asarray(index, np.int32)
  function = cached_drawing(config, sample_tokens)
  return jax.device_get(
    function(params_of(config), np.asarray(texts), index, decoding.Sampling(**sampling))
  )


def check_same(config, window, **sampling):
  """Checks that tokens are those of sequential sampling; returns the passes."""
  expected = draw(config, decoding.sample_tokens, **sampling)
  tokens, passes, usage = draw(config, speculative.sample_tokens, window=window, **sampling)
  np.testing.assert_array_equal(tokens, expected)
  assert len(np.unique(tokens)) > 2 and usage is None
  window = min(window, config.image_length)
  assert np.all(passes.needed >= -(-config.image_length // window))
  assert np.all(passes.needed <= config.image_length)
  np.testing.assert_array_equal(passes.computed, [passes.needed.max()] * len(tokens))
  return passes


@pytest.mark.parametrize('window', [2, 4, 99])
def test_greedy_tokens_are_those_of_sequential_sampling(window):
  check_same(MIXED, window, guided=True, guidance_scale=1.5, greedy=True)


@pytest.mark.parametrize('pattern', attention_patterns.PATTERNS)
def test_greedy_tokens_with_each_pattern(pattern):
  config = dataclasses.replace(CONFIG, attention_patterns=(pattern,))
  passes = check_same(config, 6, greedy=True)
  assert passes.needed.mean() < config.image_length


@pytest.mark.parametrize('drafts', ['above', 'sample', 'random'])
def test_greedy_tokens_with_other_drafts(drafts):
  check_same(CONFIG, 4, greedy=True, drafts=drafts)


def test_equal_tokens_with_everything_that_settings_change():
  scales = np.linspace(1.0, 2.0, MIXED.image_length, dtype=np.float32)
  passes = check_same(
    MIXED,
    5,
    rule='equal',
    guided=True,
    guidance_scale=scales,
    temperature=0.8,
    filtered=True,
    top_k=6,
    top_p=0.9,
  )
  assert np.ptp(passes.needed)  # The images of a batch advance by different numbers.


@pytest.mark.parametrize('skip_threshold', [None, 0.6])
def test_tokens_exit_as_in_sequential_sampling(skip_threshold):
  settings = {
    'guided': True,
    'guidance_scale': 2.0,
    'exit_threshold': 0.6,
    'skip_threshold': skip_threshold,
    'rule': 'equal',
  }
  expected, usage = draw(MIXED, adaptive.sample_tokens, **settings)
  tokens, passes, found = draw(MIXED, speculative.sample_tokens, window=4, **settings)
  np.testing.assert_array_equal(tokens, expected)
  np.testing.assert_array_equal(found.layers, usage.layers)
  np.testing.assert_array_equal(found.unguided, usage.unguided)
  assert len(np.unique(usage.layers)) > 1 and usage.unguided.any() == (skip_threshold is not None)
  assert np.all(found.computed[..., 0] >= found.layers)
  assert np.all(passes.needed <= MIXED.image_length)


def test_an_image_does_not_depend_on_the_others_of_its_batch():
  whole, passes, _ = draw(MIXED, speculative.sample_tokens, window=4)
  assert np.ptp(passes.needed)
  part, fewer, _ = draw(MIXED, speculative.sample_tokens, TEXTS[1:3], [1, 2], window=4)
  np.testing.assert_array_equal(part, whole[1:3])
  np.testing.assert_array_equal(fewer.needed, passes.needed[1:3])


def test_on_a_mesh_the_same_tokens():
  settings = {'window': 4, 'guided': True, 'guidance_scale': 1.5}
  expected, params = draw(MIXED, speculative.sample_tokens, **settings), params_of(MIXED)
  with rules.partitioned(mesh_lib.make_mesh(data=4, tensor=2), rules.logical_axis_rules()):
    found = jax.device_get(
      drawing(MIXED, speculative.sample_tokens)(
        params, TEXTS, np.arange(4, dtype=np.int32), decoding.Sampling(**settings)
      )
    )
  jax.tree.map(np.testing.assert_array_equal, found, expected)


PICTURES = np.array(list(itertools.product(range(3), repeat=4)), np.int32)
COUNT = 6000


@functools.cache
def logits_of_pictures():
  """Logits of every token of every picture, with text and without."""
  text = jnp.asarray(np.repeat(TEXTS[:1], len(PICTURES), axis=0))
  logits = jax.jit(functools.partial(parti.Parti(TOY).apply, {'params': params_of(TOY)}))
  return [
    np.asarray(logits(texts, jnp.asarray(PICTURES)), np.float64)
    for texts in (text, text_encoders.empty_text(TOY, text))
  ]


def probabilities(scale, temperature, top_k):
  """The probability of every picture."""
  with_text, without = logits_of_pictures()
  logits = (without + scale * (with_text - without)) / temperature
  chances = np.exp(logits)
  chances[logits < np.sort(logits)[..., -top_k, None]] = 0.0
  chances /= chances.sum(axis=-1, keepdims=True)
  return np.take_along_axis(chances, PICTURES[..., None], axis=-1)[..., 0].prod(axis=-1)


def p_value(scale=1.0, temperature=1.0, top_k=0, **settings):
  """P-value of the chi-squared test that pictures have their probabilities, and the passes."""
  sampling = decoding.Sampling(
    scale, temperature, top_k, guided=scale != 1.0, filtered=top_k > 0, **settings
  )
  texts, index = np.repeat(TEXTS[:1], COUNT, axis=0), np.arange(COUNT, dtype=np.int32)
  draw_pictures = drawing(TOY, speculative.sample_tokens)
  tokens, passes, _ = jax.device_get(draw_pictures(params_of(TOY), texts, index, sampling))
  found = np.bincount(tokens @ [27, 9, 3, 1], minlength=len(PICTURES))
  expected = COUNT * probabilities(scale, temperature, top_k)
  np.testing.assert_allclose(expected.sum(), COUNT)
  assert not found[expected == 0.0].any()
  common = expected >= 5
  assert common.sum() > 10
  found, expected = (
    np.append(numbers[common], numbers[~common].sum()) for numbers in (found, expected)
  )
  if not expected[-1]:
    found, expected = found[:-1], expected[:-1]
  return scipy.stats.chisquare(found, expected).pvalue, passes


@pytest.mark.parametrize(
  'settings',
  [
    {'window': 4},
    {'window': 3, 'drafts': 'sample'},
    {'window': 2, 'drafts': 'random', 'scale': 1.5},
    {'window': 4, 'drafts': 'above', 'scale': 1.5, 'temperature': 1.5, 'top_k': 2},
    {'window': 4, 'rule': 'equal'},
  ],
)
def test_pictures_have_the_probabilities_of_sequential_sampling(settings):
  p, passes = p_value(**settings)
  assert p > 1e-3
  assert passes.needed.mean() < 3.8 and passes.needed.max() <= 4


def _accept_all(logits, proposals, drafts, uniform):
  del proposals, uniform
  return jnp.full(len(drafts), drafts.shape[1]), logits[:, 0]


def _replace_from_target(logits, proposals, drafts, uniform, check=speculative.check_by_ratio):
  accepted, _ = check(logits, proposals, drafts, uniform)
  place = jnp.minimum(accepted, drafts.shape[1] - 1)[:, None, None]
  return accepted, jnp.take_along_axis(logits, place, axis=1)[:, 0]


def _unknown_proposal(tokens, codebook_size):
  return jnp.zeros((*tokens.shape, codebook_size))


@pytest.mark.parametrize(
  'function, broken',
  [
    ('check_by_ratio', _accept_all),
    ('check_by_ratio', _replace_from_target),
    ('_only', _unknown_proposal),
  ],
)
def test_the_test_notices_a_wrong_rule(monkeypatch, function, broken):
  monkeypatch.setattr(speculative, function, broken)
  assert p_value(window=4)[0] < 1e-6


def test_check_by_ratio_by_hand():
  target = jnp.log(jnp.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.2, 0.2, 0.6]]))
  proposed = jnp.log(jnp.array([[0.2, 0.6, 0.2], [0.4, 0.4, 0.2], [0.2, 0.5, 0.3]]))
  drafts = jnp.array([1, 0, 2])
  # The drafts are accepted with probabilities 1/2, 1/4 and 1.
  for uniform, accepted, rest in (
    ([0.51, 0.0, 0.0], 0, [1.0, 0.0, 0.0]),
    ([0.49, 0.26, 0.0], 1, [0.0, 2 / 3, 1 / 3]),
    ([0.49, 0.24, 0.99], 3, None),
  ):
    found, logits = speculative.check_by_ratio(
      target[None], proposed[None], drafts[None], jnp.array([uniform])
    )
    assert found.tolist() == [accepted]
    if rest:
      np.testing.assert_allclose(jax.nn.softmax(logits[0]), rest, atol=1e-6)


def test_equal_distributions_leave_a_replacement_that_they_allow():
  logits = jnp.array([[[-jnp.inf, 0.0, 0.0]]])
  _, rest = speculative.check_by_ratio(logits, logits, jnp.array([[1]]), jnp.array([[0.5]]))
  np.testing.assert_allclose(jax.nn.softmax(rest[0]), [0.0, 0.5, 0.5])


@pytest.mark.parametrize(
  'drafts, expected',
  [
    # From position 4 of the grid of 4 × 3 on, the tokens before it being their positions.
    ('left', [3, 3, 3, 1, 2]),
    ('above', [1, 2, 3, 1, 2]),
  ],
)
def test_drafts_repeat_the_nearest_known_token(drafts, expected):
  sampling = decoding.Sampling(window=5, drafts=drafts, greedy=True)
  speculation = speculative._Speculation(
    CONFIG,
    parameters.for_sampling(CONFIG, params_of(CONFIG)),
    jax.random.split(jax.random.key(0), 1),
    sampling,
  )
  known = jnp.array([4])
  assert speculation._neighbors(known, known).tolist() == [expected]
  assert speculation._neighbors(jnp.array([0]), jnp.array([0])).tolist() == [[-1] * 5]
  first_row = speculation._neighbors(jnp.array([1]), jnp.array([1])).tolist()
  assert first_row == [[0, 0, 0, -1, -1] if drafts == 'left' else [0, 0, 0, 0, 0]]


@pytest.mark.parametrize('pattern', attention_patterns.PATTERNS)
def test_each_row_writes_as_many_positions_as_it_counts(pattern):
  pattern = attention_patterns.AttentionPattern(pattern, (4, 3), 3)
  slots, length, start, count = pattern.num_slots(12), 7, [0, 4, 9, 5], [7, 2, 3, 0]
  random = np.random.default_rng(0)
  empty = jnp.asarray(random.normal(size=(4, 2, slots, 3)), jnp.float32)
  new = jnp.asarray(random.normal(size=(4, length, 2, 3)), jnp.float32)
  found = attention_cache.write_counted(
    (empty, -empty), new, -new, jnp.array(start), jnp.array(count), pattern
  )
  for row in range(4):
    cache = (empty[row : row + 1], -empty[row : row + 1])
    for ahead in range(count[row]):
      entry = new[row : row + 1, ahead : ahead + 1]
      cache = attention_cache.write_cache(
        cache, entry, -entry, jnp.int32(start[row] + ahead), pattern
      )
    np.testing.assert_array_equal(found[0][row], cache[0][0])
    np.testing.assert_array_equal(found[1][row], cache[1][0])

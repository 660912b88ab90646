"""Early exit and guidance that skips a pass, against plain Python that decides token by token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.models.nn import transformer
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.sampling import adaptive
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters

CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=3,
  width=16,
  mlp_width=32,
  heads=2,
  text_vocabulary=20,
  text_length=5,
  codebook_size=11,
  grid=(2, 3),
  dtype='float32',
  attention_patterns=('conv', 'global', 'row'),
  conv_kernel=3,
)
TEXTS = np.array([[4, 7, 1, 0, 0], [3, 1, 0, 0, 0], [9, 9, 8, 5, 1], [2, 6, 1, 0, 0]], np.int32)
SCALE = 2.0


@pytest.fixture(scope='module')
def params():
  inputs = parti.example_inputs(CONFIG)
  return jax.device_put(random_parameters.of(parti.Parti(CONFIG), inputs, seed=1, factor=3.0))


def _draw(params, exit_threshold, skip_threshold):
  return adaptive.sample_tokens(
    CONFIG,
    parameters.for_sampling(CONFIG, params),
    jnp.asarray(TEXTS),
    decoding.image_keys(0, jnp.arange(len(TEXTS))),
    decoding.Sampling(
      SCALE,
      exit_threshold=exit_threshold,
      skip_threshold=skip_threshold,
      guided=True,
      greedy=True,
    ),
  )


draw = jax.jit(_draw)


MODEL = parti.Parti(CONFIG)
BLOCK = transformer.DecoderBlock(
  CONFIG.width, CONFIG.mlp_width, CONFIG.heads, dtype=jnp.float32, parent=None
)
encode_text = jax.jit(functools.partial(MODEL.apply, method='encode_text'))


@jax.jit
def _embed(params, previous, position):
  return MODEL.apply(
    {'params': params},
    previous[None, None],
    position,
    method=lambda model, *inputs: model.image_decoder.embed(*inputs),
  )


@functools.partial(jax.jit, static_argnames='number')
def _layer(params, x, cache, text, mask, position, number):
  pattern = CONFIG.layer_pattern(number)
  return BLOCK.apply({'params': params}, x, text, mask, cache, position, pattern, method='decode')


@jax.jit
def _logits(params, x):
  return MODEL.apply(
    {'params': params},
    x,
    method=lambda model, x: model.image_decoder.logits_from(model.image_decoder.decoder.norm(x)),
  )[0, 0]


class _Branch:
  """One text's decoder, one layer and one position at a time."""

  def __init__(self, params, text):
    self.params = params
    self.layers = parameters.for_sampling(CONFIG, params)['image_decoder']['decoder']['layers']
    state = encode_text({'params': params}, text[None])
    self.texts, self.mask, self.caches = state.texts, state.text_mask, state.caches

  def embed(self, previous, position):
    return _embed(self.params, np.int32(previous), np.int32(position))

  def layer(self, number, x, position):
    """A whole step, which writes the cache; its output is for the caller to take or leave."""
    out, self.caches[number] = _layer(
      self.layers[number],
      x,
      self.caches[number],
      self.texts[number],
      self.mask,
      np.int32(position),
      number,
    )
    return out

  def logits(self, x):
    return np.asarray(_logits(self.params, x))


def _confidence(logits):
  chances = np.sort(np.exp(logits - np.logaddexp.reduce(logits)))
  return chances[-1] - chances[-2]


def plain(params, text, exit_threshold, skip_threshold):
  """One image: its tokens, the layers of each, which of them were drawn without guidance."""
  empty = np.asarray(text_encoders.empty_text(CONFIG, jnp.asarray(text)[None]))[0]
  with_text, without = _Branch(params, text), _Branch(params, empty)
  tokens, passed, skipped = [0], [], []
  for position in range(CONFIG.image_length):
    x, count, inputs = with_text.embed(tokens[-1], position), None, []
    for number in range(CONFIG.decoder_layers):
      if count is None and number and _confidence(with_text.logits(x)) >= exit_threshold:
        count = number
      inputs.append(x)
      out = with_text.layer(number, x, position)
      x = out if count is None else x
    count = count or CONFIG.decoder_layers
    logits = with_text.logits(x)
    skip = _confidence(logits) >= skip_threshold
    x = without.embed(tokens[-1], position)
    for number in range(CONFIG.decoder_layers):
      # The pass with text, layer by layer, is what a skipped one leaves in the cache.
      out = without.layer(number, inputs[number] if skip else x, position)
      x = out if number < count else x
    if not skip:
      bare = without.logits(x)
      logits = bare + SCALE * (logits - bare)
    tokens.append(int(np.argmax(logits)))
    passed.append(count)
    skipped.append(skip)
  return tokens[1:], passed, skipped


def _check(params, exit_threshold, skip_threshold):
  tokens, usage = jax.device_get(
    draw(
      params,
      None if exit_threshold > 1 else exit_threshold,
      None if skip_threshold > 1 else skip_threshold,
    )
  )
  expected = [plain(params, text, exit_threshold, skip_threshold) for text in TEXTS]
  for row, (own_tokens, passed, skipped) in enumerate(expected):
    assert tokens[row].tolist() == own_tokens
    assert usage.layers[row].tolist() == passed
    assert usage.unguided[row].tolist() == skipped
  # What was computed is what the slowest image needed, and no more.
  assert usage.computed[0, :, 0].tolist() == usage.layers.max(axis=0).tolist()
  needed = np.where(usage.unguided, 0, usage.layers)
  together = skip_threshold > 1
  expected = usage.layers if together else needed
  assert usage.computed[0, :, 1].tolist() == expected.max(axis=0).tolist()
  return tokens, usage


def test_tokens_leave_and_later_ones_find_the_cache_whole(params):
  _, usage = _check(params, 0.8, 2.0)
  assert set(usage.layers.ravel().tolist()) == {1, 2, 3}
  assert np.ptp(usage.layers, axis=0).any()  # Images of the batch leave at different layers.


def test_a_pass_is_skipped_where_the_text_alone_is_sure(params):
  _, usage = _check(params, 2.0, 0.8)
  assert 0 < usage.unguided.mean() < 1
  assert (usage.computed[0, :, 1] == 0).sum() < CONFIG.image_length


def test_both_at_once(params):
  tokens, usage = _check(params, 0.8, 0.8)
  assert usage.unguided.any() and usage.layers.min() < 3
  assert np.any(tokens != draw(params, 0.8, None)[0])


def test_nothing_is_computed_once_all_have_left(params):
  _, usage = draw(params, 0.0, 0.0)
  np.testing.assert_array_equal(usage.computed, [[[1, 0]] * CONFIG.image_length] * len(TEXTS))
  assert np.all(usage.layers == 1) and np.all(usage.unguided)


def test_thresholds_that_nothing_reaches_change_no_token(params):
  expected = jax.jit(functools.partial(decoding.sample_tokens, CONFIG))(
    parameters.for_sampling(CONFIG, params),
    TEXTS,
    decoding.image_keys(0, jnp.arange(len(TEXTS))),
    decoding.Sampling(SCALE, guided=True, greedy=True),
  )
  for thresholds in ((1.5, None), (1.5, 1.5)):
    tokens, usage = draw(params, *thresholds)
    np.testing.assert_array_equal(tokens, expected)
    assert np.all(usage.layers == 3) and np.all(usage.computed == 3) and not np.any(usage.unguided)


def test_on_a_mesh_the_same_tokens_leave(params):
  tokens, usage = draw(params, 0.8, 0.8)
  with rules.partitioned(mesh_lib.make_mesh(data=4, tensor=2), rules.logical_axis_rules()):
    found = jax.device_get(jax.jit(_draw)(params, 0.8, 0.8))
  np.testing.assert_array_equal(found[0], tokens)
  jax.tree.map(np.testing.assert_array_equal, found[1], jax.device_get(usage))


def test_confidence_by_hand():
  logits = np.log([[0.5, 0.2, 0.3], [0.25, 0.5, 0.25], [0.4, 0.4, 0.2]]).astype(np.float32)
  np.testing.assert_allclose(adaptive.confidence(jnp.asarray(logits)), [0.2, 0.25, 0.0], atol=1e-6)

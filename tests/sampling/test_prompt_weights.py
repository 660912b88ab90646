"""Weights of words in a prompt."""

import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

import parti_jax
from parti_jax.core.errors import UserError
from parti_jax.models import llamagen
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.sampling import prompt_weights


@pytest.mark.parametrize(
  'prompt, text, spans',
  [
    ('red apple', 'red apple', []),
    ('a (red hat:1.5) here', 'a red hat here', [(2, 9, 1.5)]),
    ('(a:0)(b: 2)', 'ab', [(0, 1, 0.0), (1, 2, 2.0)]),
    (r'cat \(animal\)', 'cat (animal)', []),
    (r'(cat \(animal\):2)', 'cat (animal)', [(0, 12, 2.0)]),
    (r'back\\slash, a\b', r'back\slash, a\b', []),
    ('hand: dark (skin: tone:2)', 'hand: dark skin: tone', [(11, 21, 2.0)]),
  ],
)
def test_reads_weights(prompt, text, spans):
  assert prompt_weights.parsed(prompt) == (text, spans)


@pytest.mark.parametrize(
  'prompt, message',
  [
    ('cat (animal)', r'write \\\( and'),
    ('cat (animal', 'character 5'),
    ('cat)', 'character 4'),
    ('((a:1):2)', 'character 1'),
    ('(cat:much)', "weight 'much'"),
    ('(cat:-1)', "weight '-1'"),
    ('(cat:11)', 'from 0 to 10'),
    ('(cat:nan)', 'from 0 to 10'),
    ('(cat:)', "weight ''"),
  ],
)
def test_refuses_what_is_no_weight(prompt, message):
  with pytest.raises(UserError, match=message):
    prompt_weights.parsed(prompt)


@pytest.fixture(scope='module')
def model(tiny_folder):
  return parti_jax.load(tiny_folder)


def weights_of(model, prompt):
  text, _ = prompt_weights.parsed(prompt)
  ids = model.encode_prompts([text])[0]
  return ids, prompt_weights.token_weights(model._prompts.vocabulary, prompt, ids)


def test_tokens_of_weighted_words(model):
  ids, weights = weights_of(model, 'man (cook:2): medium skin (tone:0.5)')
  count = lambda text: np.count_nonzero(model.encode_prompts([text])[0]) - 1  # Without the end.
  expected = np.ones(len(ids), np.float32)
  expected[count('man') : count('man cook')] = 2
  expected[count('man cook: medium skin') : count('man cook: medium skin tone')] = 0.5
  np.testing.assert_array_equal(weights, expected)
  assert weights[np.flatnonzero(ids)[-1]] == 1  # The end of the text.


def test_a_part_of_a_token_has_no_weight(model):
  piece = max(
    (
      model._prompts.vocabulary.decode([number])
      for number in range(3, model._prompts.vocabulary.size)
    ),
    key=len,
  ).strip()
  assert len(piece) > 1
  with pytest.raises(UserError, match='whole words'):
    weights_of(model, f'({piece[:-1]}:2){piece[-1]}')


def test_weights_of_one_are_none_and_others_matter(model):
  plain = model.generate('red apple', 6, seed=1)
  same = model.generate('(red:1) apple', 6, seed=1, prompt_weights=True)
  np.testing.assert_array_equal(same.images, plain.images)
  # Without the flag, parentheses are part of the text.
  marked = model.generate('(red:1) apple', 6, seed=1)
  assert marked.metadata(0, 0).get('prompt_weights') is None
  heavy = model.generate('(red:6) apple', 6, seed=1, prompt_weights=True)
  assert np.any(heavy.tokens != plain.tokens)
  assert model.likelihood('(red:6) apple', plain.images[0], prompt_weights=True).shape == (1, 6)


CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=16,
  mlp_width=24,
  heads=2,
  text_vocabulary=20,
  text_length=5,
  codebook_size=11,
  grid=(2, 3),
  dtype='float32',
)


def test_weights_scale_the_features_around_those_of_the_empty_text():
  inputs = parti.example_inputs(CONFIG)
  params = random_parameters.of(parti.Parti(CONFIG), inputs)
  sampling = parameters.for_sampling(CONFIG, params)
  texts = jnp.asarray([[4, 7, 1, 0, 0], [3, 9, 8, 5, 1]], jnp.int32)
  weights = jnp.asarray([[1, 2, 1, 1, 1], [0, 0.5, 1, 3, 1]], jnp.float32)
  network = parti.Parti(CONFIG)
  encode = lambda tokens: network.bind({'params': params}).text_encoder(tokens)
  empty = encode(jnp.asarray([[1, 0, 0, 0, 0]]))[:, :1]
  features = empty + weights[..., None] * (encode(texts) - empty)
  tokens = jnp.asarray([[1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]])
  expected = network.apply({'params': params}, texts, tokens, text_features=features)
  plain = network.apply({'params': params}, texts, tokens)

  state = decoding.init_state(CONFIG, sampling, texts, 6)
  state = decoding.weigh_texts(CONFIG, sampling, state, weights)
  previous = jnp.pad(tokens[:, :-1], ((0, 0), (1, 0)))
  decoder = {'params': sampling['image_decoder']}
  found, _ = parti.token_decoder.TokenDecoder(CONFIG).apply(decoder, previous, state=state)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert np.abs(expected - plain).max() > 1e-3


def test_needs_cross_attention_and_a_cache_in_floating_point(tiny_folder):
  config = llamagen.LlamaGenConfig(decoder_layers=1, width=16, mlp_width=8, heads=2)
  with pytest.raises(UserError, match='cross-attention'):
    prompt_weights.check_supported(config)
  with pytest.raises(UserError, match="cache='float'"):
    parti_jax.load(tiny_folder, cache='int8').generate('(red:2) apple', prompt_weights=True)

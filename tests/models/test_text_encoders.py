"""Generators with text encoders from elsewhere: T5 and CLIP."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_config
from parti_jax.models import clip
from parti_jax.models import flops
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models import text_encoders
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters

T5 = t5_encoder.T5EncoderConfig(
  layers=2,
  width=12,
  mlp_width=20,
  heads=3,
  head_dim=4,
  text_vocabulary=19,
  text_length=6,
  relative_buckets=8,
  relative_distance=16,
  dropout=0.0,
)
CLIP = clip.CLIPTextConfig(
  layers=2, width=12, mlp_width=20, heads=3, text_vocabulary=19, text_length=6, end_id=18
)
# With CLIP, a text begins with its first token, 17, and ends at 18.
TEXTS = {
  't5': [[5, 7, 1, 0, 0, 0], [9, 3, 4, 8, 2, 1]],
  'clip': [[17, 7, 3, 18, 0, 0], [17, 3, 4, 0, 2, 18]],
}
KINDS = {'t5': T5, 'clip': CLIP}


def sizes(kind, **changes):
  return parti_config.PartiConfig(
    decoder_layers=2,
    width=16,
    mlp_width=32,
    heads=2,
    codebook_size=12,
    grid=(2, 3),
    dropout=0.0,
    dtype='float32',
    text_encoder=KINDS[kind],
    **changes,
  )


def parameters_of(config):
  found = random_parameters.of(parti.Parti(config), parti.example_inputs(config))
  leaves, tree = jax.tree.flatten(found)
  noise = np.random.default_rng(0)
  return tree.unflatten(
    [leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  )


def logits(config, params, texts, image):
  return jax.jit(parti.Parti(config).apply)({'params': params}, jnp.asarray(texts), image)


def image_tokens():
  return jnp.asarray(np.random.default_rng(1).integers(0, 12, (2, 6)), jnp.int32)


@pytest.mark.parametrize('kind', KINDS)
def test_the_text_encoder_decides_the_sizes_of_texts(kind):
  config = sizes(kind, text_vocabulary=5000, text_length=99, encoder_layers=7)
  assert (config.text_vocabulary, config.text_length) == (19, 6)
  assert (config.encoder_layers, config.text_width) == (2, 12)
  # One setting of precision and of memory for the whole generator.
  assert config.text_encoder.dtype == 'float32'
  assert dataclasses.replace(config, dtype='bfloat16').text_encoder.dtype == 'bfloat16'


@pytest.mark.parametrize('kind', KINDS)
def test_the_generator_reads_the_encoders_features(kind):
  config, image = sizes(kind), image_tokens()
  params = parameters_of(config)
  texts = jnp.asarray(TEXTS[kind], jnp.int32)
  first = logits(config, params, texts, image)
  features = jax.jit(text_encoders.module(config).apply)({'params': params['text_encoder']}, texts)
  assert features.shape == (2, 6, 12)
  kernel = params['image_decoder']['decoder']['layers']['cross_attention']['project_memory']
  assert kernel['kernel'].shape == (2, 12, 2, 2, 8)
  changed = params | {'text_encoder': jax.tree.map(lambda leaf: leaf + 0.3, params['text_encoder'])}
  assert np.abs(logits(config, changed, texts, image) - first).max() > 1e-3


@pytest.mark.parametrize('kind', KINDS)
def test_what_follows_the_end_of_a_text_changes_nothing(kind):
  config, image = sizes(kind), image_tokens()
  params = parameters_of(config)
  texts = np.array(TEXTS[kind], np.int32)
  other = texts.copy()
  end = 3 if kind == 't5' else 4
  mask = np.asarray(text_encoders.text_mask(config, jnp.asarray(texts)))[:, 0, 0]
  np.testing.assert_array_equal(mask[0], np.arange(6) < end)
  assert mask[1].all()
  if kind == 'clip':  # Its padding may be any id.
    other[0, end:] = 5
  inside = texts.copy()
  inside[0, 1] = 11
  first = logits(config, params, texts, image)
  np.testing.assert_allclose(logits(config, params, other, image), first, atol=1e-6)
  assert np.abs(logits(config, params, inside, image)[0] - first[0]).max() > 1e-4


@pytest.mark.parametrize(
  'kind, empty', [('t5', [1, 0, 0, 0, 0, 0]), ('clip', [17, 18, 0, 0, 0, 0])]
)
def test_guidance_contrasts_with_the_empty_text_of_the_kind(kind, empty):
  config = sizes(kind)
  both = decoding.with_and_without(config, jnp.asarray(TEXTS[kind], jnp.int32))
  np.testing.assert_array_equal(both, [TEXTS[kind][0], empty, TEXTS[kind][1], empty])


@pytest.mark.parametrize('kind', KINDS)
def test_sampling_follows_the_logits_of_the_whole_sequence(kind):
  config = sizes(kind)
  params = parameters_of(config)
  texts = jnp.asarray(TEXTS[kind], jnp.int32)
  drawn = decoding.sample_tokens(
    config,
    parameters.for_sampling(config, params),
    texts,
    decoding.image_keys(0, jnp.arange(2)),
    decoding.Sampling(greedy=True),
  )
  np.testing.assert_array_equal(drawn, np.argmax(logits(config, params, texts, drawn), axis=-1))


@pytest.mark.parametrize('kind', KINDS)
def test_a_config_survives_json(kind):
  config = sizes(kind)
  entry = json.loads(json.dumps(model_config.entry({'parti': parti_config.PartiConfig}, config)))
  assert entry['text_encoder']['kind'] == kind
  read = model_config.sizes(
    {'parti': parti_config.PartiConfig}, {'generator': entry}, 'generator', 'float32', 'config.json'
  )
  assert read == config
  wanted = {'stage': 'generator', 'config': parti_config.as_dict(config)}
  run_checkpoints.check_same_model('run', {'stage': 'generator', 'config': entry}, wanted)
  entry['text_encoder']['layers'] = 3
  with pytest.raises(UserError, match='text_encoder.layers is 3 there'):
    run_checkpoints.check_same_model('run', {'stage': 'generator', 'config': entry}, wanted)


@pytest.mark.parametrize(
  'change, message',
  [
    ({'kind': 'bert'}, "text_encoder.kind='bert' is not one of t5, clip"),
    ({'kind': None}, 'text_encoder.kind=None is not one of t5, clip'),
    ({'more': 1}, "text_encoder has other fields than T5EncoderConfig: 'more'"),
    ({'heads': 'two'}, "T5EncoderConfig.heads='two' must be"),
    ({'width': 2**40}, 'T5EncoderConfig.width=1099511627776 must be'),
  ],
)
def test_a_damaged_text_encoder_is_refused(change, message):
  entry = parti_config.as_dict(sizes('t5'))
  entry['text_encoder'] |= change
  with pytest.raises(UserError) as caught:
    model_config.sizes(
      {'parti': parti_config.PartiConfig}, {'generator': entry}, 'generator', 'float32', 'c.json'
    )
  assert message in str(caught.value) and 'c.json' in str(caught.value)


@pytest.mark.parametrize('value', ['t5', 3, {}, object()])
def test_something_else_is_no_text_encoder(value):
  with pytest.raises(UserError, match='PartiConfig.text_encoder'):
    parti_config.PartiConfig(text_encoder=value)


def test_older_files_have_the_own_text_encoder():
  plain = parti_config.PartiConfig(dtype='float32')
  entry = parti_config.as_dict(plain)
  del entry['text_encoder']
  read = model_config.sizes(
    {'parti': parti_config.PartiConfig}, {'generator': entry}, 'generator', 'float32', 'c.json'
  )
  assert read == plain


@pytest.mark.parametrize('kind', KINDS)
def test_forward_flops_agree_with_xla(kind):
  encoder = dataclasses.replace(
    KINDS[kind],
    width=96,
    mlp_width=160,
    heads=3,
    text_length=24,
    **({'head_dim': 32} if kind == 't5' else {}),
  )
  config = parti_config.PartiConfig(
    decoder_layers=2,
    width=128,
    mlp_width=256,
    heads=2,
    codebook_size=512,
    grid=(6, 8),
    dtype='float32',
    unroll=2,
    text_encoder=encoder,
  )
  module, inputs = parti.Parti(config), parti.example_inputs(config, 2)
  variables = {'params': random_parameters.shapes(module, inputs)}
  counted = jax.jit(module.apply).lower(variables, *inputs).compile().cost_analysis()['flops']
  assert 2 * parti.forward_flops(config) == pytest.approx(counted, rel=0.05)
  decoder = flops.token_decoder_forward(config)
  assert parti.forward_flops(config) - decoder == text_encoders.forward_flops(config)


@pytest.mark.parametrize(
  'config, ids, fits',
  [
    (None, [1, 0, 0, 0], True),
    (None, [2, 0, 0, 0], False),
    (None, [17, 18, 0, 0], False),
    (T5, [1, 0, 0, 0], True),
    (T5, [0, 0, 0, 0], False),
    (CLIP, [17, 18, 0, 0], True),
    (CLIP, [1, 0, 0, 0], False),
  ],
)
def test_texts_must_end_as_the_encoder_expects(config, ids, fits):
  if fits:
    return text_encoders.check_empty_text(config, ids, 'the tokenizer')
  with pytest.raises(UserError, match='the tokenizer encodes the empty text as'):
    text_encoders.check_empty_text(config, ids, 'the tokenizer')

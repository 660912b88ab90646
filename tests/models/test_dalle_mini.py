"""DALL·E mini's network; its outputs are compared with min-dalle's in tests/references."""

import dataclasses
import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import dalle_mini
from parti_jax.models import generators
from parti_jax.models import parti_config
from parti_jax.models.nn import layers

CONFIG = dalle_mini.DalleMiniConfig(
  encoder_layers=2,
  decoder_layers=3,
  width=16,
  mlp_width=22,
  heads=2,
  text_vocabulary=40,
  text_length=7,
  codebook_size=13,
  grid=(3, 5),
  dtype='float32',
)
TEXTS = np.array([[0, 5, 6, 7, 8, 9, 2], [0, 11, 2, 0, 0, 0, 0], [0, 2, 0, 0, 0, 0, 0]], np.int32)


@pytest.fixture(scope='module', name='params')
def fixture_params():
  module = dalle_mini.DalleMini(CONFIG)
  found = random_parameters.of(module, dalle_mini.example_inputs(CONFIG))
  # Biases and scales that matter.
  paths = flax.traverse_util.flatten_dict(found, sep='/')
  draw = np.random.default_rng(0)
  moved = {
    path: leaf + 0.3 * draw.normal(size=leaf.shape).astype(np.float32)
    for path, leaf in paths.items()
  }
  return flax.traverse_util.unflatten_dict(moved, sep='/')


def _apply(module, params, *inputs, **kwargs):
  return jax.jit(functools.partial(module.apply, **kwargs))({'params': params}, *inputs)


def _images(count):
  return np.random.default_rng(1).integers(13, size=(count, 15)).astype(np.int32)


def test_norms_have_the_scales_and_biases_of_normformer(params):
  paths = flax.traverse_util.flatten_dict(params, sep='/')
  leaves = {}
  for path in paths:
    module, leaf = path.rsplit('/', 1)
    if 'norm' in module:
      leaves.setdefault(module.split('/')[-1], set()).add(leaf)
  both = {'scale', 'bias'}
  assert leaves == {
    'embedding_norm': both,
    'attention_norm': {'bias'},
    'attention_out_norm': both,
    'cross_norm': {'bias'},
    'cross_out_norm': both,
    'mlp_norm': {'bias'},
    'norm': {'bias'},  # In the MLP, and after the last layer.
  }
  assert paths['image_decoder/decoder/layers/mlp/norm/bias'].shape == (3, 22)
  assert set(params) == {'text_encoder', 'image_decoder'}


def test_what_follows_the_end_of_a_text_does_not_matter(params):
  module, images = dalle_mini.DalleMini(CONFIG), _images(3)
  other = np.where(np.cumsum(TEXTS == 2, axis=1) - (TEXTS == 2) > 0, 33, TEXTS)
  assert (other != TEXTS).sum() == 9
  plain = _apply(module, params, TEXTS, images)
  np.testing.assert_allclose(plain, _apply(module, params, other, images), atol=1e-6)
  changed = TEXTS.copy()
  changed[:, 1] = [6, 12, 3]
  assert np.abs(plain - _apply(module, params, changed, images)).max() > 1e-3


def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(params):
  images = _images(3)
  whole = _apply(dalle_mini.DalleMini(CONFIG), params, TEXTS, images)
  state = _apply(dalle_mini.DalleMini(CONFIG), params, TEXTS, method='encode_text')
  decoder = jax.jit(dalle_mini.ImageDecoder(CONFIG).apply)
  previous = np.zeros((3, 1), np.int32)
  for position in range(15):
    logits, state = decoder({'params': params['image_decoder']}, previous, state=state)
    np.testing.assert_allclose(logits[:, 0], whole[:, position], atol=1e-4)
    previous = images[:, position : position + 1]


def test_later_tokens_and_the_value_before_the_first_do_not_matter(params):
  module, images = dalle_mini.DalleMini(CONFIG), _images(3)
  later = images.copy()
  later[:, 6:] = 0
  plain, other = (_apply(module, params, TEXTS, tokens) for tokens in (images, later))
  np.testing.assert_allclose(plain[:, :7], other[:, :7], atol=1e-6)
  assert np.abs(plain[:, 7:] - other[:, 7:]).max() > 1e-3


def test_the_outputs_of_all_layers_lead_to_the_logits(params):
  module, images = dalle_mini.DalleMini(CONFIG), _images(3)
  outputs = _apply(module, params, TEXTS, images, method='all_layer_outputs')
  assert outputs.shape == (3, 3, 15, 16)
  logits = _apply(module, params, outputs[-1], method='logits_from')
  np.testing.assert_allclose(logits, _apply(module, params, TEXTS, images), atol=1e-5)


def test_dropout_changes_the_logits_and_gradients_reach_all_parameters(params):
  module = dalle_mini.DalleMini(dataclasses.replace(CONFIG, dropout=0.2))
  images = _images(3)
  keys = layers.dropout_keys(jax.random.key(0), 3)
  dropped = _apply(module, params, TEXTS, images, keys)
  assert np.abs(dropped - _apply(module, params, TEXTS, images)).max() > 1e-3

  def loss(params):
    logits = module.apply({'params': params}, jnp.asarray(TEXTS), jnp.asarray(images))
    return jnp.mean(layers.cross_entropy(logits, jnp.asarray(images))[0])

  gradients = jax.jit(jax.grad(loss))(params)
  for path, gradient in flax.traverse_util.flatten_dict(gradients, sep='/').items():
    assert np.abs(gradient).max() > 0, path


def test_flops_agree_with_xla():
  # All layers laid out, since XLA counts the body of a loop once.
  config = dataclasses.replace(
    CONFIG, width=128, mlp_width=200, text_length=24, codebook_size=512, grid=(6, 8), unroll=3
  )
  module, inputs = dalle_mini.DalleMini(config), dalle_mini.example_inputs(config, 2)
  variables = {'params': random_parameters.shapes(module, inputs)}
  counted = jax.jit(module.apply).lower(variables, *inputs).compile().cost_analysis()['flops']
  ours = 2 * (generators.text_flops(config) + generators.decoder_flops(config))
  assert ours == pytest.approx(counted, rel=0.06)


def test_the_empty_text_is_checked():
  empty = dalle_mini.empty_text(CONFIG, jnp.asarray(TEXTS))
  np.testing.assert_array_equal(empty, np.repeat(TEXTS[2:], 3, axis=0))
  generators.check_empty_text(CONFIG, [0, 2, 0], 'a file')
  for ids in ([1, 0, 0], [0, 2, 1], [0, 3, 0], [49406, 49407, 0]):
    with pytest.raises(UserError, match=r'a file encodes the empty text as .*\[0, 2, 0\]'):
      generators.check_empty_text(CONFIG, ids, 'a file')


@pytest.mark.parametrize(
  'field, value, message',
  [
    ('heads', 3, 'DalleMiniConfig.heads=3 does not divide width=16'),
    ('dropout', 1.0, 'DalleMiniConfig.dropout'),
    ('text_length', 1, 'DalleMiniConfig.text_length'),
    ('grid', (4,), 'DalleMiniConfig.grid'),
    ('dtype', 'float8', 'DalleMiniConfig.dtype'),
    ('remat', 'some', 'DalleMiniConfig.remat'),
  ],
)
def test_wrong_sizes_are_named(field, value, message):
  with pytest.raises(UserError, match=message):
    dataclasses.replace(CONFIG, **{field: value})


def test_partis_networks_have_none_of_it():
  config = parti_config.PartiConfig()
  for options in (config.encoder_options, config.decoder_options):
    assert options.norm_after_attention is None
  for field, name in (('norm', 'layer_bias'), ('mlp', 'normed_geglu')):
    with pytest.raises(UserError, match=f'PartiConfig.{field}='):
      parti_config.PartiConfig(**{field: name})

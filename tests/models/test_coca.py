"""The contrastive captioner: what each half sees, its masks, its size, its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import coca
from parti_jax.models import flops
from parti_jax.models.nn import layers

SIZES = coca.CoCaConfig(
  image_size=8,
  patch_size=4,
  image_layers=1,
  unimodal_layers=1,
  multimodal_layers=2,
  width=16,
  mlp_width=24,
  heads=2,
  caption_queries=3,
  feature_dim=6,
  text_vocabulary=10,
  text_length=5,
  dtype='float32',
)
TEXTS = np.array([[3, 4, 5, 1, 0], [6, 1, 0, 0, 0]], np.int32)


@pytest.fixture(scope='module', name='network')
def fixture_network():
  """A function of pictures and texts, and its parameters."""
  module = coca.CoCa(SIZES)
  params = random_parameters.of(module, coca.example_inputs(SIZES))
  return jax.jit(lambda params, *inputs: module.apply({'params': params}, *inputs)), params


def _images(seed=0):
  return np.random.default_rng(seed).uniform(size=(2, 8, 8, 3)).astype(np.float32)


def test_features_are_unit_vectors_of_their_own_side(network):
  function, params = network
  out = function(params, _images(), TEXTS)
  for side in ('image_features', 'text_features'):
    np.testing.assert_allclose(np.linalg.norm(out[side], axis=1), 1, rtol=1e-5)
  other = function(params, _images(1), TEXTS)
  np.testing.assert_array_equal(other['text_features'], out['text_features'])
  assert np.abs(other['image_features'] - out['image_features']).max() > 1e-3
  assert np.abs(other['logits'] - out['logits']).max() > 1e-4  # The caption is of the picture.
  for method, inputs in (('image_features', _images()), ('text_features', TEXTS)):
    apply = jax.jit(functools.partial(coca.CoCa(SIZES).apply, method=method))
    alone = apply({'params': params}, jnp.asarray(inputs))
    np.testing.assert_allclose(alone, out[method], atol=1e-5)


@pytest.mark.parametrize('changed', range(4))
def test_a_token_is_predicted_from_those_before_it(network, changed):
  function, params = network
  out = function(params, _images(), TEXTS)
  texts = TEXTS.copy()
  texts[0, changed] = 7
  other = function(params, _images(), texts)
  before = slice(0, changed + 1)
  np.testing.assert_allclose(other['logits'][0, before], out['logits'][0, before], atol=1e-5)
  assert np.abs(other['logits'][0, changed + 1 :] - out['logits'][0, changed + 1 :]).max() > 1e-4
  # The class token has seen every token.
  assert np.abs(other['text_features'][0] - out['text_features'][0]).max() > 1e-4
  np.testing.assert_allclose(other['text_features'][1], out['text_features'][1], atol=1e-5)


def test_the_mask_by_its_definition():
  mask = np.asarray(coca.text_mask(jnp.asarray(TEXTS)))[:, 0]
  for text, seen in zip(TEXTS, mask):
    is_text = [True, *(text[:-1] > 0), True]  # The beginning, the tokens, the class token.
    for query in range(6):
      for key in range(6):
        assert seen[query, key] == (key == query or key < query and is_text[key])


def test_every_parameter_learns(network):
  function, params = network

  def loss(params):
    out = function(params, _images(), TEXTS)
    return jnp.sum(out['image_features'] * out['text_features'][::-1]) * out[
      'logit_scale'
    ] + jnp.sum(jax.nn.log_softmax(out['logits'])[..., 3])

  gradients = jax.jit(jax.grad(loss))(params)
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
    assert np.any(leaf), jax.tree_util.keystr(path)


def test_coca_base_has_the_papers_parameters():
  gin_config.parse(['gin_configs/models/coca_base.gin'], [])
  sizes = coca.CoCaConfig()
  params = random_parameters.shapes(coca.CoCa(sizes), coca.example_inputs(sizes))
  # CoCa, table 1: 86M in the image encoder, 297M in the text decoder, 383M in all.
  assert layers.count_parameters(params['image_encoder']) == pytest.approx(86e6, rel=0.01)
  decoder = lambda path: path.startswith(('unimodal', 'multimodal', 'logits'))
  assert layers.count_parameters(params, decoder) == pytest.approx(297e6, rel=0.01)
  assert layers.count_parameters(params) == pytest.approx(383e6, rel=0.02)


def test_flops_are_two_for_each_weight_and_what_attention_costs():
  out = flops.coca_forward(SIZES)
  params = jax.eval_shape(coca.CoCa(SIZES).init, jax.random.key(0), *coca.example_inputs(SIZES))[
    'params'
  ]
  count = lambda name: layers.count_parameters(
    params, lambda path: path.startswith(name) and path.endswith('kernel')
  )
  # Rows that go through the kernels of each part; the poolers' queries and keys differ in number.
  weights = (
    4 * count('image_encoder')
    + 6 * count('unimodal')
    + 5 * count('logits')
    + count('image_feature/')
    + count('text_feature/')
  )
  # Queries and outputs of the poolers: 1 and 3 rows; keys and values: 4 patches.
  weights += 16**2 * (2 * 1 + 2 * 4 + 2 * 3 + 2 * 4)
  weights += 2 * (5 * (6 * 16**2 + 2 * 16 * 24) + 3 * 2 * 16**2)
  pairs = 4 * 4 + 1 * 4 + 3 * 4 + 6 * 6 + 2 * 5 * (5 + 3)
  assert out == 2 * weights + 4 * 16 * pairs


@pytest.mark.parametrize(
  'sizes, key',
  [
    ({'patch_size': 5}, 'CoCaConfig.patch_size'),
    ({'heads': 5}, 'CoCaConfig.heads'),
    ({'dropout': 1.0}, 'CoCaConfig.dropout'),
    ({'caption_queries': 0}, 'CoCaConfig.caption_queries'),
  ],
)
def test_sizes_that_can_not_be(sizes, key):
  with pytest.raises(UserError, match=key):
    coca.CoCaConfig(**sizes)

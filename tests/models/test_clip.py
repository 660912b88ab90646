"""CLIP and SigLIP: what each output depends on, what they refuse, their FLOPs."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import clip
from parti_jax.models import flops
from parti_jax.models import siglip

CLIP = clip.CLIPConfig(
  image_size=14,
  patch_size=4,
  image_layers=2,
  image_width=16,
  image_mlp_width=24,
  image_heads=2,
  text_vocabulary=30,
  text_length=7,
  text_layers=2,
  text_width=12,
  text_mlp_width=20,
  text_heads=3,
  end_id=29,
  feature_dim=6,
  dtype='float32',
)
SIGLIP = siglip.SigLIPConfig(
  image_size=14,
  patch_size=4,
  image_layers=2,
  image_width=16,
  image_mlp_width=24,
  image_heads=2,
  text_vocabulary=30,
  text_length=7,
  text_layers=2,
  text_width=12,
  text_mlp_width=20,
  text_heads=3,
  dtype='float32',
)
# The second text contains id 0, which is a token, and the third ends at once.
TEXTS = np.array([[28, 3, 4, 5, 6, 7, 29], [28, 0, 9, 0, 29, 0, 0], [28, 29, 0, 0, 0, 0, 0]])


@functools.cache
def _network(kind):
  """A module and parameters of which none is 0, drawn without compiling an initialization."""
  config, lib = (CLIP, clip) if kind == 'CLIP' else (SIGLIP, siglip)
  module = getattr(lib, kind)(config)
  shapes = jax.eval_shape(module.init, jax.random.key(0), *lib.example_inputs(config))['params']
  draw = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(draw.normal(0.1, 0.3, leaf.shape), jnp.float32), nn.meta.unbox(shapes)
  )
  return module, params


@pytest.fixture(scope='module', params=['CLIP', 'SigLIP'], name='network')
def fixture_network(request):
  return _network(request.param)


def _apply(module, params, *inputs, method=None):
  return jax.jit(lambda *inputs: module.apply({'params': params}, *inputs, method=method))(*inputs)


def _images(count=2, seed=0):
  draw = np.random.default_rng(seed)
  return jnp.asarray(draw.uniform(size=(count, 14, 14, 3)), jnp.float32)


def _texts(texts=TEXTS):
  return jnp.asarray(texts, jnp.int32)


def test_logits_are_scaled_cosines(network):
  module, params = network
  out = _apply(module, params, _images(), _texts())
  assert out['logits'].shape == (2, 3)
  for side in ('image_features', 'text_features'):
    np.testing.assert_allclose(np.linalg.norm(out[side], axis=1), 1, rtol=1e-5)
  cosines = out['image_features'] @ out['text_features'].T
  bias = params.get('bias', 0)
  np.testing.assert_allclose(out['logits'], np.exp(params['log_scale']) * cosines + bias, rtol=1e-5)
  for side, inputs in (('image_features', _images()), ('text_features', _texts())):
    alone = _apply(module, params, inputs, method=side)
    np.testing.assert_allclose(alone, out[side], atol=1e-6)


def test_what_remains_beside_whole_patches_is_not_seen(network):
  module, params = network
  images = _images()
  features = _apply(module, params, images, method='image_features')
  beside = images.at[:, 12:].set(0).at[:, :, 12:].set(0)
  np.testing.assert_array_equal(_apply(module, params, beside, method='image_features'), features)
  within = images.at[:, 11, 11].set(0)
  assert np.abs(_apply(module, params, within, method='image_features') - features).max() > 1e-4


def test_padding():
  """CLIP's vector ends at the end of the text; SigLIP sees the padding."""
  texts, padded = (
    _texts(),
    _texts(np.where(np.cumsum(TEXTS == 29, 1) - (TEXTS == 29) > 0, 17, TEXTS)),
  )
  module, params = _network('CLIP')
  features = _apply(module, params, texts, method='text_features')
  again = _apply(module, params, padded, method='text_features')
  np.testing.assert_allclose(again, features, atol=1e-6)
  shorter = _apply(module, params, texts[1:, :5], method='text_features')
  np.testing.assert_allclose(shorter, features[1:], atol=1e-6)
  assert (
    np.abs(
      features[1] - _apply(module, params, texts.at[1, 1].set(3), method='text_features')[1]
    ).max()
    > 1e-4
  )
  module, params = _network('SigLIP')
  features = _apply(module, params, texts, method='text_features')
  again = _apply(module, params, padded, method='text_features')
  assert np.abs(again - features)[1:].max(axis=1).min() > 1e-4


def test_the_text_encoder_alone():
  module, params = _network('CLIP')
  encoder = clip.CLIPTextEncoder(CLIP.text)
  texts = _texts()
  encoded = _apply(encoder, params['text_encoder'], texts)
  assert encoded.shape == (3, 7, 12)
  ends = np.asarray(clip.end_positions(texts, 29))
  assert ends.tolist() == [6, 4, 1]
  feature = encoded[np.arange(3), ends] @ params['text_projection']['kernel']
  expected = _apply(module, params, texts, method='text_features')
  np.testing.assert_allclose(
    feature / np.linalg.norm(feature, axis=1, keepdims=True), expected, atol=1e-6
  )
  # A position sees those before it alone.
  other = _apply(encoder, params['text_encoder'], texts.at[:, 3].set(8))
  np.testing.assert_allclose(other[:, :3], encoded[:, :3], atol=1e-6)
  assert np.abs(other[:, 3:] - encoded[:, 3:]).max(axis=(1, 2)).min() > 1e-4


def test_hidden_tokens():
  """As those of Parti's text encoder: a vector stands for them."""
  _, params = _network('CLIP')
  params, encoder = params['text_encoder'], clip.CLIPTextEncoder(CLIP.text)
  texts = _texts()
  hidden = jnp.asarray(TEXTS == 4)
  row = params['token_embedding']['table'][9]
  masked = encoder.apply({'params': params}, texts, masked=(hidden, row))
  expected = encoder.apply({'params': params}, jnp.where(hidden, 9, texts))
  np.testing.assert_allclose(masked, expected, atol=1e-6)


def test_the_mask_ends_with_the_text():
  mask = clip.text_mask(_texts([*TEXTS, [28] * 7, [28, 29, 3, 29, 3, 3, 3]]), 29)
  assert mask.shape == (5, 1, 1, 7)
  expected = [7, 5, 2, 7, 2]  # The fourth text has no end.
  np.testing.assert_array_equal(mask[:, 0, 0].sum(axis=1), expected)
  assert all(row[:count].all() for row, count in zip(mask[:, 0, 0], expected))


def test_inputs_that_are_refused(network):
  module, params = network
  with pytest.raises(UserError, match='pictures of 14 × 12 pixels for a network of 14 × 14'):
    _apply(module, params, _images()[:, :, :12], method='image_features')
  with pytest.raises(UserError, match='texts of 8 tokens for a network of 7'):
    _apply(module, params, jnp.zeros((1, 8), jnp.int32), method='text_features')
  if isinstance(module, siglip.SigLIP):
    with pytest.raises(UserError, match='texts of 6 tokens for a network of 7'):
      _apply(module, params, jnp.zeros((1, 6), jnp.int32), method='text_features')


@pytest.mark.parametrize(
  'kind, changes, message',
  [
    (clip.CLIPConfig, {'image_heads': 7}, 'image_heads=7 does not divide image_width=768'),
    (clip.CLIPConfig, {'text_heads': 7}, 'text_heads=7 does not divide text_width=512'),
    (clip.CLIPConfig, {'patch_size': 225}, 'patch_size=225 is larger than image_size=224'),
    (clip.CLIPConfig, {'activation': 'relu'}, "activation='relu' is not one of quick_gelu, gelu"),
    (clip.CLIPConfig, {'image_size': 10**5, 'patch_size': 1}, 'gives 10,000,000,000 patches'),
    (clip.CLIPTextConfig, {'end_id': 49408}, 'end_id=49408 is not below text_vocabulary=49408'),
    (clip.CLIPConfig, {'text_vocabulary': 100}, 'end_id=49407 is not below'),
    (clip.CLIPTextConfig, {'heads': 7}, 'heads=7 does not divide width=512'),
    (siglip.SigLIPConfig, {'image_heads': 7}, 'image_heads=7 does not divide image_width=768'),
    (siglip.SigLIPConfig, {'patch_size': 257}, 'patch_size=257 is larger than image_size=256'),
  ],
)
def test_sizes_that_are_refused(kind, changes, message):
  with pytest.raises(UserError, match=f'^{kind.__name__}.*{message}'):
    kind(**changes)


def test_bfloat16_is_near_float32(network):
  module, params = network
  near = type(module)(dataclasses.replace(module.config, dtype='bfloat16'))
  inputs = _images(), _texts()
  exact, found = _apply(module, params, *inputs), _apply(near, params, *inputs)
  for side in ('image_features', 'text_features'):
    assert found[side].dtype == jnp.float32
    np.testing.assert_allclose(found[side], exact[side], atol=0.05)


def test_flops_agree_with_xla():
  # All layers laid out, since XLA counts the body of a loop once.
  large = {
    'image_size': 64,
    'patch_size': 8,
    'image_width': 128,
    'image_mlp_width': 256,
    'text_length': 64,
    'text_width': 128,
    'text_mlp_width': 512,
    'text_heads': 2,
    'unroll': 2,
  }
  for config, lib, forward in (
    (CLIP, clip, flops.clip_forward),
    (SIGLIP, siglip, flops.siglip_forward),
  ):
    config = dataclasses.replace(config, **large)
    module = clip.CLIP(config) if lib is clip else siglip.SigLIP(config)
    inputs = lib.example_inputs(config, 2)
    variables = {'params': random_parameters.shapes(module, inputs)}
    compiled = jax.jit(module.apply).lower(variables, *inputs).compile()
    assert 2 * forward(config) == pytest.approx(compiled.cost_analysis()['flops'], rel=0.05)

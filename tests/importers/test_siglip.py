"""The reader of SigLIP: big_vision's files, published sizes, and files that it refuses."""

import math

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from importers import published
from references import rankers

from parti_jax.core.errors import UserError
from parti_jax.exported_model import preprocessing
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import siglip as reader
from parti_jax.models import siglip

PUBLISHED = [
  'siglip2_base_patch16_256',
  'siglip2_large_patch16_512',
  'siglip2_so400m_patch14_384',
  'siglip2_giant_opt_patch16_384',
]


class _MLP(nn.Module):
  """big_vision's names and functions, by Flax's own layers."""

  hidden: int

  @nn.compact
  def __call__(self, x):
    hidden = nn.gelu(nn.Dense(self.hidden)(x))
    return nn.Dense(x.shape[-1])(hidden)


class _Block(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x, _):
    y = nn.LayerNorm()(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=self.heads)(y, y)
    return x + _MLP(self.hidden, name='MlpBlock_0')(nn.LayerNorm()(x)), None


class _Encoder(nn.Module):
  depth: int
  heads: int
  hidden: int
  scanned: bool

  @nn.compact
  def __call__(self, x):
    if self.scanned:
      scan = nn.scan(
        _Block, variable_axes={'params': 0}, split_rngs={'params': True}, length=self.depth
      )
      x, _ = scan(self.heads, self.hidden, name='encoderblock')(x, None)
    else:
      for layer in range(self.depth):
        x, _ = _Block(self.heads, self.hidden, name=f'encoderblock_{layer}')(x, None)
    return nn.LayerNorm(name='encoder_norm')(x)


class _Pooling(nn.Module):
  heads: int
  hidden: int

  @nn.compact
  def __call__(self, x):
    probe = self.param('probe', nn.initializers.normal(1.0), (1, 1, x.shape[-1]))
    probe = jnp.tile(probe, (x.shape[0], 1, 1))
    x = nn.MultiHeadDotProductAttention(num_heads=self.heads)(probe, x)
    return (x + _MLP(self.hidden, name='MlpBlock_0')(nn.LayerNorm()(x)))[:, 0]


class _Image(nn.Module):
  config: siglip.SigLIPConfig
  scanned: bool

  @nn.compact
  def __call__(self, images):
    c = self.config
    side = (c.patch_size, c.patch_size)
    x = nn.Conv(c.image_width, side, side, padding='VALID', name='embedding')(images)
    x = x.reshape(x.shape[0], -1, c.image_width)
    x = x + self.param('pos_embedding', nn.initializers.normal(1.0), (1, *x.shape[1:]))
    x = _Encoder(
      c.image_layers, c.image_heads, c.image_mlp_width, self.scanned, name='Transformer'
    )(x)
    return _Pooling(c.image_heads, c.image_mlp_width, name='MAPHead_0')(x)


class _Text(nn.Module):
  config: siglip.SigLIPConfig
  scanned: bool

  @nn.compact
  def __call__(self, tokens):
    c = self.config
    x = nn.Embed(c.text_vocabulary, c.text_width, name='Embed_0')(tokens)
    x = x + self.param('pos_embedding', nn.initializers.normal(1.0), (1, *x.shape[1:]))
    x = _Encoder(c.text_layers, c.text_heads, c.text_mlp_width, self.scanned, name='Encoder_0')(x)
    return nn.Dense(c.image_width, name='head')(x[:, -1])


class _TwoTowers(nn.Module):
  config: siglip.SigLIPConfig
  scanned: bool

  @nn.compact
  def __call__(self, images, tokens):
    """Pictures in [-1, 1]. Returns both vectors, and the logits of pictures and texts."""
    unit = lambda x: x / (jnp.linalg.norm(x, axis=1, keepdims=True) + 1e-8)
    image = unit(_Image(self.config, self.scanned, name='img')(images))
    text = unit(_Text(self.config, self.scanned, name='txt')(tokens))
    t = self.param('t', nn.initializers.constant(1.5), (1,))
    b = self.param('b', nn.initializers.constant(-2.5), (1,))
    return image, text, image @ text.T * jnp.exp(t) + b


SMALL = siglip.SigLIPConfig(
  image_size=18,
  patch_size=6,
  image_layers=3,
  image_width=16,
  image_mlp_width=20,
  image_heads=4,
  text_vocabulary=50,
  text_length=9,
  text_layers=2,
  text_width=12,
  text_mlp_width=28,
  text_heads=3,
)


def _names(module, config):
  inputs = siglip.example_inputs(config)
  variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  return flax.traverse_util.flatten_dict(variables, sep='/')


@pytest.mark.parametrize('scanned', [True, False])
@pytest.mark.parametrize('whole', [True, False])
def test_big_vision(tmp_path, scanned, whole):
  theirs = _TwoTowers(SMALL, scanned)
  draw = np.random.default_rng(1)
  arrays = {
    name: draw.normal(0.5 * name.endswith('scale'), 0.4, leaf.shape).astype(np.float32)
    for name, leaf in _names(theirs, SMALL).items()
  }
  stored = arrays if whole else {k.removeprefix('params/'): v for k, v in arrays.items()}
  extra = {'opt/0/count': np.zeros([], np.int32)} if whole else {}
  path = tmp_path / 'siglip2.npz'
  np.savez(path, **stored, **extra)
  opened = files.open_weights([str(path)]).arrays
  config = reader.config_of(opened)
  assert config == SMALL
  config = siglip.SigLIPConfig(**{**vars(SMALL), 'dtype': 'float32'})
  module = siglip.SigLIP(config)
  params = rankers.read(
    reader.key_map, module, siglip.example_inputs, config, [path], reader.IGNORED
  )
  images = rankers.pictures(3, 18)
  texts = rankers.texts(4, 9, end_id=1, largest=50)
  variables = flax.traverse_util.unflatten_dict(arrays, sep='/')
  image, text, logits = jax.jit(theirs.apply)(variables, images * 2 - 1, texts)
  ours = rankers.apply(module, params, images, texts)
  np.testing.assert_allclose(ours['image_features'], image, atol=1e-5)
  np.testing.assert_allclose(ours['text_features'], text, atol=1e-5)
  np.testing.assert_allclose(ours['logits'], logits, atol=1e-4)
  assert np.abs(np.diff(image, axis=0)).max() > 0.01 and np.abs(np.diff(text, axis=0)).max() > 0.01


def _count(shapes):
  return sum(math.prod(shape) for shape in shapes)


def _shapes(config):
  module = siglip.SigLIP(config)
  variables = jax.eval_shape(module.init, jax.random.key(0), *siglip.example_inputs(config))
  flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables['params']), sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
  settings, arrays = published.read(name)
  config = reader.config_of(arrays, settings)
  # All follows from the arrays of published files.
  assert config == reader.config_of(arrays)
  shapes = _shapes(config)
  key_map.check(reader.key_map(config, arrays), arrays, shapes, name, reader.IGNORED)
  assert _count(shapes.values()) == _count(array.shape for array in arrays.values())
  assert config.text_length == 64 and config.image_size == settings['vision_config']['image_size']
  # The same network in big_vision, whose So400m of 384 pixels says its size nowhere.
  theirs = {
    name: published.Listed(leaf.shape)
    for name, leaf in _names(_TwoTowers(config, True), config).items()
  }
  assert reader.config_of(theirs) == config
  key_map.check(reader.key_map(config, theirs), theirs, shapes, name, reader.IGNORED)


def test_other_networks_are_refused():
  settings, arrays = published.read('siglip2_base_patch16_256')
  patches = 'vision_model.embeddings.patch_embedding.weight'
  with pytest.raises(UserError, match='NaFlex'):
    reader.config_of(arrays | {patches: published.Listed((768, 768))}, settings)
  with pytest.raises(UserError, match="aren't the arrays of a SigLIP"):
    reader.config_of({'x': published.Listed((1,))})
  clip_settings, clip_arrays = published.read('clip_vit_base_patch32')
  with pytest.raises(UserError, match='positions of 50 patches, which is not a square number'):
    reader.config_of(clip_arrays, clip_settings)
  found = reader.key_map(reader.config_of(arrays), clip_arrays)
  with pytest.raises(UserError, match='missing: logit_bias.*not part of this network'):
    key_map.check(found, clip_arrays, _shapes(reader.config_of(arrays)), 'a file')


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'model_type': 'siglip2'}, 'siglip2'),
    ({'text_config': {'hidden_act': 'gelu'}}, "hidden_act='gelu' is not supported"),
    ({'text_config': {'layer_norm_eps': 1e-5}}, 'layer_norm_eps=1e-05 is not supported'),
    (
      {'vision_config': {'image_size': 256, 'num_attention_heads': 7}},
      'image_heads=7 does not divide',
    ),
    ({'vision_config': {'image_size': 512}}, 'gives 32² patches'),
    ({'text_config': {'num_hidden_layers': 11}}, 'num_hidden_layers=11 .* the arrays have 12'),
    ({'text_config': {'max_position_embeddings': 16}}, 'max_position_embeddings=16 .* have 64'),
    (
      {'vision_config': {'image_size': 256, 'hidden_size': 1024}},
      'hidden_size=1024 in its config, but the arrays have 768',
    ),
    ({'vision_config': []}, r'vision_config in its config is \[\]'),
  ],
)
def test_configs_that_are_refused(settings, message):
  _, arrays = published.read('siglip2_base_patch16_256')
  settings = {'vision_config': {'image_size': 256}} | settings
  with pytest.raises(UserError, match=message):
    reader.config_of(arrays, settings)


def test_preprocessing():
  _, arrays = published.read('siglip2_base_patch16_256')
  config = reader.config_of(arrays)
  stretch = lambda resampling: preprocessing.Preprocessing('stretch', resampling)
  assert reader.preprocessing_of(None, config) == stretch('bilinear')
  size = {'size': {'height': 256, 'width': 256}}
  half = {'image_mean': [0.5] * 3, 'image_std': [0.5] * 3}
  assert reader.preprocessing_of({**size, **half, 'resample': 2}, config) == stretch('bilinear')
  assert reader.preprocessing_of(size, config) == stretch('bicubic')
  for wrong in ({'size': {'height': 224, 'width': 224}}, {'image_mean': [0.4] * 3}):
    with pytest.raises(UserError):
      reader.preprocessing_of(wrong, config)
    with pytest.raises(UserError):
      reader.config_of(arrays, processor=wrong)

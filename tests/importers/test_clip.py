"""The reader of CLIP: published sizes, and files and configs that it refuses."""

import math

import flax.linen as nn
import flax.traverse_util
import jax
import pytest
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.exported_model import preprocessing
from parti_jax.importers import clip as reader
from parti_jax.importers import key_map
from parti_jax.models import clip

# Manifest -> activation.
PUBLISHED = {
  'clip_vit_base_patch32': 'quick_gelu',
  'clip_vit_base_patch16': 'quick_gelu',
  'clip_vit_large_patch14': 'quick_gelu',
  'clip_vit_large_patch14_336': 'quick_gelu',
  'pickscore_v1': 'gelu',
  'open_clip_vit_h_14': 'gelu',
  'open_clip_vit_bigg_14': 'gelu',
}


def _shapes(module, inputs):
  variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
  flat = flax.traverse_util.flatten_dict(nn.meta.unbox(variables['params']), sep='/')
  return {path: leaf.shape for path, leaf in flat.items()}


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
  settings, arrays = published.read(name)
  config = reader.config_of(arrays, settings)
  # Without a config, all but the activation follows from the arrays.
  assert config == reader.config_of(arrays, activation=PUBLISHED[name])
  shapes = _shapes(clip.CLIP(config), clip.example_inputs(config))
  key_map.check(reader.key_map(config, arrays), arrays, shapes, name, reader.IGNORED)
  assert _count(shapes.values()) == _count(array.shape for array in arrays.values())
  text = reader.text_config_of(arrays, settings)
  assert text == config.text
  shapes = _shapes(clip.CLIPTextEncoder(text), clip.example_text(text))
  found = reader.text_key_map(text, arrays)
  key_map.check(found, arrays, shapes, name, reader.IGNORED_BY_TEXT)


def test_an_activation_that_contradicts_the_config_is_refused():
  settings, arrays = published.read('clip_vit_base_patch32')
  assert reader.config_of(arrays, settings, activation='quick_gelu').activation == 'quick_gelu'
  with pytest.raises(
    UserError, match="the config says the activation 'quick_gelu', and not 'gelu'"
  ):
    reader.config_of(arrays, settings, activation='gelu')


def _count(shapes):
  return sum(math.prod(shape) for shape in shapes)


def _small(**changes):
  settings, arrays = published.read('clip_vit_base_patch32')
  arrays |= {name: published.Listed(shape) for name, shape in changes.items() if shape is not None}
  return settings, {
    name: array for name, array in arrays.items() if changes.get(name, 0) is not None
  }


@pytest.mark.parametrize(
  'name, shape, message',
  [
    ('visual_projection.weight', None, 'the array visual_projection.weight is missing'),
    ('visual_projection.weight', (512,), r'visual_projection.weight \[512\] should have 2 axes'),
    (
      'vision_model.embeddings.position_embedding.weight',
      (52, 768),
      'positions of 51 patches, which is not a square number',
    ),
    (
      'vision_model.embeddings.position_embedding.weight',
      (65, 768),
      r'image_size=224 gives 7² patches of 32 pixels, but the weights have positions of 8²',
    ),
    ('vision_model.embeddings.patch_embedding.weight', None, "aren't the arrays of a CLIP"),
    ('ema.vision_model.embeddings.patch_embedding.weight', (1,), 'more than once'),
    ('text_model.encoder.layers.0.mlp.fc1.weight', None, 'layers.0.mlp.fc1.weight is missing'),
  ],
)
def test_arrays_that_are_not_those_of_a_clip(name, shape, message):
  settings, arrays = _small(**{name: shape})
  with pytest.raises(UserError, match=message):
    reader.config_of(arrays, settings)


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'model_type': 'siglip'}, '\'siglip\'|"siglip"'),
    ({'text_config': {'hidden_act': 'relu'}}, 'hidden_act='),
    ({'text_config': {'hidden_act': 'gelu'}}, 'hidden_act='),
    ({'text_config': {'hidden_act': ['gelu']}}, 'hidden_act='),
    ({'text_config': {'layer_norm_eps': 1e-6}}, 'layer_norm_eps=1e-06 is not supported'),
    ({'text_config': {'num_attention_heads': 7}}, r'text_heads=7 does not divide text_width=512'),
    ({'text_config': {'num_attention_heads': '8'}}, 'num_attention_heads=.8. must be a whole'),
    ({'text_config': {'eos_token_id': [1, 2]}}, 'eos_token_id='),
    ({'vision_config': {'image_size': 10**9}}, 'image_size='),
    ({'text_config': {'num_hidden_layers': 11}}, 'num_hidden_layers=11 .* the arrays have 12'),
    ({'model_type': 'clip_text_model', 'hidden_size': 768}, 'hidden_size=768 .* have 512'),
    ({'vision_config': {'patch_size': 16}}, 'patch_size=16 .* the arrays have 32'),
    ({'vision_config': {'intermediate_size': 4096}}, 'intermediate_size=4096 .* have 3072'),
    ({'projection_dim': 768}, 'projection_dim=768 .* the arrays have 512'),
    ({'embed_dim': 640, 'vision_cfg': {}, 'text_cfg': {}}, 'embed_dim=640 .* have 512'),
    ({'model_cfg': {'vision_cfg': {'layers': 24}, 'text_cfg': {}}}, 'layers=24 .* have 12'),
    ({'vision_config': 3}, 'vision_config in its config is 3 instead of an object'),
    ({'vision_cfg': {'pool_type': 'avg'}, 'text_cfg': {}}, 'pool_type, which is not supported'),
    ({'vision_cfg': {}, 'text_cfg': {'no_causal_mask': True}}, 'no_causal_mask'),
    ({'vision_cfg': [], 'text_cfg': {}}, r'vision_cfg in its config is \[\]'),
  ],
)
def test_configs_that_are_refused(settings, message):
  _, arrays = _small()
  with pytest.raises(UserError, match=message) as raised:
    reader.config_of(arrays, settings)
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize(
  'processor, expected',
  [
    ({'size': 224, 'crop_size': 224, 'resample': 3, 'do_center_crop': True}, ()),
    (
      {
        'image_processor_type': 'CLIPImageProcessor',
        'size': {'shortest_edge': 224},
        'crop_size': {'height': 224, 'width': 224},
        'rescale_factor': 0.00392156862745098,
      },
      (),
    ),
    ({'image_processor': {'size': {'shortest_edge': 224}, 'resample': 2}}, ('crop', 'bilinear')),
    (
      {'size': {'height': 224, 'width': 224}, 'do_center_crop': False},
      ('stretch', 'bicubic'),
    ),
    ({'mean': [0.5] * 3, 'std': [0.5] * 3}, ('crop', 'bicubic', 'even')),
    (
      {'size': [224, 224], 'interpolation': 'bilinear', 'resize_mode': 'squash'},
      ('stretch', 'bilinear', 'even'),
    ),
  ],
)
def test_preprocessing_of_configs(processor, expected):
  settings, arrays = _small()
  config = reader.config_of(arrays, settings, processor)
  found = reader.preprocessing_of(arrays, config, settings, processor)
  assert found == preprocessing.Preprocessing(*expected)
  mean = (0.5,) * 3 if 'mean' in processor else clip.PIXEL_MEAN
  assert config.pixel_mean == mean


def test_preprocessing_without_a_config():
  settings, arrays = _small()
  config = reader.config_of(arrays, settings)
  assert reader.preprocessing_of(arrays, config) == preprocessing.Preprocessing()
  settings, arrays = published.read('open_clip_vit_h_14')
  config = reader.config_of(arrays, settings)
  assert reader.preprocessing_of(arrays, config).crop_rounding == 'even'


@pytest.mark.parametrize(
  'processor, message',
  [
    ({'size': 336}, 'size=336 in its preprocessing, but the network takes pictures of 224 × 224'),
    ({'size': {'shortest_edge': '224'}}, 'size='),
    ({'crop_size': {'height': 224, 'width': 256}}, 'crop_size='),
    ({'do_normalize': False}, 'do_normalize=false'),
    ({'rescale_factor': 1.0}, 'rescale_factor=1.0 is not 1 / 255'),
    ({'resample': 1}, 'resample=1'),
    ({'resample': [3]}, 'resample='),
    ({'size': {'height': 224, 'width': 224}}, 'do_center_crop=True is not supported'),
    ({'image_mean': [0.5, 0.5]}, 'image_mean='),
    ({'image_std': [0, 1, 1]}, 'pixel_std='),
    ({'resize_mode': []}, 'resize_mode='),
    ({'resize_mode': 'longest'}, 'resize_mode=.longest.'),
    ({'mean': [0.5] * 3, 'fill_color': 9}, 'fill_color=9'),
    ({'image_processor': 4}, 'is not an object'),
  ],
)
def test_preprocessing_that_is_refused(processor, message):
  settings, arrays = _small()
  with pytest.raises(UserError, match=message) as raised:
    reader.config_of(arrays, settings, processor)
  assert '\n' not in str(raised.value)

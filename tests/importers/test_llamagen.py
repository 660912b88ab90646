"""The reader of LlamaGen's generators: published sizes, places in files, and refused files.

Outputs are compared with the formulas in tests/models/test_llamagen.py.
"""

import dataclasses

import numpy as np
import pytest
import tiny_llamagen
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import key_map
from parti_jax.importers import llamagen as reader
from parti_jax.models import llamagen
from parti_jax.models import t5_encoder
from parti_jax.models.nn import layers

# Flan-T5 XL, of which the text-conditional model takes the features.
T5 = t5_encoder.T5EncoderConfig(width=2048, mlp_width=5120, heads=32, text_length=120)
TINY_T5 = dataclasses.replace(T5, width=tiny_llamagen.FEATURES, text_length=6)
# Layers, width, hidden width, heads, grid and millions of parameters, without the text encoder.
PUBLISHED = {
  'c2i_b': (12, 768, 2048, 12, (16, 16), 111),
  'c2i_l': (24, 1024, 2816, 16, (24, 24), 343),
  'c2i_xl': (36, 1280, 3584, 20, (24, 24), 775),
  'c2i_xxl': (48, 1536, 4096, 24, (24, 24), 1411),
  'c2i_3b': (24, 3200, 8704, 32, (24, 24), 3097),
  't2i_xl': (36, 1280, 3584, 20, (32, 32), 778),
}


def _check(config, arrays):
  shapes = parameter_files.shapes(model_folder.abstract('generator', config))
  if config.text_encoder is not None:
    shapes = {path: shape for path, shape in shapes.items() if path.startswith('image_decoder/')}
  ignored = reader.ignored(arrays)
  key_map.check(reader.key_map(config, arrays), arrays, shapes, 'the file', ignored)


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_sizes(name):
  _, arrays = published.read(f'llamagen_{name}')
  depth, width, mlp_width, heads, grid, millions = PUBLISHED[name]
  encoder = T5 if name == 't2i_xl' else None
  config = reader.config_of(arrays, grid, encoder)
  assert (config.decoder_layers, config.width, config.mlp_width) == (depth, width, mlp_width)
  assert (config.heads, config.codebook_size, config.text_length) == (
    heads,
    16384,
    120 if encoder else 1,
  )
  assert mlp_width == llamagen.mlp_width(width)
  _check(config, arrays)
  abstract = model_folder.abstract('generator', config)
  count = layers.count_parameters(
    abstract, lambda path: not encoder or path.startswith('image_decoder/')
  )
  assert round(count / 1e6) == millions


def _stored(texts=False, prefix=''):
  return {
    prefix + name: published.Listed(array.shape)
    for name, array in tiny_llamagen.state(texts).items()
  }


def _config(arrays, encoder=None):
  return reader.config_of(arrays, tiny_llamagen.GRID, encoder, tiny_llamagen.HEADS)


@pytest.mark.parametrize('prefix', ['', 'model.', 'module.'])
def test_the_network_is_found_wherever_training_put_it(prefix):
  arrays = _stored(prefix=prefix)
  _check(_config(arrays), arrays)
  if prefix:  # Without one, nothing else may be there.
    arrays['optimizer.state.0.exp_avg'] = published.Listed((3,))
  buffers = {
    f'{prefix}layers.0.attention.kv_cache.k_cache': (1, 2, 16, 8),
    f'{prefix}causal_mask': (1, 16, 16),
    f'{prefix}freqs_cis': (10, 4, 2),
  }
  arrays |= {name: published.Listed(shape) for name, shape in buffers.items()}
  _check(_config(arrays), arrays)
  arrays[f'{prefix}layers.0.attention.bias'] = published.Listed((3,))
  with pytest.raises(UserError, match=f'not part of this network: {prefix}layers.0.attention.bias'):
    _check(_config(arrays), arrays)


def test_queries_keys_and_values_are_split_by_heads():
  weights = tiny_llamagen.state()
  wqkv = weights['layers.1.attention.wqkv.weight']
  config = _config(_stored())
  source = reader.key_map(config, _stored())[
    'image_decoder/decoder/layers/attention/project_in/kernel'
  ]
  kernel = source.change(wqkv)
  assert kernel.shape == (16, 3, 2, 8)
  for part in range(3):
    for head in range(2):
      rows = wqkv[16 * part + 8 * head : 16 * part + 8 * head + 8]
      np.testing.assert_array_equal(kernel[:, part, head], rows.T)


@pytest.mark.parametrize(
  'name, shapes',
  [('wqkv', [(16, 48), (768,), (48, 16, 1), ()]), ('wo', [(32, 8), (256,), (16, 16, 1), ()])],
)
def test_values_in_other_axes_are_refused(name, shapes):
  name = f'layers.1.attention.{name}.weight'
  for shape in shapes:
    arrays = _stored() | {name: published.Listed(shape)}
    with pytest.raises(UserError, match=f'of another shape: {name}'):
      _check(_config(arrays), arrays)


@pytest.mark.parametrize(
  'texts, encoder, message',
  [
    (True, None, '--text_encoder is required'),
    (True, dataclasses.replace(TINY_T5, width=13), 'has 13 features of a text token, but .* 12'),
    (True, dataclasses.replace(TINY_T5, text_length=7), 'import it again with --text_length=6'),
    (False, TINY_T5, 'takes classes, not texts'),
  ],
)
def test_a_text_encoder_that_does_not_fit_is_refused(texts, encoder, message):
  with pytest.raises(UserError, match=message):
    _config(_stored(texts), encoder)


def test_other_files_are_refused():
  with pytest.raises(UserError, match='not a generator of LlamaGen'):
    _config({'encoder.conv_in.weight': published.Listed((3, 3))})
  arrays = _stored()
  del arrays['layers.0.feed_forward.w1.weight']
  with pytest.raises(UserError, match='no matrix layers.0.feed_forward.w1.weight'):
    _config(arrays)
  with pytest.raises(UserError, match='no model of the width 16, so the number of attention heads'):
    reader.config_of(_stored(), tiny_llamagen.GRID, None)
  arrays = _stored(True)
  del arrays['cls_embedding.cap_proj.fc2.weight']
  with pytest.raises(UserError, match='missing: cls_embedding.cap_proj.fc2.weight'):
    _check(_config(arrays, TINY_T5), arrays)

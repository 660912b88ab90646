"""The reader of DALL·E mini: published sizes, what becomes of rows and columns, and refused files.

Outputs are compared with min-dalle's in tests/references/test_dalle_mini.py.
"""

import numpy as np
import pytest
import tiny_dalle_mini
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import dalle_mini as reader
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.models import dalle_mini
from parti_jax.models.nn import layers

PUBLISHED = {
  'dalle_mini': (dalle_mini.DalleMiniConfig(dtype='float32'), 437_832_688),
  'dalle_mega': (
    dalle_mini.DalleMiniConfig(
      encoder_layers=24,
      decoder_layers=24,
      width=2048,
      mlp_width=4096,
      heads=32,
      text_vocabulary=50272,
      dtype='float32',
    ),
    2_587_392_000,
  ),
}
CODES, GRID, SETTINGS = tiny_dalle_mini.CODES, tiny_dalle_mini.GRID, tiny_dalle_mini.SETTINGS


def _check(config, arrays, start):
  expected = parameter_files.shapes(model_folder.abstract('generator', config))
  key_map.check(reader.key_map(config, arrays, start), arrays, expected, 'the file')


@pytest.mark.parametrize('name', PUBLISHED)
@pytest.mark.parametrize('has_settings', [True, False])
def test_published_sizes(name, has_settings):
  settings, arrays = published.read(name)
  given = settings if has_settings else None
  config = reader.config_of(arrays, given, 16384, (16, 16))
  expected, count = PUBLISHED[name]
  assert config == expected
  assert reader.first_input(arrays, given, config) == 16384
  _check(config, arrays, 16384)
  assert layers.count_parameters(model_folder.abstract('generator', config)) == count


@pytest.fixture(scope='module', name='arrays')
def fixture_arrays(tmp_path_factory):
  folder = tiny_dalle_mini.write(tmp_path_factory.mktemp('weights'))
  return files.open_weights([str(folder)]).arrays


@pytest.mark.parametrize('prefix', ['', 'params/'])
def test_rows_and_columns_beyond_the_codes_are_left_out(arrays, prefix):
  stored = {prefix + name: array for name, array in arrays.items()}
  config = reader.config_of(stored, SETTINGS, CODES, GRID)
  start = reader.first_input(stored, SETTINGS | {'decoder_start_token_id': CODES + 2}, config)
  _check(config, stored, start)
  ours = key_map.convert(reader.key_map(config, stored, start), stored)
  theirs = tiny_dalle_mini.arrays()
  rows = theirs['model/decoder/embed_tokens/embedding']
  read = lambda path: np.asarray(ours[path])
  np.testing.assert_array_equal(read('image_decoder/begin'), rows[CODES + 2])
  np.testing.assert_array_equal(read('image_decoder/token_embedding/table'), rows[:CODES])
  logits = theirs['lm_head/kernel'][:, :CODES]
  np.testing.assert_array_equal(read('image_decoder/logits/kernel'), logits)


def test_the_bias_of_a_norm_without_scale_has_no_scale(arrays):
  config = reader.config_of(arrays, SETTINGS, CODES, GRID)
  name = 'model/encoder/layers/FlaxBartEncoderLayers/LayerNorm_0/scale'
  more = dict(arrays) | {name: published.Listed((2, 16))}
  with pytest.raises(UserError, match=f'not part of this network: {name}'):
    _check(config, more, CODES)
  less = dict(arrays)
  del less['model/decoder/final_ln/bias']
  with pytest.raises(UserError, match='missing: model/decoder/final_ln/bias'):
    _check(config, less, CODES)
  other = dict(arrays) | {'lm_head/kernel': published.Listed((17, 16))}
  with pytest.raises(UserError, match=r'of another shape: lm_head/kernel \[17, 16\]'):
    _check(config, other, CODES)


def test_values_in_other_axes_are_refused(arrays):
  config = reader.config_of(arrays, SETTINGS, CODES, GRID)
  decoder = 'model/decoder/layers/FlaxBartDecoderLayers/FlaxBartAttention_0'
  for projection in ('q', 'k', 'out'):
    name = f'{decoder}/{projection}_proj/kernel'
    for shape in ((16, 2, 16), (512,), (2, 16, 16, 1), (32, 16), ()):
      other = dict(arrays) | {name: published.Listed(shape)}
      with pytest.raises(UserError, match=f'of another shape: {name}'):
        _check(config, other, CODES)
  for shape in ((), (256,)):
    other = dict(arrays) | {'lm_head/kernel': published.Listed(shape)}
    with pytest.raises(UserError, match='of another shape: lm_head/kernel'):
      _check(config, other, CODES)


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'use_bias': True}, 'use_bias is true, but only false is supported'),
    ({'ln_positions': 'swinv2'}, "ln_positions is 'swinv2'"),
    ({'force_ln_scale': True}, 'force_ln_scale is true'),
    ({'model_type': 'bart'}, "model_type is 'bart', but only 'dallebart'"),
    ({'d_model': 32}, 'd_model is 32, but the arrays have 16'),
    ({'image_vocab_size': CODES}, f'image_vocab_size is {CODES}, but the arrays have {CODES + 3}'),
    ({'image_length': 256}, 'image_length is 256, but the arrays have 16'),
    ({'decoder_attention_heads': 4}, 'one number of heads; they are 2 and 4'),
    ({'encoder_attention_heads': None}, 'one number of heads; they are null and 2'),
    (
      {'decoder_attention_heads': 3, 'encoder_attention_heads': 3},
      'heads=3 does not divide width=16',
    ),
  ],
)
def test_other_settings_are_named(arrays, changes, named):
  with pytest.raises(UserError, match=named):
    reader.config_of(arrays, SETTINGS | changes, CODES, GRID)


@pytest.mark.parametrize('row', [-1, CODES + 4, 'begin', None, True])
def test_a_first_input_that_is_no_row_is_refused(arrays, row):
  config = reader.config_of(arrays, SETTINGS, CODES, GRID)
  with pytest.raises(UserError, match=r'config\.json: decoder_start_token_id'):
    reader.first_input(arrays, SETTINGS | {'decoder_start_token_id': row}, config)


@pytest.mark.parametrize('codes, grid', [(CODES + 4, GRID), (CODES, (2, 4))])
def test_another_image_tokenizer_is_refused(arrays, codes, grid):
  with pytest.raises(UserError, match='give the image tokenizer that belongs to them'):
    reader.config_of(arrays, SETTINGS, codes, grid)


def test_an_image_tokenizer_with_fewer_codes_is_refused():
  settings, arrays = published.read('dalle_mega')
  with pytest.raises(UserError, match='has 1,024 codes .* rows for 16,415 codes and the first'):
    reader.config_of(arrays, settings, 1024, (16, 16))


def test_other_files_are_refused(arrays):
  with pytest.raises(UserError, match='the weights are not of dalle-mini: 0 of their 1 arrays'):
    reader.config_of({'x': published.Listed((1,))}, None, CODES, GRID)
  less = {name: array for name, array in arrays.items() if 'Dense_0' not in name}
  with pytest.raises(UserError, match='they lack the array .*GLU_0/Dense_0/kernel'):
    reader.config_of(less, None, CODES, GRID)
  flat = dict(arrays) | {'model/encoder/embed_tokens/embedding': published.Listed((300,))}
  with pytest.raises(UserError, match=r'of the shape \[300\], and must have 2 axes'):
    reader.config_of(flat, None, CODES, GRID)


def test_values_that_are_not_finite_are_refused(tmp_path):
  bad = tiny_dalle_mini.arrays()['model/decoder/final_ln/bias']
  bad[3] = np.nan
  folder = tiny_dalle_mini.write(tmp_path, model__decoder__final_ln__bias=bad)
  stored = files.open_weights([str(folder)]).arrays
  config = reader.config_of(stored, SETTINGS, CODES, GRID)
  tree = key_map.convert(reader.key_map(config, stored, CODES), stored)
  with pytest.raises(UserError, match='final_ln/bias has values that are not finite'):
    [np.asarray(array) for array in tree.values()]

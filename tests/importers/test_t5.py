"""Tests of parti_jax.importers.t5: published sizes, and the same encoder in each format."""

import dataclasses
import functools
import json
import pathlib

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import t5x_checkpoints

from parti_jax.core.errors import UserError
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import t5
from parti_jax.models import t5_encoder

_MANIFESTS = pathlib.Path(__file__).parent / 'manifests'
_PUBLISHED = {
  kind: json.loads((_MANIFESTS / f't5_{kind}.json').read_text()) for kind in ('hugging_face', 't5x')
}


@dataclasses.dataclass
class _Stored:
  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(np.float32)

  def read(self):
    raise AssertionError('nothing is to be read')


@functools.cache
def _shapes(config):
  inputs = t5_encoder.example_inputs(dataclasses.replace(config, text_length=4))
  boxed = jax.eval_shape(t5_encoder.T5Encoder(config).init, jax.random.key(0), *inputs)
  params = flax.traverse_util.flatten_dict(nn.meta.unbox(boxed['params']), sep='/')
  return {name: array.shape for name, array in params.items()}


def _check(arrays, config):
  found = t5.key_map(config, arrays)
  key_map.check(found, arrays, _shapes(config), 'the file', t5.IGNORED)
  return found


def _manifest(kind, model):
  published = _PUBLISHED[kind][model]
  return {
    name.format(layer): _Stored(tuple(shape))
    for name, shape in published['arrays'].items()
    for layer in (range(published['layers']) if '{}' in name else [0])
  }


@pytest.mark.parametrize('kind', list(_PUBLISHED))
@pytest.mark.parametrize('model', list(_PUBLISHED['t5x']))
def test_published_models(kind, model):
  arrays = _manifest(kind, model)
  config = t5.config_of(arrays)
  _check(arrays, config)
  assert config.layers == _PUBLISHED[kind][model]['layers']
  assert config.head_dim == {'t5-3b': 128, 't5-11b': 128, 'ul2': 256}.get(model, 64)
  assert config.activation == (
    'gated_silu'
    if model == 'ul2'
    else 'gated_gelu'
    if '-v1_1-' in model or 'mt5' in model
    else 'relu'
  )


CONFIG = t5_encoder.T5EncoderConfig(
  layers=2, width=10, mlp_width=14, heads=3, head_dim=4, text_vocabulary=21, relative_buckets=8
)


def _params(config):
  draw = np.random.default_rng(0)
  return {name: draw.normal(size=shape).astype('f') for name, shape in _shapes(config).items()}


def _in_t5x(config, params):
  """Our parameters as t5x has them."""
  layer = {
    'pre_attention_layer_norm/scale': lambda own: own['attention_norm/scale'],
    'pre_mlp_layer_norm/scale': lambda own: own['mlp_norm/scale'],
    'attention/out/kernel': lambda own: own['attention/project_out/kernel'].reshape(12, 10),
    'mlp/wo/kernel': lambda own: own['mlp/project_out/kernel'],
  }
  for name in ('query', 'key', 'value'):
    layer[f'attention/{name}/kernel'] = lambda own, name=name: np.concatenate(
      [own[f'attention/project_{name}/kernel'][:, head] for head in range(3)], axis=1
    )
  if config.gated:
    layer['mlp/wi_0/kernel'] = lambda own: own['mlp/project_gate/kernel']
    layer['mlp/wi_1/kernel'] = lambda own: own['mlp/project_in/kernel']
  else:
    layer['mlp/wi/kernel'] = lambda own: own['mlp/project_in/kernel']
  arrays = {
    'target/token_embedder/embedding': params['token_embedding/table'],
    'target/encoder/relpos_bias/rel_embedding': params['encoder/relative_bias/table'].T,
    'target/encoder/encoder_norm/scale': params['encoder/norm/scale'],
    'target/decoder/decoder_norm/scale': np.ones(10, np.float32),
    'target/decoder/logits_dense/kernel': np.ones((10, 21), np.float32),
    'state/param_states/decoder/decoder_norm/scale/v': np.ones(10, np.float32),
    'state/step': np.array(3, np.int32),
  }
  prefix = 'encoder/layers/'
  for index in range(config.layers):
    own = {
      name.removeprefix(prefix): array[index]
      for name, array in params.items()
      if name.startswith(prefix)
    }
    for name, get in layer.items():
      arrays[f'target/encoder/layers_{index}/{name}'] = get(own)
  return arrays


_HUGGING_FACE = {
  'pre_attention_layer_norm.scale': 'layer.0.layer_norm.weight',
  'pre_mlp_layer_norm.scale': 'layer.1.layer_norm.weight',
  'attention.query.kernel': 'layer.0.SelfAttention.q.weight',
  'attention.key.kernel': 'layer.0.SelfAttention.k.weight',
  'attention.value.kernel': 'layer.0.SelfAttention.v.weight',
  'attention.out.kernel': 'layer.0.SelfAttention.o.weight',
  'mlp.wi.kernel': 'layer.1.DenseReluDense.wi.weight',
  'mlp.wi_0.kernel': 'layer.1.DenseReluDense.wi_0.weight',
  'mlp.wi_1.kernel': 'layer.1.DenseReluDense.wi_1.weight',
  'mlp.wo.kernel': 'layer.1.DenseReluDense.wo.weight',
}


def _in_hugging_face(config, params, whole=True):
  """Our parameters as Hugging Face has them: of a whole model, or of its encoder."""
  arrays = {}
  for name, array in _in_t5x(config, params).items():
    if name.startswith('target/encoder/layers_'):
      _, _, layer, *rest = name.split('/')
      name = f'encoder.block.{layer.removeprefix("layers_")}.{_HUGGING_FACE[".".join(rest)]}'
      arrays[name] = np.ascontiguousarray(array.T)
  arrays['encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight'] = params[
    'encoder/relative_bias/table'
  ]
  arrays['encoder.final_layer_norm.weight'] = params['encoder/norm/scale']
  arrays['encoder.embed_tokens.weight'] = params['token_embedding/table']
  if whole:
    arrays['shared.weight'] = params['token_embedding/table']
    for name in (
      'decoder.embed_tokens.weight',
      'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',
      'lm_head.weight',
    ):
      arrays[name] = np.ones((21, 10), np.float32)
  return arrays


def _write_safetensors(folder, config, params, whole=True):
  folder.mkdir()
  arrays = _in_hugging_face(config, params, whole)
  safetensors.numpy.save_file(arrays, folder / 'model.safetensors')


def _write_shards(folder, config, params):
  folder.mkdir()
  arrays = _in_hugging_face(config, params)
  places = {name: f'model-{place % 2 + 1}.safetensors' for place, name in enumerate(arrays)}
  for file in set(places.values()):
    own = {name: array for name, array in arrays.items() if places[name] == file}
    safetensors.numpy.save_file(own, folder / file)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'weight_map': places}))


def _write_t5x(folder, config, params):
  t5x_checkpoints.write(folder, _in_t5x(config, params))


def _write_orbax(folder, config, params):
  tree = flax.traverse_util.unflatten_dict(_in_t5x(config, params), sep='/')
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
    checkpointer.save(folder, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))


@pytest.mark.parametrize('activation', ['relu', 'gated_gelu'])
@pytest.mark.parametrize(
  'write',
  [
    _write_safetensors,
    functools.partial(_write_safetensors, whole=False),
    _write_shards,
    _write_t5x,
    _write_orbax,
  ],
)
def test_each_format_gives_the_same_parameters(tmp_path, write, activation):
  config = dataclasses.replace(CONFIG, activation=activation)
  params = _params(config)
  write(tmp_path / 'model', config, params)
  arrays = files.open_weights([str(tmp_path / 'model')]).arrays
  assert t5.config_of(arrays) == config
  found = jax.tree.map(np.asarray, key_map.convert(_check(arrays, config), arrays))
  assert set(found) == set(params)
  for name, array in params.items():
    np.testing.assert_array_equal(found[name], array, err_msg=name)


def _hugging_face_shapes(config=CONFIG):
  return {
    name: _Stored(array.shape) for name, array in _in_hugging_face(config, _params(config)).items()
  }


_SETTINGS = {
  'model_type': 't5',
  'd_model': 10,
  'd_ff': 14,
  'd_kv': 4,
  'num_heads': 3,
  'num_layers': 2,
  'vocab_size': 21,
  'feed_forward_proj': 'gated-gelu',
  'dense_act_fn': 'gelu_new',
  'relative_attention_num_buckets': 8,
  'layer_norm_epsilon': 1e-6,
}


def test_settings_say_what_shapes_do_not():
  arrays = _hugging_face_shapes()
  assert t5.config_of(arrays, _SETTINGS) == CONFIG
  changed = {
    'feed_forward_proj': 'gated-silu',
    'dense_act_fn': 'silu',
    'relative_attention_max_distance': 77,
    'dropout_rate': 0.25,
  }
  assert t5.config_of(arrays, _SETTINGS | changed) == dataclasses.replace(
    CONFIG, activation='gated_silu', relative_distance=77, dropout=0.25
  )
  # What transformers takes for granted where a config.json is silent.
  assert t5.config_of(arrays, {'model_type': 'mt5'}) == CONFIG
  ungated = dataclasses.replace(CONFIG, activation='relu')
  assert t5.config_of(_hugging_face_shapes(ungated), {}) == ungated


@pytest.mark.parametrize(
  'settings, message',
  [
    ({'d_model': 512}, 'd_model is 512, but the arrays have 10'),
    ({'num_heads': '3'}, "num_heads is '3', but the arrays have 3"),
    ({'model_type': 'umt5'}, "model_type 'umt5' is not read"),
    ({'layer_norm_epsilon': 1e-5}, 'layer_norm_epsilon 1e-05 is not read'),
    ({'feed_forward_proj': 'gated-tanh'}, "feed_forward_proj 'gated-tanh' with .* is not read"),
    ({'feed_forward_proj': ['relu']}, r"feed_forward_proj \['relu'\] with .* is not read"),
    ({'dense_act_fn': 'gelu'}, "'gated-gelu' with dense_act_fn 'gelu' is not read"),
    ({'feed_forward_proj': 'relu', 'dense_act_fn': 'relu'}, 'relu, but the arrays are those of a'),
    ({'dropout_rate': 'x'}, 'T5EncoderConfig.dropout='),
    ({'relative_attention_max_distance': 1}, 'T5EncoderConfig.relative_distance=1'),
  ],
)
def test_settings_of_other_models_are_refused(settings, message):
  with pytest.raises(UserError, match=message):
    t5.config_of(_hugging_face_shapes(), _SETTINGS | settings)


_POSITIONS = 'encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight'
_QUERY = 'encoder.block.0.layer.0.SelfAttention.q.weight'


@pytest.mark.parametrize(
  'changes, message',
  [
    ({_POSITIONS.format(1): (8, 3)}, 'relative positions of its own, as in umT5'),
    ({_POSITIONS.format(0): None}, 'lack the array .*relative_attention_bias'),
    ({_POSITIONS.format(0): (8,)}, r'of the shape \[8\], and must be a matrix'),
    ({_POSITIONS.format(0): (8, 5)}, '5 heads do not divide the 12 features'),
    ({_POSITIONS.format(0): (8, 0)}, '0 heads do not divide the 12 features'),
    ({'shared.weight': None, 'encoder.embed_tokens.weight': None}, 'no T5 encoder is in these'),
    ({_QUERY: None}, f'lack the array {_QUERY}'),
  ],
)
def test_other_networks_are_refused(changes, message):
  arrays = _hugging_face_shapes()
  for name, shape in changes.items():
    if shape is None:
      del arrays[name]
    else:
      arrays[name] = _Stored(shape)
  with pytest.raises(UserError, match=message):
    t5.config_of(arrays)


@pytest.mark.parametrize(
  'name, shape, message',
  [
    ('encoder.block.0.layer.1.DenseReluDense.wi_1.weight', None, 'missing: .*wi_1'),
    ('encoder.block.1.layer.0.SelfAttention.k.weight', (12, 9), 'of another shape: .*k.weight'),
    ('encoder.block.0.layer.0.SelfAttention.q.bias', (12,), 'not part of this network: .*q.bias'),
    ('encoder.block.7.layer.0.SelfAttention.q.weight', (12, 10), 'missing: .*block.2'),
  ],
)
def test_what_does_not_fit_is_named(name, shape, message):
  arrays = _hugging_face_shapes()
  arrays.pop(name, None)
  if shape is not None:
    arrays[name] = _Stored(shape)
  config = t5.config_of(arrays)
  with pytest.raises(UserError, match=message):
    _check(arrays, config)

"""Tests of parti_jax.models.t5_encoder against the same network in NumPy, and on meshes."""

import dataclasses
import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.models import t5_encoder
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

BATCH = 8


def _config(**sizes):
  defaults = {
    'layers': 4,
    'width': 16,
    'mlp_width': 20,
    'heads': 4,
    'head_dim': 6,
    'text_vocabulary': 40,
    'text_length': 13,
    'relative_buckets': 8,
    'relative_distance': 9,
    'dtype': 'float32',
  }
  return t5_encoder.T5EncoderConfig(**defaults | sizes)


def _texts(lengths, length=13):
  texts = np.random.default_rng(0).integers(3, 40, (len(lengths), length)).astype(np.int32)
  for text, kept in zip(texts, lengths):
    text[kept:] = 0
  return jnp.asarray(texts)


@functools.cache
def _params(config):
  """Random parameters as T5's initialization makes them, but with scales that are not all 1."""
  module = t5_encoder.T5Encoder(config)
  boxed = jax.jit(module.init)(jax.random.key(0), *t5_encoder.example_inputs(config))['params']
  draw = np.random.default_rng(1)
  return jax.tree.map(lambda x: x * draw.uniform(0.5, 1.5, x.shape), nn.meta.unbox(boxed))


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, params, texts, keys=None, masked=None):
  return t5_encoder.T5Encoder(config).apply({'params': params}, texts, keys, masked)


def _bucket(apart, buckets, distance):
  """Bucket of a position of a key less that of the query, by the paper's rule in exact numbers."""
  half = buckets // 2
  exact = half // 2
  size = abs(apart)
  if size >= exact:
    share = math.log(size / exact) / math.log(distance / exact)
    size = min(exact + math.floor(share * (half - exact) + 1e-9), half - 1)
  return size + (half if apart > 0 else 0)


@pytest.mark.parametrize('buckets, distance', [(32, 128), (8, 9), (16, 100), (4, 2)])
def test_relative_buckets(buckets, distance):
  found = t5_encoder.relative_buckets(300, buckets, distance)
  expected = [
    [_bucket(key - query, buckets, distance) for key in range(300)] for query in range(300)
  ]
  np.testing.assert_array_equal(found, expected)


def _in_numpy(config, params, texts):
  """The network in float64, one text and one head after another."""
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale

  activate = {
    'relu': lambda x: np.maximum(x, 0),
    'gated_gelu': lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    'gated_silu': lambda x: x / (1 + np.exp(-x)),
  }[config.activation]
  length = texts.shape[1]
  buckets = [
    [_bucket(k - q, config.relative_buckets, config.relative_distance) for k in range(length)]
    for q in range(length)
  ]
  bias = params['encoder']['relative_bias']['table'][np.array(buckets)]
  outputs = []
  for text in np.asarray(texts):
    x = params['token_embedding']['table'][text]
    for index in range(config.layers):
      own = jax.tree.map(lambda leaf, index=index: leaf[index], params['encoder']['layers'])
      attention, mlp = own['attention'], own['mlp']
      normed = norm(x, own['attention_norm']['scale'])
      for head in range(config.heads):
        query, key, value = (
          normed @ attention[f'project_{name}']['kernel'][:, head]
          for name in ('query', 'key', 'value')
        )
        scores = (query @ key.T + bias[..., head])[:, text > 0]
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        weights /= weights.sum(axis=-1, keepdims=True)
        x = x + weights @ value[text > 0] @ attention['project_out']['kernel'][head]
      normed = norm(x, own['mlp_norm']['scale'])
      hidden = normed @ mlp['project_in']['kernel']
      if config.activation == 'relu':
        hidden = activate(hidden)
      else:
        hidden = activate(normed @ mlp['project_gate']['kernel']) * hidden
      x = x + hidden @ mlp['project_out']['kernel']
    outputs.append(norm(x, params['encoder']['norm']['scale']))
  return np.stack(outputs)


@pytest.mark.parametrize('activation', list(t5_encoder.ACTIVATIONS))
def test_the_network_is_that_of_the_paper(activation):
  config = _config(activation=activation)
  texts = _texts([13, 1, 6])
  found = _encode(config, _params(config), texts)
  assert found.dtype == jnp.float32
  np.testing.assert_allclose(found, _in_numpy(config, _params(config), texts), atol=2e-5)


def test_padding_changes_nothing():
  config = _config()
  texts = _texts([6, 6])
  short = _encode(config, _params(config), texts[:, :6])
  np.testing.assert_allclose(_encode(config, _params(config), texts)[:, :6], short, atol=2e-5)


def test_bfloat16():
  config = _config()
  texts = _texts([13, 5])
  exact = _encode(config, _params(config), texts)
  rounded = _encode(dataclasses.replace(config, dtype='bfloat16'), _params(config), texts)
  assert rounded.dtype == jnp.bfloat16
  difference = np.abs(np.float32(rounded) - exact)
  assert 0 < difference.mean() < 0.02


def test_hidden_pieces_have_the_vector_that_stands_for_them():
  config = _config()
  texts = _texts([13, 5])
  hidden = jnp.zeros(texts.shape, bool).at[0, 3].set(True).at[1, 0].set(True)
  # The same as another piece would give whose row of the table is that vector.
  params = _params(config)
  vector = params['token_embedding']['table'][7]
  found = _encode(config, params, texts, masked=(hidden, vector))
  expected = _encode(config, params, jnp.where(hidden, 7, texts))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_dropout():
  config = _config(dropout=0.3)
  params = _params(config)
  texts = jnp.concatenate([_texts([13, 6])] * 2)
  keys = layers.dropout_keys(jax.random.key(1), 4)
  dropped = _encode(config, params, texts, keys)
  off = _encode(config, params, texts)
  np.testing.assert_array_equal(dropped, _encode(config, params, texts, keys))
  # At the output a value is either 0 or divided by the share that stays.
  assert np.mean(dropped == 0) == pytest.approx(0.3, abs=0.06)
  # Equal texts of other rows have other masks, which follow the row and not the place.
  assert np.abs(dropped[:2] - dropped[2:]).max() > 0.1
  later = layers.DropoutKeys(keys.key, keys.rows[2:])
  np.testing.assert_allclose(_encode(config, params, texts[:2], later), dropped[2:], atol=1e-5)
  np.testing.assert_array_equal(off, _encode(_config(dropout=0.0), params, texts, keys))


def test_every_dropout_has_a_key_of_its_own(monkeypatch):
  config = _config(dropout=0.5, layers=2)
  params, texts = _params(config), _texts([13, 6])
  found = []
  drop = layers.Dropout.__call__

  def noted(self, x, keys):
    if keys is not None:
      key = jax.random.key_data(keys.key)
      jax.debug.callback(lambda key: found.append(tuple(key.tolist())), key)
    return drop(self, x, keys)

  monkeypatch.setattr(layers.Dropout, '__call__', noted)
  apply = jax.jit(t5_encoder.T5Encoder(config).apply)
  jax.block_until_ready(apply({'params': params}, texts, layers.dropout_keys(jax.random.key(1), 2)))
  jax.effects_barrier()
  # Four in each layer; those of the embedding and of the output.
  assert len(found) == len(set(found)) == 4 * 2 + 2


def test_values_and_gradients_agree_on_a_mesh_with_stages():
  config = _config(dropout=0.3, remat='block_inputs')
  module, params, texts = t5_encoder.T5Encoder(config), _params(config), _texts(range(1, 9))

  @jax.jit
  def step(params, texts):
    keys = layers.dropout_keys(jax.random.key(1), BATCH)
    return jax.value_and_grad(
      lambda params: jnp.sin(module.apply({'params': params}, texts, keys)).sum()
    )(params)

  expected = jax.device_get(step(params, texts))
  mesh, rules = mesh_lib.make_mesh(1, 2, 2, 2), rules_lib.logical_axis_rules()
  boxed = jax.eval_shape(module.init, jax.random.key(0), texts)['params']
  shardings = rules_lib.parameter_shardings(boxed, mesh, rules)
  query = shardings['encoder']['layers']['attention']['project_query']['kernel']
  assert tuple(query.spec) == ('stage', 'fsdp', 'tensor', None)
  with rules_lib.partitioned(mesh, rules):
    found = jax.device_get(
      step(
        jax.device_put(params, shardings),
        jax.device_put(texts, rules_lib.batch_sharding(mesh, rules)),
      )
    )
  np.testing.assert_allclose(found[0], expected[0], rtol=1e-5)
  for one, other in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1])):
    np.testing.assert_allclose(one, other, atol=2e-5 * np.abs(other).max())


@pytest.mark.parametrize(
  'sizes, message',
  [
    ({'activation': 'gelu'}, "activation='gelu' is not one of relu, gated_gelu, gated_silu"),
    ({'dtype': 'float16'}, "dtype='float16' is not one of float32, bfloat16"),
    ({'relative_buckets': 6}, 'relative_buckets=6 must be a multiple of 4'),
    ({'relative_buckets': 32, 'relative_distance': 8}, 'must be more than a quarter'),
    ({'dropout': 1.0}, r'dropout=1.0 must lie in \[0, 1\)'),
    ({'layers': 0}, 'layers=0'),
    ({'text_length': 1}, 'text_length=1 must be a whole number from 2 to 4096$'),
    ({'text_length': 4097}, 'text_length=4097 must be a whole number from 2 to 4096$'),
  ],
)
def test_wrong_sizes_are_named(sizes, message):
  with pytest.raises(UserError, match=rf'^T5EncoderConfig\..*{message}'):
    _config(**sizes)


def test_a_text_length_out_of_bounds_is_one_line_of_a_command(tmp_path, capsys):
  status = main.main(
    [
      'train',
      '--gin_file=gin_configs/runs/tiny_generator.gin',
      f'--model_dir={tmp_path / "run"}',
      '--gin.PartiConfig.text_encoder=@T5EncoderConfig()',
      '--gin.T5EncoderConfig.text_length=4097',
    ]
  )
  error = capsys.readouterr().err
  assert status == 2 and error.count('\n') == 1 and not (tmp_path / 'run').exists()
  assert 'T5EncoderConfig.text_length=4097 must be a whole number from 2 to 4096' in error

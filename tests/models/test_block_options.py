"""Parti with other norms, MLPs, positions and heads, against a computation in NumPy."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import flops
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models.nn import layers
from parti_jax.models.nn import rotary
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules

# Two layers of different patterns, on a grid whose rows and columns differ.
PLAIN = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=32,
  mlp_width=24,
  heads=4,
  text_vocabulary=20,
  text_length=5,
  codebook_size=12,
  grid=(2, 3),
  dtype='float32',
  conv_kernel=3,
  attention_patterns=('conv', 'global'),
)
EACH = {
  'norm': {'norm': 'rms'},
  'mlp': {'mlp': 'swiglu'},
  'qk_norm': {'qk_norm': True},
  'positions': {'positions': 'rotary_2d'},
  'kv_heads': {'kv_heads': 2},
}
ALL = functools.reduce(lambda a, b: a | b, EACH.values())
TEXTS = np.array([[5, 7, 1, 0, 0], [9, 3, 4, 8, 1]], np.int32)
IMAGES = np.random.default_rng(1).integers(0, 12, (2, 6)).astype(np.int32)


@functools.cache
def params_of(config):
  """Parameters in which the scales of norms differ from 1."""
  params = random_parameters.of(parti.Parti(config), parti.example_inputs(config))
  noise = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: leaf + 0.2 * noise.normal(size=leaf.shape).astype(np.float32),
    params,
  )


class Reference:
  """The network of a config in float64, written without regard to speed."""

  def __init__(self, config):
    self.config = config
    self.params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params_of(config))

  def logits(self, texts, images):
    config, decoder = self.config, self.params['image_decoder']
    encoder = self.params['text_encoder']
    text = encoder['token_embedding']['table'][texts] + encoder['position_embedding']['table']
    seen = np.stack([np.arange(texts.shape[1]) <= np.flatnonzero(row).max() for row in texts])
    seen = seen[:, None]
    for layer in range(config.encoder_layers):
      block = self.layer(encoder['encoder'], layer)
      normed = self.norm(block['attention_norm'], text)
      text = text + self.attend(block['attention'], normed, normed, seen)
      text = text + self.mlp(block['mlp'], self.norm(block['mlp_norm'], text))
    text = self.norm(encoder['encoder']['norm'], text)
    x = decoder['token_embedding']['table'][images[:, :-1]]
    x = np.concatenate([np.broadcast_to(decoder['begin'], (len(x), 1, config.width)), x], axis=1)
    rows, columns = np.divmod(np.arange(config.image_length), config.grid[1])
    if config.positions == 'learned':
      x = x + decoder['row_embedding']['table'][rows]
      x = x + decoder['column_embedding']['table'][columns]
    for layer in range(config.decoder_layers):
      block, mask = self.layer(decoder['decoder'], layer), config.layer_pattern(layer).mask[None]
      normed = self.norm(block['attention_norm'], x)
      places = (rows, columns) if config.positions == 'rotary_2d' else None
      x = x + self.attend(block['attention'], normed, normed, mask, places)
      normed = self.norm(block['cross_norm'], x)
      x = x + self.attend(block['cross_attention'], normed, text, seen)
      x = x + self.mlp(block['mlp'], self.norm(block['mlp_norm'], x))
    return self.norm(decoder['decoder']['norm'], x) @ decoder['logits']['kernel']

  def layer(self, stack, number):
    return jax.tree.map(lambda leaf: leaf[number], stack['layers'])

  def norm(self, params, x):
    if self.config.norm == 'rms':
      return self.rms(params, x)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6) * params['scale']

  def rms(self, params, x):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * params['scale']

  def mlp(self, params, x):
    product = lambda name, x: x @ params[name]['kernel']
    hidden = product('project_in', x)
    if self.config.mlp == 'swiglu':
      gate = product('project_gate', x)
      return product('project_out', hidden * gate / (1 + np.exp(-gate)))
    # The approximation by tanh, as in the network.
    cubic = np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)
    return product('project_out', hidden * (1 + np.tanh(cubic)) / 2)

  def attend(self, params, x, other, mask, places=None):
    kernels = {name: part['kernel'] for name, part in params.items() if 'project' in name}
    if 'project_in' in kernels:
      query, key, value = np.einsum('ble,ethd->tbhld', x, kernels['project_in'])
    else:
      query = np.einsum('ble,ehd->bhld', x, kernels['project_query'])
      memory = kernels.get('project_keys_values', kernels.get('project_memory'))
      key, value = np.einsum('ble,ethd->tbhld', other, memory)
    if self.config.qk_norm:
      query, key = self.rms(params['query_norm'], query), self.rms(params['key_norm'], key)
    if places is not None:
      query, key = turned(query, *places), turned(key, *places)
    if key.shape[1] < query.shape[1]:  # Heads 0 and 1 of queries use head 0 of keys.
      key, value = [part[:, [0, 0, 1, 1]] for part in (key, value)]
    scores = np.einsum('bhqd,bhkd->bhqk', query, key) / np.sqrt(query.shape[-1])
    weights = np.exp(scores) * mask[:, None]
    weights = weights / weights.sum(axis=-1, keepdims=True)
    return np.einsum('bhqk,bhkd,hde->bqe', weights, value, kernels['project_out'])


def turned(x, rows, columns):
  """Vectors [..., length, head_dim] as complex numbers, multiplied by those of their angles."""
  pairs = x[..., 0::2] + 1j * x[..., 1::2]
  count = pairs.shape[-1] // 2
  speeds = 1 / 10000 ** (np.arange(count) / count)
  angles = np.concatenate([rows[:, None] * speeds, columns[:, None] * speeds], axis=-1)
  pairs = pairs * np.exp(1j * angles)
  return np.stack([pairs.real, pairs.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize('changes', [{}, *EACH.values(), ALL], ids=['none', *EACH, 'all'])
def test_logits_are_those_of_a_computation_in_numpy(changes):
  config = dataclasses.replace(PLAIN, **changes)
  model = parti.Parti(config)
  found = jax.jit(model.apply)({'params': params_of(config)}, TEXTS, IMAGES)
  expected = Reference(config).logits(TEXTS, IMAGES)
  np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


def _shapes(config):
  shapes = jax.eval_shape(
    parti.Parti(config).init, jax.random.key(0), *parti.example_inputs(config)
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.meta.unbox(shapes)['params'])
  }


def test_which_parameters_an_option_adds_and_removes():
  before, after = _shapes(PLAIN), _shapes(dataclasses.replace(PLAIN, **ALL))
  decoder = 'image_decoder/decoder/layers/'
  encoder = 'text_encoder/encoder/layers/'
  added = {f'{stack}mlp/project_gate/kernel' for stack in (encoder, decoder)} | {
    f'{site}/{part}_norm/scale'
    for site in (f'{encoder}attention', f'{decoder}attention', f'{decoder}cross_attention')
    for part in ('query', 'key')
  }
  added |= {f'{decoder}attention/project_{part}/kernel' for part in ('query', 'keys_values')}
  assert after.keys() - before.keys() == added
  assert before.keys() - after.keys() == {
    f'{decoder}attention/project_in/kernel',
    'image_decoder/row_embedding/table',
    'image_decoder/column_embedding/table',
  }
  assert after[f'{decoder}attention/key_norm/scale'] == (2, 8)
  assert after[f'{decoder}attention/project_keys_values/kernel'] == (2, 32, 2, 2, 8)
  changed = {name for name in before.keys() & after.keys() if before[name] != after[name]}
  assert changed == {f'{decoder}cross_attention/project_memory/kernel'}
  assert after[f'{decoder}cross_attention/project_memory/kernel'] == (2, 32, 2, 2, 8)


def test_scores_of_rotated_vectors_depend_on_the_distances_of_rows_and_of_columns():
  draw = np.random.default_rng(0)
  one, other = (jnp.asarray(draw.normal(size=(1, 1, 2, 16)), jnp.float32) for _ in range(2))
  grid = (6, 5)

  def score(query, key):
    at = lambda x, place: rotary.rotate(x, place[0] * grid[1] + place[1], grid)
    return np.sum(at(one, query) * at(other, key), axis=-1)

  np.testing.assert_allclose(score((5, 4), (2, 3)), score((3, 1), (0, 0)), atol=1e-5)
  assert np.abs(score((5, 4), (2, 3)) - score((5, 4), (3, 2))).min() > 1e-2
  # The first position is not rotated, and positions beyond the last count as the last.
  np.testing.assert_array_equal(rotary.rotate(one, 0, grid), one)
  np.testing.assert_array_equal(rotary.rotate(one, 99, grid), rotary.rotate(one, 29, grid))


def test_positions_of_each_row():
  x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 2, 8)), jnp.float32)
  found = rotary.rotate(x, jnp.array([1, 4]), (3, 4))
  for row, first in enumerate((1, 4)):
    expected = rotary.rotate(x[row : row + 1], first, (3, 4))
    np.testing.assert_allclose(found[row], expected[0], atol=1e-6)


def test_flops_and_weights_of_options():
  gated = dataclasses.replace(PLAIN, **ALL)
  kernel = PLAIN.width * PLAIN.mlp_width
  counts = [sum(np.prod(shape) for shape in _shapes(config).values()) for config in (PLAIN, gated)]
  norms, embeddings = (2 + 4 * 2) * 8, 5 * PLAIN.width
  # Half of the kernels of keys and values, in self-attention and in cross-attention of two layers.
  shared = 2 * PLAIN.width**2 // 2
  assert counts[1] - counts[0] == 3 * kernel + norms - embeddings - 2 * 2 * shared
  of_text = 2 * PLAIN.text_length * (kernel - 2 * shared)
  of_image = 2 * PLAIN.image_length * 2 * (kernel - shared)
  assert parti.forward_flops(gated) - parti.forward_flops(PLAIN) == of_text + of_image
  of_step = flops.parti_sampling_step(gated) - flops.parti_sampling_step(PLAIN)
  assert of_step == 2 * 2 * (kernel - shared)


def test_norms_of_bfloat16_are_computed_in_float32():
  x = jnp.asarray([[1000.0, 1000.0, -1000.0, 1001.0]], jnp.bfloat16)
  found, _ = layers.RMSNorm(jnp.bfloat16).init_with_output(jax.random.key(0), x)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(found, np.float32), [[1, 1, -1, 1]], atol=2e-3)


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'norm': 'batch'}, "PartiConfig.norm='batch' is not one of layer, rms"),
    ({'mlp': 'relu'}, "PartiConfig.mlp='relu' is not one of gelu, swiglu"),
    ({'positions': 'rotary'}, "PartiConfig.positions='rotary' is not one of learned, rotary_2d"),
    ({'qk_norm': 1}, 'PartiConfig.qk_norm=1 must be'),
    ({'kv_heads': 3}, 'PartiConfig.kv_heads=3 does not divide heads=4'),
    ({'kv_heads': 8}, 'PartiConfig.kv_heads=8 does not divide heads=4'),
    ({'kv_heads': 0}, 'PartiConfig.kv_heads=0 must be'),
    ({'positions': 'rotary_2d', 'heads': 16}, 'must be a multiple of 4; it is 2'),
  ],
)
def test_an_option_that_does_not_exist_or_fit_is_named(changes, message):
  with pytest.raises(UserError) as caught:
    dataclasses.replace(PLAIN, **changes)
  assert message in str(caught.value)


def test_as_many_heads_of_keys_as_of_queries_are_no_option():
  assert dataclasses.replace(PLAIN, kv_heads=4) == PLAIN


def test_heads_of_keys_that_a_mesh_does_not_divide_are_named():
  config = dataclasses.replace(PLAIN, kv_heads=2)
  boxed = jax.eval_shape(parti.Parti(config).init, jax.random.key(0), *parti.example_inputs(config))
  mesh = mesh_lib.make_mesh(data=2, tensor=4)
  with pytest.raises(UserError, match=r'attention/project_.*tensor.*size 4.*dimension 2'):
    rules.parameter_shardings(boxed, mesh, rules.logical_axis_rules())


def test_files_without_the_options_are_of_plain_blocks():
  names = set(ALL)
  older = {key: value for key, value in parti_config.as_dict(PLAIN).items() if key not in names}
  assert parti_config.PartiConfig(**parti_config.upgrade_config(older)) == PLAIN
  changed = dataclasses.replace(PLAIN, **ALL)
  again = parti_config.upgrade_config(parti_config.as_dict(changed))
  assert parti_config.PartiConfig(**again) == changed

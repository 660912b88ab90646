"""Sampling with int8 weights."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import parti_jax
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import token_decoder
from parti_jax.models.nn import quantization
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.sampling import decoding
from parti_jax.sampling import images
from parti_jax.sampling import parameters

# All dimensions differ, so that a scale of other axes would be seen.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=48,
  mlp_width=64,
  heads=4,
  text_vocabulary=20,
  text_length=5,
  codebook_size=32,
  grid=(3, 4),
  dtype='float32',
)
TEXTS = jnp.asarray(np.random.default_rng(0).integers(2, 20, (8, 5)), jnp.int32)
LAYER_SCALES = {
  'attention/project_in': (3, 4, 12),
  'attention/project_out': (48,),
  'cross_attention/project_memory': (2, 4, 12),
  'cross_attention/project_out': (48,),
  'cross_attention/project_query': (4, 12),
  'mlp/project_in': (64,),
  'mlp/project_out': (48,),
}


@pytest.fixture(scope='module')
def params():
  init = functools.partial(parti.Parti(CONFIG).init, jax.random.key(0))
  params = nn.meta.unbox(jax.jit(init)(*parti.example_inputs(CONFIG)))['params']
  return jax.tree.map(lambda leaf: leaf * 2.0, params)


def in_int8(params):
  """The parameters for sampling with int8 weights."""
  kept = parameters.for_sampling(CONFIG, params, 'int8')
  return jax.tree_util.tree_map_with_path(parameters.quantized, kept)


@pytest.fixture(scope='module')
def both(params):
  """The parameters for sampling, in float32 and with int8 weights."""
  return parameters.for_sampling(CONFIG, params), in_int8(params)


def is_kernel(leaf):
  return isinstance(leaf, quantization.QuantizedKernel)


@jax.jit
def logits(params, tokens):
  """Logits of every position, computed one position after the other."""
  state = parti.Parti(CONFIG).apply({'params': params}, TEXTS, method='encode_text')
  model = token_decoder.TokenDecoder(CONFIG)

  def body(state, previous):
    found, state = model.apply({'params': params['image_decoder']}, previous[:, None], state=state)
    return state, found[:, 0]

  return jax.lax.scan(body, state, token_decoder.shifted(tokens).T)[1].swapaxes(0, 1)


@jax.jit
def greedy(params):
  keys = decoding.image_keys(0, jnp.arange(len(TEXTS)))
  return decoding.sample_tokens(CONFIG, params, TEXTS, keys, decoding.Sampling(greedy=True))


def names_of(path):
  return jax.tree_util.keystr(path, simple=True, separator='/')


def test_all_kernels_of_the_decoder_are_quantized_and_nothing_else(both):
  float_leaves, int8_leaves = (
    {
      names_of(path): leaf
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_kernel)
    }
    for tree in both
  )
  assert set(float_leaves) == set(int8_leaves)
  scales = {name: leaf.scale.shape for name, leaf in int8_leaves.items() if is_kernel(leaf)}
  expected = {'image_decoder/logits/kernel': (32,)}
  for layer in range(2):
    for name, shape in LAYER_SCALES.items():
      expected[f'image_decoder/decoder/layers/{layer}/{name}/kernel'] = shape
  assert scales == expected
  for name, leaf in int8_leaves.items():
    if name in scales:
      error = np.abs(np.asarray(leaf.values) * np.asarray(leaf.scale) - float_leaves[name])
      assert np.all(error <= 0.5001 * np.asarray(leaf.scale))
    else:
      np.testing.assert_array_equal(leaf, float_leaves[name])


def test_kernels_are_rounded_from_float32(params):
  """Rounding to bfloat16 first would add up to a quarter of a step."""
  config = dataclasses.replace(CONFIG, dtype='bfloat16')
  kept = parameters.for_sampling(config, params, 'int8')
  decoder = kept['image_decoder']
  assert decoder['decoder']['layers'][0]['mlp']['project_in']['kernel'].dtype == jnp.float32


def test_logits_are_close(params):
  tokens = jnp.asarray(np.random.default_rng(1).integers(0, 32, (8, 12)), jnp.int32)
  initial = jax.tree.map(lambda leaf: leaf / 2.0, params)
  quantized = in_int8(initial)
  dequantized = jax.tree.map(
    lambda leaf: leaf.values * leaf.scale if is_kernel(leaf) else leaf,
    quantized,
    is_leaf=is_kernel,
  )
  found, rounded, expected = (
    np.asarray(logits(tree, tokens))
    for tree in (quantized, dequantized, parameters.for_sampling(CONFIG, initial))
  )
  size = expected.std()
  np.testing.assert_allclose(found, rounded, atol=1e-4 * size)
  # A step of 1/127 of a channel's largest weight rounds off about 0.5% of each weight.
  assert 1e-3 < (found - expected).std() / size < 0.02


def test_greedy_tokens_are_mostly_the_same(both):
  expected, found = (np.asarray(greedy(tree)) for tree in both)
  assert len(np.unique(expected)) > 4
  same_so_far = np.cumprod(expected == found, axis=1)
  assert same_so_far.mean() > 0.7


def test_a_loaded_model(tiny_folder, tmp_path):
  prompts = ['red apple', 'blue ball']
  plain = parti_jax.load(tiny_folder)
  model = parti_jax.load(tiny_folder, weights='int8')
  assert (plain.weights, model.weights) == ('float', 'int8')
  sizes = [
    sum(leaf.nbytes for leaf in jax.tree.leaves(part.generator_params['image_decoder']))
    for part in (plain, model)
  ]
  assert sizes[1] < 0.5 * sizes[0]  # Embeddings are a part of so small a model.
  drawn, again = (part.generate(prompts, num_images=4, temperature=0) for part in (model, model))
  np.testing.assert_array_equal(drawn.tokens, again.tokens)
  expected = plain.generate(prompts, num_images=4, temperature=0)
  assert (drawn.tokens == expected.tokens).mean() > 0.5
  assert images.read_metadata(drawn.save(tmp_path)[0])['weights'] == 'int8'
  assert 'weights' not in images.read_metadata(expected.save(tmp_path)[0])


@pytest.mark.parametrize(
  'other', [{'exit_threshold': 0.9999}, {'speculative_window': 3, 'speculative_rule': 'equal'}]
)
def test_other_ways_to_the_same_tokens(tiny_folder, other):
  """No token is sure enough to exit early, and equal drafts change no token."""
  model = parti_jax.load(tiny_folder, weights='int8')
  settings = {'num_images': 3, 'temperature': 0, 'guidance_scale': 1.0}
  plain, careful = (
    model.generate('red apple', **settings, **changed).tokens for changed in ({}, other)
  )
  np.testing.assert_array_equal(careful, plain)


def test_on_a_mesh_the_pictures_are_the_same(tiny_folder):
  if len(jax.devices()) < 4:
    pytest.skip('needs 4 devices')
  mesh = mesh_lib.make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
  sharded = parti_jax.load(tiny_folder, mesh, weights='int8')
  alone = parti_jax.load(tiny_folder, weights='int8')
  layer, expected = (
    part.generator_params['image_decoder']['decoder']['layers'][0] for part in (sharded, alone)
  )
  jax.tree.map(np.testing.assert_array_equal, layer, expected)
  kernel = layer['mlp']['project_in']['kernel']
  assert kernel.values.sharding.shard_shape(kernel.values.shape) == (8, 16)
  assert kernel.scale.sharding.shard_shape(kernel.scale.shape) == (16,)
  draw = lambda model: model.generate(['red apple', 'blue ball'], num_images=2, seed=3).tokens
  np.testing.assert_array_equal(draw(sharded), draw(alone))

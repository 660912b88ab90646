"""Tests attention by cuDNN as far as possible without a GPU.

What the kernel is asked to compute is computed with XLA instead, and compared with attention over
all pairs. Programs for GPUs are lowered, but not compiled.
"""

import math
import types

import flax.linen as nn
import gradients
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models.nn import attention_cudnn
from parti_jax.models.nn import attention_patterns
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import transformer
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules

HOPPER = (9, 0)


def pattern_of(name):
  return attention_patterns.AttentionPattern(name, (8, 8), 3)


def normal(*shape, dtype=jnp.float32):
  return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), dtype)


def first_keys(*counts, length):
  """A mask of the keys that leaves the first ones of each example."""
  return jnp.arange(length) < jnp.array(counts)[:, None, None, None]


FITTING = {
  'platform': 'gpu',
  'capability': HOPPER,
  'dtype': 'bfloat16',
  'length': 1024,
  'key_length': 128,
  'head_dim': 64,
}


@pytest.mark.parametrize(
  'changes, expected',
  [
    ({}, True),
    ({'dtype': 'float16', 'head_dim': 128, 'pattern': 'global'}, True),
    ({'capability': (8, 0), 'head_dim': 8, 'length': 64, 'key_length': 64}, True),
    ({'capability': (10, 0), 'head_dim': 72, 'length': 1025, 'key_length': 77}, True),
    ({'capability': (7, 5), 'dtype': 'float16'}, False),
    ({'capability': None}, False),
    ({'dtype': 'float32'}, False),
    ({'head_dim': 136}, False),
    ({'head_dim': 60}, False),
    ({'length': 63}, False),
    ({'key_length': 1}, False),
    ({'pattern': 'conv'}, False),
    ({'pattern': 'row'}, False),
    ({'pattern': 'column'}, False),
    ({'platform': 'cpu'}, False),
    ({'platform': 'tpu', 'capability': None}, False),
  ],
)
def test_where_cudnn_fits(changes, expected):
  pattern = {'pattern': pattern_of(changes['pattern'])} if 'pattern' in changes else {}
  assert attention_cudnn.cudnn_fits(**FITTING | changes | pattern) is expected


@pytest.mark.parametrize(
  'length, key_length, mask, causal',
  [
    (64, 64, None, True),
    (64, 64, None, False),
    (64, 64, first_keys(64, 5, 0, length=64), False),
    (64, 7, None, False),
    (64, 7, first_keys(1, 0, 7, length=7), False),
    (64, 7, first_keys(4, length=7), False),
  ],
  ids=['causal', 'all', 'text', 'cross', 'cross_text', 'same_text'],
)
def test_equals_attention_over_all_pairs(length, key_length, mask, causal):
  """A text without any token is attended to evenly, and gives no gradient to the scores."""
  inputs = normal(3, length, 2, 8), normal(3, key_length, 2, 8), 2 * normal(3, key_length, 2, 8)
  allowed = pattern_of('global').mask if causal else mask
  expected = gradients.with_gradients(
    lambda *parts: dot_product_attention.attend(*parts, allowed), *inputs
  )
  found = gradients.with_gradients(
    lambda *parts: attention_cudnn.attend(*parts, mask, causal, implementation='xla'), *inputs
  )
  for a, b in zip(expected, found, strict=True):
    np.testing.assert_allclose(b, a, atol=2e-6 * float(jnp.abs(a).max()))
  if mask is not None and mask.shape[0] > 1:
    empty = int(jnp.argmin(mask.sum((1, 2, 3))))
    np.testing.assert_allclose(found[0][empty], [inputs[2][empty].mean(0)] * length, atol=1e-6)


@pytest.mark.parametrize(
  'texts, expected',
  [
    ([[5, 6, 1, 0], [1, 0, 0, 0]], [[1, 1, 1, 0], [1, 0, 0, 0]]),
    ([[5, 0, 7, 0], [0, 0, 0, 9]], [[1, 1, 1, 0], [1, 1, 1, 1]]),
    ([[0, 0, 0, 0]], [[0, 0, 0, 0]]),
  ],
)
def test_masks_of_texts_leave_the_first_tokens(texts, expected):
  mask = dot_product_attention.text_mask(jnp.array(texts))
  np.testing.assert_array_equal(mask[:, 0, 0], np.array(expected, bool))


@pytest.fixture(name='as_on_a_gpu')
def _as_on_a_gpu(monkeypatch):
  """Makes layers use cuDNN, with XLA in its place; returns the calls."""
  calls = []

  def attend(query, key, value, **settings):
    assert settings.pop('implementation') == 'cudnn'
    calls.append((query.shape, key.shape, settings['is_causal']))
    return attend_anywhere(query, key, value, implementation='xla', **settings)

  attend_anywhere = jax.nn.dot_product_attention
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(mesh_lib, 'compute_capability', lambda: HOPPER)
  monkeypatch.setattr(jax.nn, 'dot_product_attention', attend)
  return calls


def test_blocks_with_cudnn_equal_those_without(request):
  """In bfloat16, up to rounding; other patterns than 'global' keep their forms."""
  sizes = {'width': 32, 'mlp_width': 16, 'heads': 4, 'dtype': jnp.bfloat16}
  encoder, decoder = transformer.EncoderBlock(**sizes), transformer.DecoderBlock(**sizes)
  text, x = normal(2, 64, 32), normal(2, 64, 32)
  mask = first_keys(3, 64, length=64)
  patterns = (pattern_of('conv'), pattern_of('global'))
  made = jax.eval_shape(
    lambda key: (encoder.init(key, text, mask), decoder.init(key, x, text, mask, patterns)),
    jax.random.key(0),
  )

  def both(index):
    def apply(variables):
      encoded = encoder.apply(variables[0], text, mask)
      return decoder.apply(variables[1], x, encoded, mask, patterns, index)

    return jax.jit(apply)(random_parameters.like(made))

  plain = [both(0), both(1)]
  calls = request.getfixturevalue('as_on_a_gpu')
  for index, expected in enumerate(plain):
    np.testing.assert_allclose(
      np.asarray(both(index), np.float32), np.asarray(expected, np.float32), rtol=0.03, atol=0.03
    )
  sizes = (2, 64, 4, 8)
  without_conv = [(sizes, sizes, False)] * 2  # Of the texts, and from the images to the texts.
  assert calls == [*without_conv, without_conv[0], (sizes, sizes, True), without_conv[1]]


def test_each_device_computes_its_examples_and_heads(as_on_a_gpu, monkeypatch):
  monkeypatch.setattr(mesh_lib, 'platform', lambda: 'gpu')
  inputs = [normal(4, length, 4, 8, dtype=jnp.bfloat16) for length in (72, 64, 64)]
  mask = first_keys(3, 64, 0, 1, length=64)
  expected = dot_product_attention.attend(*inputs, mask)
  with rules.partitioned(mesh_lib.make_mesh(data=4, tensor=2), rules.logical_axis_rules()):
    found = jax.jit(dot_product_attention.attend_to_keys)(*inputs, mask)
    # An example can't be divided, such as that of an initialization.
    dot_product_attention.attend_to_keys(*(part[:1] for part in inputs), mask[:1])
  assert as_on_a_gpu == [((1, 72, 2, 8), (1, 64, 2, 8), False)]
  assert len({str(shard.index) for shard in found.addressable_shards}) == 8
  np.testing.assert_allclose(
    np.asarray(found, np.float32), np.asarray(expected, np.float32), rtol=0.03, atol=0.03
  )


@pytest.mark.parametrize(
  'axes', [{}, {'data': 4, 'tensor': 2}, {'data': 2, 'stage': 2, 'tensor': 2}]
)
def test_a_training_step_is_lowered_for_gpus(monkeypatch, axes):
  """Initialization traces no kernel, which vmap can't batch; a loss and its gradient have theirs."""
  from jax._src.cudnn import fused_attention_stablehlo

  config = parti_config.PartiConfig(
    encoder_layers=2,
    decoder_layers=2,
    width=32,
    mlp_width=16,
    heads=4,
    text_vocabulary=16,
    text_length=64,
    codebook_size=16,
    grid=(8, 8),
    dropout=0.0,
    dtype='bfloat16',
    attention_patterns=('global',),
    remat='block_inputs',
  )
  model = parti.Parti(config)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  monkeypatch.setattr(mesh_lib, 'compute_capability', lambda: HOPPER)
  version = types.SimpleNamespace(cudnn_get_version=lambda: 91000)
  monkeypatch.setattr(fused_attention_stablehlo, 'cuda_versions', version)
  devices = jax.devices()[: math.prod(axes.values())]
  mesh = mesh_lib.make_mesh(**axes, devices=devices)
  texts, images = parti.example_inputs(config, 8)

  def loss(variables):
    return jnp.mean(model.apply(variables, texts, images))

  variables = nn.meta.unbox(jax.eval_shape(model.init, jax.random.key(0), texts, images))
  with rules.partitioned(mesh, rules.logical_axis_rules()):
    on_mesh = lambda: 'cpu' if mesh_lib.current() is None else 'gpu'
    monkeypatch.setattr(mesh_lib, 'platform', on_mesh)
    traced = jax.jit(jax.grad(loss)).trace(variables)
    text = traced.lower(lowering_platforms=('cuda',)).as_text()
  # Of each kind of layer one: self-attention of texts, and self-attention and cross-attention of
  # images; forward, again for the backward pass, and backward.
  counts = [text.count(f'@__cudnn$fmhaSoftmax{kind}(') for kind in ('Backward', '')]
  assert counts == [3, 6], counts

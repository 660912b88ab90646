"""Stacked layers are initialized once, and not when their network is applied."""

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.exported_model import model_folder
from parti_jax.models import clip
from parti_jax.models import coca
from parti_jax.models import parti_config
from parti_jax.models import t5_encoder
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers

SIZES = {'width': 8, 'mlp_width': 16, 'heads': 2}
TEXTS = {'text_vocabulary': 11, 'text_length': 4}
NETWORKS = {
  'parti': (
    'generator',
    parti_config.PartiConfig(
      **SIZES, **TEXTS, encoder_layers=2, decoder_layers=2, codebook_size=7, grid=(2, 2)
    ),
  ),
  'coca': (
    'ranker',
    coca.CoCaConfig(
      **SIZES, **TEXTS, image_size=8, patch_size=4, image_layers=2, unimodal_layers=2
    ),
  ),
  't5': ('text_encoder', t5_encoder.T5EncoderConfig(**SIZES, **TEXTS, layers=2, head_dim=4)),
  'clip': ('text_encoder', clip.CLIPTextConfig(**SIZES, **TEXTS, layers=2, end_id=10)),
}


@pytest.mark.parametrize('kind', NETWORKS)
def test_applying_a_network_initializes_no_layers(kind, monkeypatch):
  name, config = NETWORKS[kind]
  network, params = model_folder.NETWORKS[name], model_folder.abstract(*NETWORKS[kind])
  inputs = jax.eval_shape(lambda: network.example_inputs(config))

  def initialized(*unused_args, **unused_kwargs):
    raise AssertionError('a layer was initialized')

  monkeypatch.setattr(nn.Module, 'init', initialized)
  for variables in ({'params': params}, nn.meta.unbox({'params': params})):
    assert jax.eval_shape(network.module(config).apply, variables, *inputs) is not None


@pytest.mark.parametrize('kind', NETWORKS)
def test_shapes_alone_are_those_of_initial_values(kind):
  name, config = NETWORKS[kind]
  network = model_folder.NETWORKS[name]
  init = network.module(config).init
  initial = jax.eval_shape(init, jax.random.key(0), *network.example_inputs(config))
  assert model_folder.abstract(name, config) == initial['params']


def test_a_jitted_init_has_initial_values_after_it_gave_shapes():
  network, config = model_folder.NETWORKS['text_encoder'], NETWORKS['t5'][1]
  module, inputs = network.module(config), network.example_inputs(config)
  init = jax.jit(lambda key: nn.meta.unbox(module.init(key, *inputs)['params']))
  with layers.only_shapes():
    shapes = jax.eval_shape(init, jax.random.key(0))
  initial = init(jax.random.key(0))
  assert jax.eval_shape(lambda: initial) == shapes
  assert all(np.any(leaf) for leaf in jax.tree.leaves(initial))


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x + self.param('bias', nn.initializers.ones, x.shape[1:])


class _Stack(nn.Module):
  count: int

  @nn.compact
  def __call__(self, x):
    return layer_stack.parameters(self, _Layer(parent=None), self.count, x)['bias']


def test_another_number_of_layers_is_an_error():
  x = jnp.zeros((1, 2))
  variables = nn.meta.unbox(_Stack(3).init(jax.random.key(0), x))
  assert _Stack(3).apply(variables, x).shape == (3, 2)
  with pytest.raises(flax.errors.ScopeParamShapeError, match=r'layers.*\(3,\)'):
    _Stack(4).apply(variables, x)

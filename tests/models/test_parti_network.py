"""Parti: precision, axis names, remat and unrolling, padding of the text."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_parameters

from parti_jax.core.errors import UserError
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers

TINY = parti_config.PartiConfig(
  encoder_layers=2,
  decoder_layers=2,
  width=16,
  mlp_width=32,
  heads=2,
  text_vocabulary=20,
  text_length=6,
  codebook_size=12,
  grid=(2, 3),
  dropout=0.1,
  dtype='float32',
)


@pytest.fixture(scope='module')
def params():
  """Parameters of TINY in which the scales of norms differ from 1."""
  found = random_parameters.of(parti.Parti(TINY), parti.example_inputs(TINY))
  leaves, tree = jax.tree.flatten(found)
  noise = np.random.default_rng(0)
  return tree.unflatten(
    [leaf + 0.1 * noise.normal(size=leaf.shape).astype(np.float32) for leaf in leaves]
  )


@pytest.fixture(scope='module')
def tokens():
  draw = np.random.default_rng(1)
  text = np.array([[5, 7, 1, 0, 0, 0], [9, 3, 4, 8, 2, 1], [1, 0, 0, 0, 0, 0]], np.int32)
  return text, draw.integers(0, 12, (3, 6)).astype(np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _logits(sizes, params, text, image, seed=None):
  """Logits without dropout, or with that of a seed."""
  keys = None if seed is None else layers.dropout_keys(jax.random.key(seed), len(text))
  return parti.Parti(sizes).apply({'params': params}, text, image, keys)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(sizes, params, text, image):
  """A loss with dropout, and its gradients."""

  def loss(params):
    return jnp.mean(jnp.square(_logits.__wrapped__(sizes, params, text, image, 3) - 1.0))

  return jax.value_and_grad(loss)(params)


def _equations(jaxpr):
  """All equations of a jaxpr, those of its loops and calls too."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for inner in value if isinstance(value, (tuple, list)) else (value,):
        inner = getattr(inner, 'jaxpr', inner)
        if hasattr(inner, 'eqns'):
          yield from _equations(inner)


def test_projections_are_bfloat16_and_norms_softmax_and_logits_float32(tokens):
  sizes = dataclasses.replace(TINY, dtype='bfloat16')
  module = parti.Parti(sizes)
  variables = jax.eval_shape(module.init, jax.random.key(0), *parti.example_inputs(sizes))
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
  jaxpr = jax.make_jaxpr(module.apply)(nn.meta.unbox(variables), *tokens).jaxpr
  found = {}
  for equation in _equations(jaxpr):
    found.setdefault(equation.primitive.name, []).append(equation)
  for name in ('rsqrt', 'exp'):  # Of the norms and of the softmax.
    assert {equation.invars[0].aval.dtype.name for equation in found[name]} == {'float32'}
  full = [
    equation for equation in found['dot_general'] if equation.invars[0].aval.dtype == jnp.float32
  ]
  assert [equation.outvars[0].aval.shape for equation in full] == [(3 * 6, sizes.codebook_size)]
  halves = [equation for equation in found['dot_general'] if equation not in full]
  assert len(halves) >= 12
  for equation in halves:
    assert {variable.aval.dtype.name for variable in equation.invars} == {'bfloat16'}
  assert jaxpr.outvars[0].aval.dtype == jnp.float32


def test_bfloat16_stays_close_to_float32(params, tokens):
  full = _logits(TINY, params, *tokens)
  half = _logits(dataclasses.replace(TINY, dtype='bfloat16'), params, *tokens)
  difference = np.abs(half - full).max()
  assert 0 < difference < 0.05 * np.abs(full).max()


def test_every_parameter_has_an_axis_name_for_each_dimension():
  boxed = jax.eval_shape(parti.Parti(TINY).init, jax.random.key(0), *parti.example_inputs(TINY))
  specs = nn.get_partition_spec(boxed)
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(nn.meta.unbox(boxed)), jax.tree.leaves(specs)
  ):
    assert len(spec) == len(leaf.shape), path
    assert all(isinstance(name, str) for name in spec), path
    stacked = 'layers' in jax.tree_util.keystr(path)
    assert (spec[0] == 'layers') == stacked, path


@pytest.mark.parametrize(
  'changes',
  [
    {'remat': 'dots', 'unroll': 7},
    {'remat': 'block_inputs', 'unroll': 2},
    {'remat': 'block_inputs_and_attention'},
    {'remat': 'nothing'},
  ],
)
def test_remat_and_unroll_change_neither_loss_nor_gradients(params, tokens, changes):
  # With dropout, whose masks must be the same in the recomputation.
  loss, gradients = _gradients(TINY, params, *tokens)
  other, others = _gradients(dataclasses.replace(TINY, **changes), params, *tokens)
  np.testing.assert_allclose(other, loss, rtol=1e-6)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others)):
    np.testing.assert_allclose(b, a, atol=4e-6 * np.abs(a).max())


def test_remat_recomputes(params, tokens):
  def products(policy):
    sizes = dataclasses.replace(TINY, remat=policy)
    jaxpr = jax.make_jaxpr(functools.partial(_gradients, sizes))(params, *tokens)
    return sum(equation.primitive.name == 'dot_general' for equation in _equations(jaxpr.jaxpr))

  # From the outputs of the projections to nothing but every second block's input.
  counts = [products(policy) for policy in layer_stack.REMAT_POLICIES]
  assert counts == sorted(set(counts))


def test_dropout_changes_the_loss_and_follows_its_key(params, tokens):
  draw = lambda seed: _logits(TINY, params, *tokens, seed)
  np.testing.assert_array_equal(draw(0), draw(0))
  assert np.abs(draw(0) - draw(1)).max() > 1e-3
  assert np.abs(draw(0) - _logits(TINY, params, *tokens)).max() > 1e-3


def test_padding_of_the_text_never_changes_logits(params, tokens):
  text, image = tokens
  # The shortest length that holds the text against the full one; then beside other texts.
  apply = lambda text, image: _logits(TINY, params, text, image)
  padded = apply(text, image)
  np.testing.assert_allclose(apply(text[:1, :3], image[:1]), padded[:1], atol=1e-5)
  np.testing.assert_allclose(apply(text[2:, :1], image[2:]), padded[2:], atol=1e-5)


def test_the_text_and_its_order_count(params, tokens):
  text, image = tokens
  apply = lambda text: _logits(TINY, params, text, image)
  other, turned = text.copy(), text.copy()
  other[1, 0] = 10
  turned[1, :2] = text[1, 1::-1]
  for changed in (apply(other), apply(turned)):
    difference = np.abs(changed - apply(text)).max(axis=(1, 2))
    assert difference[1] > 1e-4
    assert difference[0] == difference[2] == 0


def test_the_empty_text_gives_finite_logits_and_gradients(params, tokens):
  empty = np.array([[1, 0, 0, 0, 0, 0]], np.int32)
  loss, gradients = _gradients(TINY, params, empty, tokens[1][:1])
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((loss, gradients)))


def test_an_image_token_never_changes_its_own_or_earlier_logits(params, tokens):
  text, image = tokens
  apply = lambda image: _logits(TINY, params, text, image)
  before = apply(image)
  for position in range(TINY.image_length):
    changed = image.copy()
    changed[:, position] = (changed[:, position] + 1) % TINY.codebook_size
    difference = np.abs(apply(changed) - before).max(axis=(0, 2))
    assert not difference[: position + 1].any()
    if position + 1 < TINY.image_length:
      assert (difference[position + 1 :] > 1e-6).all()


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'heads': 3}, ['PartiConfig.heads=3', 'width=16']),
    ({'remat': 'all'}, ["PartiConfig.remat='all'", 'everything, dots, block_inputs']),
    ({'dtype': 'float17'}, ["PartiConfig.dtype='float17'", 'bfloat16']),
    ({'encoder_layers': 0}, ['PartiConfig.encoder_layers=0']),
  ],
)
def test_sizes_that_do_not_fit_are_named(changes, words):
  with pytest.raises(UserError) as caught:
    dataclasses.replace(TINY, **changes)
  assert all(word in str(caught.value) for word in words)

"""Tests the rules: the shards of parameters and moments, and errors for indivisible sizes."""

import dataclasses

import jax
import numpy as np
import optax
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules
from parti_jax.training import optimizers
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import generator_objective

# Wide enough that Adafactor factors the MLPs' and the tables' second moments.
SIZES = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=128,
  mlp_width=256,
  heads=4,
  text_vocabulary=192,
  text_length=4,
  codebook_size=160,
  grid=(2, 2),
  dtype='float32',
)
OBJECTIVE = generator_objective.GeneratorObjective(SIZES)
DECODER = ('image_decoder', 'decoder', 'layers')

# Path -> (shape, its part on a device of the mesh 1×2×4).
PARTS = {
  (*DECODER, 'attention', 'project_in', 'kernel'): ((2, 128, 3, 4, 32), (2, 64, 3, 1, 32)),
  (*DECODER, 'attention', 'project_out', 'kernel'): ((2, 4, 32, 128), (2, 1, 32, 64)),
  (*DECODER, 'cross_attention', 'project_memory', 'kernel'): (
    (2, 128, 2, 4, 32),
    (2, 64, 2, 1, 32),
  ),
  (*DECODER, 'mlp', 'project_in', 'kernel'): ((2, 128, 256), (2, 64, 64)),
  (*DECODER, 'mlp', 'project_out', 'kernel'): ((2, 256, 128), (2, 64, 64)),
  (*DECODER, 'mlp_norm', 'scale'): ((2, 128), (2, 128)),
  ('image_decoder', 'token_embedding', 'table'): ((160, 128), (40, 64)),
  ('image_decoder', 'logits', 'kernel'): ((128, 160), (64, 40)),
  ('image_decoder', 'begin'): ((128,), (128,)),
  ('text_encoder', 'token_embedding', 'table'): ((192, 128), (48, 64)),
  ('text_encoder', 'position_embedding', 'table'): ((4, 128), (4, 64)),
}


def _state(optimizer, **sizes):
  mesh, table = mesh_lib.make_mesh(**sizes), rules.logical_axis_rules()
  abstract = state_lib.abstract_state(OBJECTIVE, optimizer, mesh, table)
  return abstract, state_lib.create_state(OBJECTIVE, optimizer, 0, abstract, mesh, table)


def _at(tree, path):
  for key in path:
    tree = tree[key]
  return tree


def _part(array):
  parts = {shard.data.shape for shard in array.addressable_shards}
  assert len(parts) == 1 and len(array.addressable_shards) == 8
  return parts.pop()


@pytest.fixture(scope='module')
def adafactor_state():
  return _state(optimizers.adafactor(1e-3), data=1, fsdp=2, tensor=4)


def test_parameters_are_sharded_by_the_rules(adafactor_state):
  _, state = adafactor_state
  for path, (shape, part) in PARTS.items():
    array = _at(state.params, path)
    assert array.shape == shape, path
    assert _part(array) == part, path


def test_the_state_has_the_shapes_and_shardings_that_were_planned(adafactor_state):
  abstract, state = adafactor_state
  jax.tree.map(
    lambda plan, leaf: np.testing.assert_equal(
      (leaf.shape, leaf.dtype, leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)),
      (plan.shape, plan.dtype, True),
    ),
    abstract,
    state,
  )


def test_adafactors_moments_are_sharded_like_their_parameters(adafactor_state):
  _, state = adafactor_state
  factored = next(s for s in state.optimizer_state if hasattr(s, 'v_row'))
  first = next(s for s in state.optimizer_state if hasattr(s, 'ema')).ema
  for path, (_, part) in PARTS.items():
    assert _part(_at(first, path)) == part, path
  # The rows' and columns' sums of a kernel lack one of its axes and keep the others' parts.
  path = (*DECODER, 'mlp', 'project_in', 'kernel')
  row, column = _at(factored.v_row, path), _at(factored.v_col, path)
  assert {row.shape: _part(row), column.shape: _part(column)} == {
    (2, 128): (2, 64),
    (2, 256): (2, 64),
  }
  path = ('image_decoder', 'logits', 'kernel')
  row, column = _at(factored.v_row, path), _at(factored.v_col, path)
  assert {row.shape: _part(row), column.shape: _part(column)} == {(128,): (64,), (160,): (40,)}
  # Heads and head_dim are one axis, which is split like the heads.
  for kernel, row_parts, column_parts in (
    (('attention', 'project_in'), {(2, 128, 3): (2, 64, 3)}, {(2, 3, 128): (2, 3, 32)}),
    (('attention', 'project_out'), {(2, 128): (2, 32)}, {(2, 128): (2, 64)}),
    (('cross_attention', 'project_query'), {(2, 128): (2, 64)}, {(2, 128): (2, 32)}),
  ):
    row, column = (
      _at(tree, (*DECODER, *kernel, 'kernel')) for tree in (factored.v_row, factored.v_col)
    )
    assert {row.shape: _part(row)} == row_parts, kernel
    assert {column.shape: _part(column)} == column_parts, kernel


def test_factored_moments_are_the_same_on_a_mesh(adafactor_state):
  abstract, _ = adafactor_state
  draw = np.random.default_rng(0)
  gradients = jax.tree.map(
    lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), abstract.params
  )
  optimizer = optimizers.scale_by_factored_moment(0.9)
  step = lambda gradients: optimizer.update(gradients, optimizer.init(gradients), gradients)
  right, moment = jax.jit(step)(gradients)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract.params)
  shapes = jax.eval_shape(optimizer.init, abstract.params)
  placed = rules.optimizer_shardings(
    shapes, abstract.params, shardings, jax.tree.leaves(shardings)[0].mesh
  )
  found, moment_there = jax.jit(step, in_shardings=(shardings,), out_shardings=(shardings, placed))(
    jax.device_put(gradients, shardings)
  )
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, right)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moment_there, moment)


def test_moments_that_are_not_factored_are_sharded_like_their_parameters():
  optimizer = optimizers.scale_by_factored_moment(0.9)
  narrow = generator_objective.GeneratorObjective(dataclasses.replace(SIZES, width=64))
  abstract = state_lib.abstract_state(
    narrow, optimizer, mesh_lib.make_mesh(data=1, fsdp=2, tensor=4), rules.logical_axis_rules()
  )
  jax.tree.map(
    lambda moment, parameter: np.testing.assert_equal(
      (moment.shape, moment.sharding), (parameter.shape, parameter.sharding)
    ),
    abstract.optimizer_state.v,
    abstract.params,
  )


def test_adams_moments_are_sharded_like_their_parameters():
  abstract = state_lib.abstract_state(
    OBJECTIVE,
    optimizers.adamw(1e-3),
    mesh_lib.make_mesh(data=2, fsdp=2, tensor=2),
    rules.logical_axis_rules(),
  )
  moments = jax.tree.leaves(
    abstract.optimizer_state, is_leaf=lambda node: isinstance(node, optax.ScaleByAdamState)
  )
  adam = next(node for node in moments if isinstance(node, optax.ScaleByAdamState))
  split = 0
  for tree in (adam.mu, adam.nu):
    for leaf, parameter in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract.params)):
      assert leaf.sharding == parameter.sharding
      split += not leaf.sharding.is_fully_replicated
  assert split > 20
  assert adam.count.sharding.is_fully_replicated


def _shardings(sizes, **mesh):
  return state_lib.abstract_state(
    generator_objective.GeneratorObjective(sizes),
    optax.sgd(1.0),
    mesh_lib.make_mesh(**mesh),
    rules.logical_axis_rules(),
  )


@pytest.mark.parametrize(
  'changes, mesh, words',
  [
    ({'heads': 2}, {'data': 2, 'tensor': 4}, ['attention', 'tensor', 'size 4', 'dimension 2']),
    (
      {'codebook_size': 161},
      {'tensor': 2},
      ['image_decoder/', 'tensor', 'size 2', 'dimension 161'],
    ),
    ({'width': 132, 'heads': 4}, {'fsdp': 8}, ['fsdp', 'size 8', 'dimension 132']),
  ],
)
def test_a_dimension_that_does_not_divide_is_named_with_its_parameter_and_axis(
  changes, mesh, words
):
  fields = {name: getattr(SIZES, name) for name in SIZES.__dataclass_fields__} | changes
  with pytest.raises(UserError) as caught:
    _shardings(parti_config.PartiConfig(**fields), **mesh)
  assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_batch_that_does_not_divide_is_named():
  mesh, table = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2), rules.logical_axis_rules()
  rules.check_batch(12, mesh, table)
  with pytest.raises(UserError, match=r'train\.batch_size=10 .* 4 ways .*multiple of 4'):
    rules.check_batch(10, mesh, table)


def test_gin_replaces_the_table():
  binding = "logical_axis_rules.rules = (('activation_batch', 'data'), ('mlp', ['fsdp', 'tensor']))"
  gin_config.parse([], [binding])
  try:
    params = _shardings(SIZES, data=1, fsdp=2, tensor=4).params
    kernel = _at(params, (*DECODER, 'mlp', 'project_in', 'kernel'))
    assert kernel.sharding.shard_shape(kernel.shape) == (2, 128, 32)
    assert _at(params, ('image_decoder', 'logits', 'kernel')).sharding.is_fully_replicated
    gin_config.parse([], ["logical_axis_rules.rules = (('mlp', 'model'),)"])
    with pytest.raises(UserError, match=r"'mlp' is bound to 'model'.*data, fsdp, tensor"):
      rules.logical_axis_rules()
  finally:
    gin_config.parse([], [])


def test_activations_are_constrained_at_block_boundaries_only_within_the_context():
  mesh, table = mesh_lib.make_mesh(data=2, fsdp=2, tensor=2), rules.logical_axis_rules()
  shapes = {'encoder_input_tokens': (8, 4), 'decoder_target_tokens': (8, 4)}
  batch = {name: jax.ShapeDtypeStruct(shape, np.int32) for name, shape in shapes.items()}
  abstract = state_lib.abstract_state(OBJECTIVE, optax.sgd(1.0), mesh, table)

  def lowered():
    return jax.jit(lambda *args: OBJECTIVE.evaluate(*args)).lower(abstract.params, batch).as_text()

  assert 'sharding_constraint' not in lowered()
  with rules.partitioned(mesh, table):
    inside = lowered()
  # Both blocks' inputs and outputs, and the logits.
  assert inside.count('sharding_constraint') >= 5
  assert '[{"stage", "data", "fsdp"}, {}, {"tensor"}]' in inside

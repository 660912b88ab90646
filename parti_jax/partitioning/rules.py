"""Binds logical axes to mesh axes, and derives shardings from these rules."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from collections.abc import Sequence

import flax.linen as nn
import gin
import jax
from jax.sharding import AbstractMesh
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import PyTree

from parti_jax.core import errors
from parti_jax.partitioning import factored
from parti_jax.partitioning import mesh as mesh_lib

# Mesh axes that split a logical axis.
MeshAxes = str | tuple[str, ...] | None
Rules = Sequence[tuple[str, MeshAxes]]

# Logical axis -> mesh axis or axes. Axes that aren't listed aren't split.
LOGICAL_AXIS_RULES: Rules = (
  ('activation_batch', ('stage', 'data', 'fsdp')),
  ('activation_heads', 'tensor'),
  ('activation_mlp', 'tensor'),
  ('activation_vocab', 'tensor'),
  ('embed', 'fsdp'),
  ('heads', 'tensor'),
  ('layers', 'stage'),
  ('mlp', 'tensor'),
  ('vocab', 'tensor'),
)


@gin.configurable
def logical_axis_rules(rules: Rules = LOGICAL_AXIS_RULES) -> Rules:
  """Returns the rules in use; gin may replace them (`logical_axis_rules.rules = (...)`).

  Args:
    rules: pairs of a logical axis and a mesh axis, several mesh axes, or None.

  Raises:
    UserError: if a mesh axis is unknown.
  """
  table = tuple(
    (name, tuple(axes) if isinstance(axes, (list, tuple)) else axes) for name, axes in rules
  )
  for name, axes in table:
    for axis in as_tuple(axes):
      if axis not in mesh_lib.AXES:
        raise errors.UserError(
          f'logical_axis_rules.rules: {name!r} is bound to {axis!r}, which '
          f"isn't a mesh axis; choose from {', '.join(mesh_lib.AXES)}"
        )
  return table


@contextlib.contextmanager
def partitioned(mesh: Mesh, rules: Rules) -> Iterator[None]:
  """Binds the models' logical axis names to `mesh` by `rules` while the body runs."""
  with mesh_lib.use(mesh), nn.logical_axis_rules(rules):
    yield


@contextlib.contextmanager
def one_stage() -> Iterator[None]:
  """Unbinds all names from the mesh axis `stage` in the body, which computes a single stage."""

  def without_stage(axes: MeshAxes) -> MeshAxes:
    return tuple(axis for axis in as_tuple(axes) if axis != 'stage') or None

  table = tuple((name, without_stage(axes)) for name, axes in nn.get_logical_axis_rules())
  with nn.logical_axis_rules(table):
    yield


def spec(*names: str | None) -> PartitionSpec:
  """Returns the mesh axes of an array's logical axes, by the current rules."""
  axes = nn.logical_to_mesh_axes(names)
  assert axes is not None
  return axes


def ways(name: str) -> int:
  """Returns the number of parts into which the current mesh and rules split a logical axis."""
  mesh = mesh_lib.current()
  return 1 if mesh is None else _ways(mesh, spec(name)[0])


def free_axes() -> set[str]:
  """Returns the mesh axes that aren't manual in an enclosing `jax.shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return set(mesh.axis_names) - set(mesh.manual_axes)


def batch_sharding(mesh: Mesh, rules: Rules) -> NamedSharding:
  """Returns the sharding of an array whose first axis is the batch."""
  axes = dict(rules).get('activation_batch')
  return NamedSharding(mesh, PartitionSpec(axes))


def axes_of(name: str, rules: Rules) -> tuple[str, ...]:
  """Returns the mesh axes that split a logical axis."""
  return as_tuple(dict(rules).get(name))


def batch_ways(mesh: Mesh | AbstractMesh, rules: Rules) -> int:
  """Returns the number of parts into which the mesh splits a batch."""
  return _ways(mesh, dict(rules).get('activation_batch'))


def check_batch(
  batch_size: int, mesh: Mesh | AbstractMesh, rules: Rules, microbatches: int = 1
) -> None:
  """Raises UserError unless the microbatches times the ways of splitting one divide the batch."""
  ways = batch_ways(mesh, rules)
  if microbatches < 1 or batch_size % (ways * microbatches):
    raise errors.UserError(
      f'train.batch_size={batch_size} is not divisible by train.microbatches={microbatches} '
      f'times the {ways} ways that the mesh {dict(mesh.shape)} splits a batch; choose a multiple '
      f'of {ways * max(microbatches, 1)}'
    )


def parameter_shardings(boxed: PyTree, mesh: Mesh, rules: Rules) -> PyTree:
  """Returns shardings of parameters from their logical axis names.

  Args:
    boxed: abstract parameters with axis names, the result of `jax.eval_shape(model.init, ...)`.
    mesh: the device mesh.
    rules: the result of `logical_axis_rules`.

  Returns:
    A tree of NamedSharding with the structure of the unboxed parameters.

  Raises:
    UserError: if a mesh axis does not divide the dimension that it splits.
  """
  specs = nn.logical_to_mesh(nn.get_partition_spec(boxed), rules)
  shapes = nn.meta.unbox(boxed)

  def sharding(path, shape, spec):
    _check_divisible(path, shape.shape, spec, mesh)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, shapes, specs)


def optimizer_shardings(
  optimizer_state: PyTree, parameters: PyTree, shardings: PyTree, mesh: Mesh
) -> PyTree:
  """Returns shardings of an optimizer's state, from the specs of `optimizer_specs`.

  Args:
    optimizer_state: abstract state of an optax transformation.
    parameters: abstract parameters, unboxed.
    shardings: the result of `parameter_shardings`.
    mesh: the device mesh.

  Returns:
    A tree of NamedSharding with the structure of `optimizer_state`.
  """
  specs = optimizer_specs(
    optimizer_state, parameters, jax.tree.map(lambda sharding: sharding.spec, shardings)
  )
  return jax.tree.map(
    lambda spec: NamedSharding(mesh, PartitionSpec() if spec is None else spec),
    specs,
    is_leaf=lambda spec: spec is None,
  )


def optimizer_specs(optimizer_state: PyTree, parameters: PyTree, specs: PyTree) -> PyTree:
  """Returns how an optimizer's state is split: each moment like its parameter.

  A factored second moment (Adafactor) lacks one axis of its parameter and is split along the
  others. If heads and head_dim are joined, they are split like the heads. All other leaves, such
  as counters, are replicated.

  Args:
    optimizer_state: state of an optax transformation, abstract or concrete.
    parameters: parameters, abstract or concrete, unboxed.
    specs: a PartitionSpec for each parameter, of mesh axes or of logical axes.

  Returns:
    A tree with the structure of `optimizer_state`, of PartitionSpec; None for replicated leaves.
  """
  known = {}
  for (path, leaf), spec in zip(
    jax.tree_util.tree_leaves_with_path(parameters), jax.tree.leaves(specs)
  ):
    known[_names(path)] = (leaf.shape, spec)

  def spec_of(path, leaf):
    names = _names(path)
    for start in range(len(names)):
      if names[start:] in known:
        return _spec_of_moment(names[:start], names[start:], leaf.shape, *known[names[start:]])
    return None

  return jax.tree_util.tree_map_with_path(spec_of, optimizer_state)


def _spec_of_moment(
  fields: tuple[str, ...],
  parameter: tuple[str, ...],
  shape: tuple[int, ...],
  parameter_shape: tuple[int, ...],
  spec: PartitionSpec,
) -> PartitionSpec | None:
  """Returns a moment's PartitionSpec; None if its axes aren't those of its parameter, or one less."""
  of_axes = tuple(spec) + (None,) * (len(parameter_shape) - len(spec))
  if shape == parameter_shape:
    return PartitionSpec(*of_axes)
  heads = factored.joined_axis(parameter, parameter_shape)
  if heads is not None:
    parameter_shape = factored.matrix_shape(parameter, parameter_shape)
    of_axes = of_axes[: heads + 1] + of_axes[heads + 2 :]
  axes = factored.axes(parameter_shape)
  for field, number in (('v_col', 0), ('v_row', 1)):
    if field in fields and axes is not None:
      lacking = axes[number]
      if shape == parameter_shape[:lacking] + parameter_shape[lacking + 1 :]:
        return PartitionSpec(*of_axes[:lacking], *of_axes[lacking + 1 :])
  return None


def _names(path: jax.tree_util.KeyPath) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr(path, simple=True, separator='/').split('/'))


def _ways(mesh: Mesh | AbstractMesh, axes: MeshAxes) -> int:
  return math.prod(mesh.shape[axis] for axis in as_tuple(axes))


def as_tuple(axes: MeshAxes) -> tuple[str, ...]:
  """Returns the mesh axes of a rule or of an entry of a PartitionSpec."""
  return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _check_divisible(
  path: jax.tree_util.KeyPath, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh
) -> None:
  for dimension, axes in zip(shape, spec):
    ways = _ways(mesh, axes)
    if dimension % ways:
      name = jax.tree_util.keystr(path, simple=True, separator='/')
      raise errors.UserError(
        f'parameter {name} of shape {shape}: the mesh axis {axes!r} of size '
        f'{ways} does not divide its dimension {dimension}; choose another mesh or width'
      )

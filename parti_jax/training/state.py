"""The state of a training run, created with its shardings."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any
from typing import TypeVar

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import PyTree

from parti_jax.core import errors
from parti_jax.core import numerics
from parti_jax.models.nn import layers
from parti_jax.partitioning import rules as rules_lib
from parti_jax.training.objectives import base

# JAX's name of host memory that devices can read.
_HOST = 'pinned_host'

_Tree = TypeVar('_Tree')


class TrainState(flax.struct.PyTreeNode):
  """State of a run.

  Attributes:
    step: int32, number of steps done.
    params: the model's parameters, float32.
    optimizer_state: state of the optax transformation.
    statistics: other state of the objective, such as the use of codes. Under 'average' it may have
      {name of a part: moving average of that part's parameters}. Evaluation, images and exported
      models use the averages.
  """

  step: Int[Array, '']
  params: base.Params
  optimizer_state: optax.OptState
  statistics: base.Statistics


def averaged(state: TrainState) -> base.Params:
  """Returns the parameters for evaluation: moving averages where the objective keeps them."""
  return state.params | state.statistics.get('average', {})


def with_parts(state: TrainState, parts: base.Params) -> TrainState:
  """Replaces parts of a new state's parameters, and of their averages.

  Args:
    state: the state before the first step, a result of `create_state`.
    parts: {name of a part: its parameters on the mesh}.
  """
  statistics, average = state.statistics, state.statistics.get('average', {})
  # Copies, since a step donates the buffers of both.
  replaced = {name: jax.tree.map(jnp.copy, parts[name]) for name in average if name in parts}
  if replaced:
    statistics = statistics | {'average': average | replaced}
  return state.replace(params=state.params | parts, statistics=statistics)


def initial_average(
  init: Callable[[PRNGKeyArray], base.Params], parts: Iterable[str]
) -> base.Params:
  """Returns zeros for the moving averages of parts of the parameters.

  `create_state` replaces them with the initial parameters.

  Args:
    init: the objective's `init`.
    parts: names of the parts; those without parameters are left out.
  """
  with layers.only_shapes():
    params = nn.meta.unbox(jax.eval_shape(init, jax.random.key(0)))
  return jax.tree.map(
    lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
    {name: params[name] for name in parts if name in params},
  )


def update_average(
  average: base.Params, params: base.Params, step: Int[Array, ''], decay: float
) -> base.Params:
  """Updates the exponential moving average of parameters after a step.

  Args:
    average: the average before the step.
    params: the parameters after the step; parts that have no average are not used.
    step: number of steps done before this one.
    decay: decay of the average. The first steps use at most step / (step + 10), so that the random
      initial parameters don't stay in the average for long.

  Returns:
    The new average. Parameters that don't change leave it unchanged bit for bit.
  """
  params = {name: params[name] for name in average}
  share = jnp.minimum(decay, step / (step + 10.0))
  moved = lambda old, new: old + (1.0 - share) * (new - old)
  return jax.tree.map(lambda old, new: jnp.where(step == 0, new, moved(old, new)), average, params)


def abstract_state(
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  mesh: jax.sharding.Mesh,
  rules: Any,
) -> TrainState:
  """Returns the shapes and shardings of a run's state without computing it.

  Args:
    objective: the objective to train.
    optimizer: an optax transformation.
    mesh: the device mesh.
    rules: logical axis rules.

  Returns:
    A TrainState of jax.ShapeDtypeStruct, each with its NamedSharding.

  Raises:
    UserError: if a parameter can't be split evenly over the mesh.
  """
  with layers.only_shapes():
    boxed = jax.eval_shape(objective.init, numerics.key(0))
  shardings = rules_lib.parameter_shardings(boxed, mesh, rules)
  params = nn.meta.unbox(boxed)
  state = jax.eval_shape(lambda params: first_state(objective, optimizer, params), params)
  state_shardings = state.replace(
    step=NamedSharding(mesh, PartitionSpec()),
    params=shardings,
    optimizer_state=rules_lib.optimizer_shardings(state.optimizer_state, params, shardings, mesh),
    statistics=rules_lib.optimizer_shardings(state.statistics, params, shardings, mesh),
  )
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    state,
    state_shardings,
  )


def num_bytes(state: PyTree) -> int:
  """Returns the bytes of a state's arrays, over all devices."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def create_state(
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  abstract: TrainState,
  mesh: jax.sharding.Mesh,
  rules: Any,
) -> TrainState:
  """Returns the state before the first step, created on its shardings.

  No device ever holds the whole of a parameter that is split.

  Args:
    objective: the objective to train.
    optimizer: an optax transformation.
    seed: seed of the initial parameters.
    abstract: shapes and shardings of the state, a result of `abstract_state`.
    mesh: the device mesh.
    rules: logical axis rules.
  """

  def create() -> TrainState:
    return first_state(objective, optimizer, nn.meta.unbox(objective.init(numerics.key(seed))))

  with rules_lib.partitioned(mesh, rules):
    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def first_state(
  objective: base.Objective, optimizer: optax.GradientTransformation, params: base.Params
) -> TrainState:
  """Returns the state before the first step, with these parameters."""
  statistics = objective.initial_statistics()
  if 'average' in statistics:  # It is used if the first steps aren't applied.
    statistics = statistics | {'average': {name: params[name] for name in statistics['average']}}
  return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), statistics)


def with_optimizer_on_host(abstract: TrainState, mesh: jax.sharding.Mesh) -> TrainState:
  """Returns `abstract` with the optimizer's arrays in host memory.

  Raises:
    UserError: if the platform doesn't support it.
  """
  device = mesh.devices.flat[0]
  if _HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise errors.UserError(
      f"train.offload_optimizer: a {device.device_kind} can't use its "
      "host's memory; set it to False"
    )

  def on_host(leaf):
    if not leaf.shape:  # The step counters, which the next step needs at once.
      return leaf
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(_HOST)
    )

  return abstract.replace(optimizer_state=jax.tree.map(on_host, abstract.optimizer_state))


def to_device(tree: _Tree) -> _Tree:
  """Moves arrays in host memory to device memory, inside a jit."""

  def move(leaf):
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
      return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf

  return jax.tree.map(move, tree)

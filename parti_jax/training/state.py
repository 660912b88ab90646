"""What a run carries from step to step, created already sharded."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.core import errors
from parti_jax.core import numerics
from parti_jax.partitioning import rules as partitioning_rules
from parti_jax.training.objectives import base

# JAX's name of the hosts' memory that devices can read.
_HOST = 'pinned_host'


@flax.struct.dataclass
class TrainState:
  """State of a run.

  Attributes:
    step: int32 [], steps done.
    params: the model's parameters, float32.
    optimizer_state: of the optax transformation.
    statistics: a dict of what an objective carries besides parameters, such as the use of codes. What it
      has under 'average', {name of a part: that part's average over steps}, is what is evaluated,
      drawn with and exported.
  """

  step: jax.Array
  params: Any
  optimizer_state: Any
  statistics: Any


def averaged(state: TrainState):
  """The parameters to evaluate and to draw with: averages, where the objective keeps some."""
  return state.params | state.statistics.get('average', {})


def with_parts(state: TrainState, parts) -> TrainState:
  """A state before the first step, with parts of its parameters, and of their average, replaced.

  Args:
    state: of `create_state`.
    parts: {name of a part: its parameters on the mesh}.
  """
  statistics, average = state.statistics, state.statistics.get('average', {})
  # Copies, since a step takes the buffers of both.
  replaced = {name: jax.tree.map(jnp.copy, parts[name]) for name in average if name in parts}
  if replaced:
    statistics = statistics | {'average': average | replaced}
  return state.replace(params=state.params | parts, statistics=statistics)


def update_average(average, params, step, decay: float):
  """The exponential moving average of parameters after a step.

  Args:
    average: before it.
    params: after it, of the same structure.
    step: int32 [], steps done before this one.
    decay: share of the average that stays; less in the first steps, step / (step + 10), so that it
      soon forgets the random beginning.

  Returns:
    As `average`. What does not move stays in it bit for bit.
  """
  decay = jnp.minimum(decay, step / (step + 10.0))
  moved = lambda old, new: old + (1.0 - decay) * (new - old)
  return jax.tree.map(lambda old, new: jnp.where(step == 0, new, moved(old, new)), average, params)


def abstract_state(
  objective: base.Objective, optimizer: optax.GradientTransformation, mesh, rules
) -> TrainState:
  """Shapes and shardings of a run's state, with nothing computed.

  Args:
    objective: what is trained.
    optimizer: an optax transformation.
    mesh: the device mesh.
    rules: logical axis rules.

  Returns:
    A TrainState of jax.ShapeDtypeStruct, each with its NamedSharding.

  Raises:
    UserError: if the mesh does not divide a parameter.
  """
  boxed = jax.eval_shape(objective.init, numerics.key(0))
  shardings = partitioning_rules.parameter_shardings(boxed, mesh, rules)
  params = nn.meta.unbox(boxed)
  optimizer_state = jax.eval_shape(optimizer.init, params)
  replicated = NamedSharding(mesh, PartitionSpec())
  state = TrainState(
    jax.ShapeDtypeStruct((), jnp.int32),
    params,
    optimizer_state,
    jax.eval_shape(objective.initial_statistics),
  )
  state_shardings = TrainState(
    replicated,
    shardings,
    partitioning_rules.optimizer_shardings(optimizer_state, params, shardings, mesh),
    partitioning_rules.optimizer_shardings(state.statistics, params, shardings, mesh),
  )
  return jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    state,
    state_shardings,
  )


def num_bytes(state) -> int:
  """Bytes of a state's arrays, over all devices."""
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def create_state(
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  abstract: TrainState,
  mesh,
  rules,
) -> TrainState:
  """The state before the first step; no device ever holds a whole parameter that is split.

  Args:
    objective: what is trained.
    optimizer: an optax transformation.
    seed: of the initial parameters.
    abstract: of `abstract_state`.
    mesh: the device mesh.
    rules: logical axis rules.
  """

  def create():
    params = nn.meta.unbox(objective.init(numerics.key(seed)))
    statistics = objective.initial_statistics()
    if 'average' in statistics:  # It is used where the first steps could not be applied.
      statistics = statistics | {'average': {name: params[name] for name in statistics['average']}}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), statistics)

  with partitioning_rules.partitioned(mesh, rules):
    return jax.jit(create, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, abstract))()


def with_optimizer_on_host(abstract: TrainState, mesh) -> TrainState:
  """`abstract` with the optimiser's arrays in the memory of the devices' hosts.

  Raises:
    UserError: if the platform has no such memory.
  """
  device = mesh.devices.flat[0]
  if _HOST not in {memory.kind for memory in device.addressable_memories()}:
    raise errors.UserError(
      f'train.offload_optimizer: a {device.device_kind} can not use its '
      "host's memory; set it to False"
    )

  def on_host(leaf):
    if not leaf.shape:  # Counters are used at once.
      return leaf
    return jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=leaf.sharding.with_memory_kind(_HOST)
    )

  return abstract.replace(optimizer_state=jax.tree.map(on_host, abstract.optimizer_state))


def to_device(tree):
  """Inside a jit: arrays that lie in the hosts' memory, moved to that of the devices."""

  def move(leaf):
    if jax.typeof(leaf).memory_space == jax.memory.Space.Host:
      return jax.device_put(leaf, jax.memory.Space.Device)
    return leaf

  return jax.tree.map(move, tree)

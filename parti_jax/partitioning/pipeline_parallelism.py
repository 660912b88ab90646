"""Pipeline parallelism: stages of the mesh hold the layers, and microbatches circulate over them.

This is the circular schedule of Parti's 20B model (Parti, section 3; GSPMD, arXiv 2105.04663,
section 3.3). Stage s holds the layers s, s + stages, s + 2 · stages ... (in units of
`layers_per_visit`), and a microbatch visits all stages once for each unit that a stage holds. A
group of as many microbatches as there are stages circulates together, so that none ever waits, and
the next group follows immediately. The bubble of stages - 1 ticks occurs only once.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any
from typing import NamedTuple

import gin
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PyTree
from jaxtyping import Shaped

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Checkpoint name, for remat policies, of the parameters that a visit slices from its stage's.
VISIT_PARAMETERS = 'visit_parameters'
_off = contextvars.ContextVar('pipeline_off', default=False)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The settings of a pipeline that don't change results.

  Attributes:
    groups: number of groups of as many microbatches as there are stages. More groups make both the
      bubble and the microbatches smaller. If they don't divide the batch, the greatest common
      divisor is used.
    layers_per_visit: number of layers that a microbatch passes before it moves to the next stage.
      Fewer layers make the bubble smaller and cost more communication.
  """

  groups: int = 1
  layers_per_visit: int = 1


@gin.configurable('pipeline')
@checks.bounded(groups=(1, None), layers_per_visit=(1, None))
def configured(groups: int = 1, layers_per_visit: int = 1) -> Settings:
  """Returns the settings configured with gin."""
  return Settings(groups, layers_per_visit)


_settings: contextvars.ContextVar[Settings | None] = contextvars.ContextVar(
  'pipeline_settings', default=None
)


@contextlib.contextmanager
def use(settings: Settings) -> Iterator[None]:
  """Makes pipelines use these settings while the body runs."""
  token = _settings.set(settings)
  try:
    yield
  finally:
    _settings.reset(token)


class Work(NamedTuple):
  """What a stage computes at a tick; each field is an int or bool, or an array.

  Attributes:
    busy: whether the stage computes anything. If not, the other fields have no meaning.
    group: the group of its microbatch.
    place: index of the microbatch in the group.
    visit: how often the microbatch has been to this stage before.
  """

  busy: Any
  group: Any
  place: Any
  visit: Any


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The schedule of a pipeline: what each stage computes at each tick.

  Attributes:
    stages: number of stages.
    groups: number of groups of `stages` microbatches, which follow each other.
    visits: how often a microbatch comes to each stage.
    layers_per_visit: number of layers that it passes at each visit.
  """

  stages: int
  groups: int
  visits: int
  layers_per_visit: int

  @property
  def microbatches(self) -> int:
    return self.groups * self.stages

  @property
  def period(self) -> int:
    """Number of ticks from the start of a group to the start of the next one."""
    return self.stages * self.visits

  @property
  def ticks(self) -> int:
    """Number of loop iterations; in each, a stage computes one visit or waits."""
    return self.microbatches * self.visits + self.stages - 1

  @property
  def bubble(self) -> float:
    """Fraction of the ticks in which a stage is idle."""
    return (self.stages - 1) / self.ticks

  def work(self, stage: Any, tick: Any) -> Work:
    """Returns what a stage computes at a tick.

    Args:
      stage: index of the stage, an int or an int32 array.
      tick: the tick, an int or an int32 array.
    """
    since = tick - stage
    busy = (since >= 0) & (since < self.microbatches * self.visits)
    group, rest = since // self.period, since % self.period
    return Work(busy, group, rest % self.stages, rest // self.stages)


@contextlib.contextmanager
def off() -> Iterator[None]:
  """Turns pipeline parallelism off in the body: each stage computes all layers.

  Frozen models need it, whose number of layers the stages may not divide.
  """
  token = _off.set(True)
  try:
    yield
  finally:
    _off.reset(token)


def schedule(layers: int, batch: int) -> Schedule | None:
  """Returns the schedule of a stack of layers for the current mesh and settings.

  Args:
    layers: number of layers.
    batch: examples in the batch.

  Returns:
    A Schedule. None without stages, inside `off`, and for a batch that can't be divided among the
    devices, such as a few pictures: then each stage computes all layers.

  Raises:
    UserError: if the layers can't be divided evenly among the stages.
  """
  mesh = mesh_lib.current()
  if mesh is None or _off.get():
    return None
  stages = mesh.shape.get('stage', 1)
  if stages == 1:
    return None
  settings = _settings.get() or Settings()
  layers_per_visit = settings.layers_per_visit
  if layers % (stages * layers_per_visit):
    raise errors.UserError(
      f"{layers} layers can't be divided among make_mesh.stage={stages} stages in units of "
      f'pipeline.layers_per_visit={layers_per_visit}; choose numbers whose product divides them'
    )
  ways = math.prod(mesh.shape[axis] for axis in ('stage', 'data', 'fsdp'))
  if batch % ways:
    return None
  groups = math.gcd(settings.groups, batch // ways)
  return Schedule(stages, groups, layers // (stages * layers_per_visit), layers_per_visit)


def run(
  layer: Callable[..., Array],
  remat: Callable[[Callable], Callable],
  stacked: PyTree[Float[Array, 'layers ...']],
  x: Float[Array, 'batch length embed'],
  side_inputs: PyTree[Shaped[Array, 'batch ...']],
  plan: Schedule,
) -> Float[Array, 'batch length embed']:
  """Runs a stack of layers as a pipeline; the result is the same as running them in sequence.

  Args:
    layer: (params, index, index_in_visit, x, *side_inputs) -> x, computes one layer: index, an
      int32 scalar, is its index among all layers, index_in_visit its index among those of the
      visit, an int.
    remat: wraps the function of a visit with a rematerialization policy. The policy must not save
      values named VISIT_PARAMETERS, which would copy parameters at each tick.
    stacked: parameters of all layers, in order, split over the stages.
    x: input of the first layer.
    side_inputs: a tuple of trees of arrays that accompany each microbatch.
    plan: the result of `schedule`.
  """

  def split(
    array: Shaped[Array, 'batch *places'],
  ) -> Shaped[Array, 'stages microbatch groups *places']:
    # In this order no example leaves its device.
    return array.reshape((plan.stages, -1, plan.groups) + array.shape[1:])

  stage_spec = PartitionSpec('stage')
  pipelined = jax.shard_map(
    lambda *arguments: _stage(layer, remat, plan, *arguments),
    in_specs=stage_spec,
    out_specs=stage_spec,
    axis_names={'stage'},
    check_vma=False,
  )
  out = pipelined(jnp.arange(plan.stages), stacked, split(x), jax.tree.map(split, side_inputs))
  return out.reshape(x.shape)


class _Microbatch(NamedTuple):
  """A microbatch on one stage: the input of its next layer, and its side inputs."""

  x: Float[Array, 'microbatch length embed']
  side: PyTree[Shaped[Array, 'microbatch ...']]


class _Carry(NamedTuple):
  """What a stage carries from tick to tick.

  Attributes:
    ring: what is in this stage's slot of the ring.
    state: what this stage computes next.
    results: outputs of the microbatches whose slot is on this stage.
  """

  ring: _Microbatch
  state: _Microbatch
  results: Float[Array, 'microbatch groups length embed']


# The ticks of two groups, a and b, on two stages with two visits. a0 and a1 are the inputs of the
# group's microbatches, A0 and A1 their outputs, and '.' is what nobody uses. Stage 0 has the units
# of layers 0 and 2, stage 1 the units 1 and 3.
#
#   tick  group  phase  ring at start    ring after the   stage 0    stage 1
#                       of the group     exchange         computes   computes
#   0     0      0      a0  a1           a1  .            a0 in 0    .
#   1     0      1                       .   .            a1 in 0    a0 in 1
#   2     0      2                       .   .            a0 in 2    a1 in 1
#   3     0      3                       .   .            a1 in 2    a0 in 3
#   4     1      0      b0  b1           b1  A0           b0 in 0    a1 in 3
#   5     1      1                       A0  A1           b1 in 0    b0 in 1
#   6     1      2                       A0  A1           b0 in 2    b1 in 1
#   7     1      3                       A0  A1           b1 in 2    b0 in 3
#   8     2      0      .   .            .   B0           .          b1 in 3
#   end                                  B0  B1
#
# The outputs of a come into the ring while b starts, and leave it when the group after b starts, at
# tick 8. So when a group starts, the ring holds the outputs of the group two before it. B1 leaves
# the last stage at the last tick. It comes into the ring by one more exchange after the loop, which
# needs no tick of its own because nothing is left to compute.
def _stage(
  layer: Callable[..., Array],
  remat: Callable[[Callable], Callable],
  plan: Schedule,
  stages: Int[Array, '1'],
  stacked: PyTree[Float[Array, 'layers ...']],
  inputs: Float[Array, '1 microbatch groups length embed'],
  side_inputs: PyTree[Shaped[Array, '1 microbatch groups ...']],
) -> Float[Array, '1 microbatch groups length embed']:
  """Computes one stage; the arrays are its shards.

  The ring has a slot for one microbatch on each stage. When a group starts, it is filled with the
  group's inputs. At the group's first ticks, as many as there are stages, stage 0 takes one of them
  and leaves in its place an output of the previous group (`_exchange`). Then each output is in the
  slot that its input came from. The table above shows it.
  """
  stage = stages[0]
  x, side = jax.tree.map(lambda array: array[0], (inputs, side_inputs))
  units = circular_order(stacked, stage, plan)  # [visits, layers_per_visit, ...]

  @remat
  def compute(units, visit, state_x, state_side):
    """Computes the layers of a visit; returns the microbatch's new x."""
    for index_in_visit in range(plan.layers_per_visit):
      params = jax.tree.map(
        lambda leaf, index_in_visit=index_in_visit: leaf[visit, index_in_visit], units
      )
      params = checkpoint_name(params, VISIT_PARAMETERS)
      index = (visit * plan.stages + stage) * plan.layers_per_visit + index_in_visit
      state_x = layer(params, index, index_in_visit, state_x, *state_side)
    return state_x

  def tick(carry, time):
    ring, state, results = carry
    group, phase = time // plan.period, time % plan.period
    start = functools.partial(_start_group, plan, x, side, group)
    ring, results = jax.lax.cond(phase == 0, start, _unchanged, ring, results)
    exchange = functools.partial(_exchange, plan, stage)
    ring, state = jax.lax.cond(phase < plan.stages, exchange, _unchanged, ring, state)
    state = state._replace(x=compute(units, plan.work(stage, time).visit, state.x, state.side))
    return _Carry(ring, _to_next_stage(plan, state), results), None

  empty = jax.tree.map(jnp.zeros_like, _microbatch(x, side, 0))
  with rules_lib.one_stage():
    carry, _ = jax.lax.scan(tick, _Carry(empty, empty, jnp.zeros_like(x)), jnp.arange(plan.ticks))
  # The last microbatch of the last group has left the last stage, but isn't yet in the ring.
  ring, _ = _exchange(plan, stage, carry.ring, carry.state)
  return carry.results.at[:, -1].set(ring.x)[None]


def _microbatch(
  x: Float[Array, 'microbatch groups length embed'],
  side: PyTree[Shaped[Array, 'microbatch groups ...']],
  group: Int[Array, ''] | int,
) -> _Microbatch:
  """Returns this stage's microbatch of a group."""
  take = lambda array: jax.lax.dynamic_index_in_dim(array, group, 1, keepdims=False)
  return _Microbatch(*jax.tree.map(take, (x, side)))


def _start_group(
  plan: Schedule,
  x: Float[Array, 'microbatch groups length embed'],
  side: PyTree[Shaped[Array, 'microbatch groups ...']],
  group: Int[Array, ''],
  ring: _Microbatch,
  results: Float[Array, 'microbatch groups length embed'],
) -> tuple[_Microbatch, Float[Array, 'microbatch groups length embed']]:
  """Stores the outputs in the ring, and fills it with the inputs of a group that starts.

  After the last group another one starts, whose inputs and outputs nobody uses.

  Args:
    plan: the result of `schedule`.
    x: inputs of all groups.
    side: side inputs of all groups.
    group: the group that starts. The ring holds outputs of group - 2, if there is one.
    ring: this stage's slot of the ring.
    results: a field of _Carry.

  Returns:
    The new `ring` and `results`.
  """
  stored = jax.lax.dynamic_update_index_in_dim(results, ring.x, jnp.maximum(group - 2, 0), 1)
  coming = _microbatch(x, side, jnp.minimum(group, plan.groups - 1))
  return coming, jnp.where(group >= 2, stored, results)


def _exchange(
  plan: Schedule, stage: Int[Array, ''], ring: _Microbatch, state: _Microbatch
) -> tuple[_Microbatch, _Microbatch]:
  """Swaps, on stage 0, the ring's input for the output that has just left the last stage.

  Then the ring moves back by one slot, so that stage 0 has the next input. After as many exchanges
  as there are stages it has gone around once.

  Args:
    plan: the result of `schedule`.
    stage: index of this stage.
    ring: this stage's slot of the ring.
    state: a field of _Carry.

  Returns:
    The new `ring` and `state`.
  """
  first = lambda a, b: jnp.where(stage == 0, a, b)
  taken = _Microbatch(first(ring.x, state.x), jax.tree.map(first, ring.side, state.side))
  # Nobody uses side inputs of outputs, so those of the ring may stay.
  left = _Microbatch(first(state.x, ring.x), ring.side)
  back = [((slot + 1) % plan.stages, slot) for slot in range(plan.stages)]
  return _send(left, back), taken


def _to_next_stage(plan: Schedule, state: _Microbatch) -> _Microbatch:
  """Sends each stage's microbatch to the next one, and that of the last stage to stage 0."""
  return _send(state, [(slot, (slot + 1) % plan.stages) for slot in range(plan.stages)])


def _send(tree: PyTree[Array], pairs: list[tuple[int, int]]) -> PyTree[Array]:
  """Sends arrays to other stages, given pairs of senders and receivers."""
  return jax.tree.map(lambda array: jax.lax.ppermute(array, 'stage', pairs), tree)


def _unchanged(*arguments):
  return arguments


def circular_order(
  stacked: PyTree[Float[Array, 'layers ...']], stage: Int[Array, ''], plan: Schedule
) -> PyTree[Float[Array, 'visits layers_per_visit ...']]:
  """Exchanges layers between stages, from sequential order to that of the circular schedule.

  A stage's shard of the parameters has neighboring layers, but the stage needs every `stages`-th
  unit. In each round each stage sends one unit to another stage, so that no stage ever holds more
  than twice its shard.

  Args:
    stacked: this stage's shard of the parameters.
    stage: index of this stage.
    plan: the result of `schedule`.

  Returns:
    The parameters that this stage needs; the entry of a visit is the unit visit · stages + stage.
  """
  rounds = transfers(plan.stages, plan.visits)
  # For each round and stage: the unit that leaves the stage, as an index into the stage's units.
  leaving = jnp.array([[unit % plan.visits for unit in units] for units in rounds])
  # For each stage and visit: the round in which its unit arrives.
  arrivals = [[0] * plan.visits for _ in range(plan.stages)]
  for number, units in enumerate(rounds):
    for unit in units:
      arrivals[unit % plan.stages][unit // plan.stages] = number
  coming = jnp.array(arrivals)

  def reorder(leaf):
    leaf = leaf.reshape((plan.visits, plan.layers_per_visit) + leaf.shape[1:])
    got = []
    for number, units in enumerate(rounds):
      pairs = [(source, unit % plan.stages) for source, unit in enumerate(units)]
      got.append(jax.lax.ppermute(leaf[leaving[number, stage]], 'stage', pairs))
    return jnp.stack(got)[coming[stage]]

  return jax.tree.map(reorder, stacked)


def transfers(stages: int, visits: int) -> list[list[int]]:
  """Returns rounds in each of which each stage sends one unit and receives one.

  Args:
    stages: number of stages.
    visits: number of units on each stage; stage s has the units s · visits ... s · visits +
      visits - 1, and needs s, s + stages, s + 2 · stages ...

  Returns:
    `visits` lists with, for each stage, the unit that it sends in that round.
  """
  left = [set(range(stage * visits, (stage + 1) * visits)) for stage in range(stages)]
  rounds = []
  for _ in range(visits):
    received: dict[int, int] = {}  # Receiving stage -> unit.

    def assign(stage, tried, received=received):
      """Finds a unit for `stage` to send, changing the other stages' choices if needed."""
      for unit in sorted(left[stage]):
        receiver = unit % stages
        if receiver not in tried:
          tried.add(receiver)
          if receiver not in received or assign(received[receiver] // visits, tried):
            received[receiver] = unit
            return True
      return False

    for stage in range(stages):
      # A matching exists, because all stages send and receive equally many units.
      assert assign(stage, set())
    chosen = {unit // visits: unit for unit in received.values()}
    rounds.append([chosen[stage] for stage in range(stages)])
    for stage, unit in chosen.items():
      left[stage].remove(unit)
  return rounds

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
import math
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

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
  def ticks(self) -> int:
    """Number of loop iterations; in each, a stage computes one visit or waits."""
    return self.microbatches * self.visits + self.stages - 1

  @property
  def bubble(self) -> float:
    """Fraction of the ticks in which a stage is idle."""
    return (self.stages - 1) / self.ticks

  def work(self, stage: Any, tick: Any) -> tuple[Any, Any, Any, Any]:
    """Returns what a stage computes at a tick.

    Args:
      stage: index of the stage, an int or an int32 array.
      tick: the tick, an int or an int32 array.

    Returns:
      Whether the stage computes anything, the group of its microbatch, the index of the microbatch
      in the group, and the number of the visit.
    """
    since = tick - stage
    busy = (since >= 0) & (since < self.microbatches * self.visits)
    group, rest = since // (self.stages * self.visits), since % (self.stages * self.visits)
    return busy, group, rest % self.stages, rest // self.stages


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
    layer: (params, index, number, x, *side_inputs) -> x, computes one layer: index, an int32
      scalar, is its index among all layers, number its index among the layers of the visit.
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

  `ring` holds one microbatch on each stage. While a group starts, stage 0 takes the microbatch
  out of its slot of the ring and replaces it with one of the previous group, which has just left
  the last stage; then the ring moves on by one slot. After as many ticks as there are stages,
  each microbatch has visited stage 0 once and has returned, finished, to its original slot.

  `ring` and `state` are pairs of x [microbatch, length, embed] and side inputs [microbatch, ...]:
  `state` is what this stage computes next. `out` collects results, [microbatch, groups, length,
  embed].
  """
  stage = stages[0]
  x, side = jax.tree.map(lambda array: array[0], (inputs, side_inputs))
  units = circular_order(stacked, stage, plan)  # [visits, layers_per_visit, ...]
  onward = [(slot, (slot + 1) % plan.stages) for slot in range(plan.stages)]
  back = [(end, start) for start, end in onward]
  period = plan.stages * plan.visits

  def microbatch(group):
    """Returns this stage's microbatch of a group, a pair like `ring`."""
    take = lambda array: jax.lax.dynamic_index_in_dim(array, group, 1, keepdims=False)
    return jax.tree.map(take, (x, side))

  def move(tree, way):
    """Sends arrays to other stages, given pairs of senders and receivers."""
    return jax.tree.map(lambda array: jax.lax.ppermute(array, 'stage', way), tree)

  def exchange(ring, state):
    """Swaps, on stage 0, the ring's microbatch for the one that has left the last stage."""
    (ring_x, ring_side), (state_x, state_side) = ring, state
    first = lambda a, b: jnp.where(stage == 0, a, b)
    taken = first(ring_x, state_x), jax.tree.map(first, ring_side, state_side)
    return move((first(state_x, ring_x), ring_side), back), taken

  @remat
  def visit(units, number, state_x, state_side):
    for layer_number in range(plan.layers_per_visit):
      params = jax.tree.map(
        lambda leaf, layer_number=layer_number: leaf[number, layer_number], units
      )
      params = checkpoint_name(params, VISIT_PARAMETERS)
      index = (number * plan.stages + stage) * plan.layers_per_visit + layer_number
      state_x = layer(params, index, layer_number, state_x, *state_side)
    return state_x

  def tick(carry, time):
    ring, state, out = carry
    group, phase = time // period, time % period

    def next_group(ring, out):
      """Stores the finished group of the ring, and fills the ring with the coming group."""
      done = jax.lax.dynamic_update_index_in_dim(out, ring[0], jnp.maximum(group - 2, 0), 1)
      coming = microbatch(jnp.minimum(group, plan.groups - 1))
      return coming, jnp.where(group >= 2, done, out)

    ring, out = jax.lax.cond(phase == 0, next_group, lambda *same: same, ring, out)
    ring, state = jax.lax.cond(phase < plan.stages, exchange, lambda *same: same, ring, state)
    number = plan.work(stage, time)[3]
    state = visit(units, number, *state), state[1]
    return (ring, move(state, onward), out), None

  empty = jax.tree.map(jnp.zeros_like, microbatch(0))
  with rules_lib.one_stage():
    (ring, state, out), _ = jax.lax.scan(
      tick, (empty, empty, jnp.zeros_like(x)), jnp.arange(plan.ticks)
    )
  # The last group's last microbatch leaves the ring one tick after the last layer.
  ring, _ = exchange(ring, state)
  return out.at[:, -1].set(ring[0])[None]


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

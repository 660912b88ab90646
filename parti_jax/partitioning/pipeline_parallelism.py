"""Pipeline parallelism: layers on stages of the mesh, microbatches that go round them.

The circular schedule of Parti's 20B model (Parti, section 3; GSPMD, arXiv 2105.04663, section
3.3): stage s holds the layers s, s + stages, s + 2 · stages ... (in units of `layers_per_visit`),
and a microbatch goes round all stages as often as there are such units on each. As many
microbatches as there are stages go round together, so that none ever waits; the next such group
follows at once. The bubble, (stages - 1) of the ticks, is that of one round, not of all of them.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator

import gin
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# Name of the parameters that a visit takes out of those of its stage, for remat policies.
VISIT_PARAMETERS = 'visit_parameters'
_off = contextvars.ContextVar('pipeline_off', default=False)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a pipeline may choose.

  Attributes:
    groups: groups of as many microbatches as there are stages; more of them make the bubble
      smaller, and microbatches too. Where they do not divide the batch, the most that do.
    layers_per_visit: layers that a microbatch passes before it moves to the next stage; fewer
      make the bubble smaller, and cost more communication.
  """

  groups: int = 1
  layers_per_visit: int = 1


@gin.configurable('pipeline')
@checks.bounded(groups=(1, None), layers_per_visit=(1, None))
def configured(groups: int = 1, layers_per_visit: int = 1) -> Settings:
  """The settings that gin has; see `Settings`."""
  return Settings(groups, layers_per_visit)


_settings = contextvars.ContextVar('pipeline_settings', default=None)


@contextlib.contextmanager
def use(settings: Settings) -> Iterator[None]:
  """A context in which pipelines have these settings."""
  token = _settings.set(settings)
  try:
    yield
  finally:
    _settings.reset(token)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Which stage computes what, and when.

  Attributes:
    stages: number of stages.
    groups: groups of `stages` microbatches, one after the other.
    visits: how often a microbatch comes to each stage.
    layers_per_visit: layers that it passes there each time.
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
    """Turns of the loop; in each, every stage computes one visit or waits."""
    return self.microbatches * self.visits + self.stages - 1

  @property
  def bubble(self) -> float:
    """Share of the ticks in which a stage has nothing to do."""
    return (self.stages - 1) / self.ticks

  def work(self, stage, tick):
    """What a stage computes at a tick; works on numbers and on arrays.

    Returns:
      Whether it computes anything, the microbatch's group, its place in the group, the visit.
    """
    since = tick - stage
    busy = (since >= 0) & (since < self.microbatches * self.visits)
    group, rest = since // (self.stages * self.visits), since % (self.stages * self.visits)
    return busy, group, rest % self.stages, rest // self.stages


@contextlib.contextmanager
def off() -> Iterator[None]:
  """Inside it every stage computes all layers, as of a frozen model, whose layers may not divide."""
  token = _off.set(True)
  try:
    yield
  finally:
    _off.reset(token)


def schedule(layers: int, batch: int) -> Schedule | None:
  """The schedule of a stack of layers on the mesh in use, with the settings in use.

  Args:
    layers: number of layers.
    batch: examples in the batch.

  Returns:
    A Schedule; None without stages, inside `off`, and for a batch that does not divide among the
    devices, such as a few pictures: then every stage computes all layers.

  Raises:
    UserError: if the layers do not divide among the stages.
  """
  mesh = mesh_lib.current()
  stages = 1 if mesh is None else mesh.shape.get('stage', 1)
  if stages == 1 or _off.get():
    return None
  settings = _settings.get() or Settings()
  layers_per_visit = settings.layers_per_visit
  if layers % (stages * layers_per_visit):
    raise errors.UserError(
      f'{layers} layers do not divide among make_mesh.stage={stages} stages in units of '
      f'pipeline.layers_per_visit={layers_per_visit}; choose numbers whose product divides them'
    )
  ways = math.prod(mesh.shape[axis] for axis in ('stage', 'data', 'fsdp'))
  if batch % ways:
    return None
  groups = math.gcd(settings.groups, batch // ways)
  return Schedule(stages, groups, layers // (stages * layers_per_visit), layers_per_visit)


def run(layer, remat, stacked, x, beside, plan: Schedule):
  """Runs a stack of layers as a pipeline; same result as running them one after the other.

  Args:
    layer: (params, index, number, x, *beside) -> x, of one layer: the index int32 [] among all,
      the number among those of its visit.
    remat: wraps the function of a visit so that its backward pass keeps what a policy says. It
      must not keep what is named VISIT_PARAMETERS: that would copy parameters at every tick.
    stacked: parameters with a leading axis of layers, in their order, split over the stages.
    x: [batch, length, embed].
    beside: a tree of arrays [batch, ...] that goes with each microbatch.
    plan: of `schedule`.

  Returns:
    As x.
  """

  def split(array):
    """[batch, ...] -> [stages, microbatch, groups, ...]; no example leaves its device."""
    return array.reshape((plan.stages, -1, plan.groups) + array.shape[1:])

  stage_spec = PartitionSpec('stage')
  pipelined = jax.shard_map(
    lambda *arguments: _stage(layer, remat, plan, *arguments),
    in_specs=stage_spec,
    out_specs=stage_spec,
    axis_names={'stage'},
    check_vma=False,
  )
  out = pipelined(jnp.arange(plan.stages), stacked, split(x), jax.tree.map(split, beside))
  return out.reshape(x.shape)


def _stage(layer, remat, plan: Schedule, stage, stacked, x, beside):
  """What one stage does; all arguments are its own parts, with a leading axis of size 1.

  `ring` holds one microbatch on each stage. While a group starts, stage 0 takes the microbatch
  out of its place in the ring and puts there one of the group before, which has just come out of
  the last stage; then the ring moves on by one place. After as many ticks as there are stages
  every microbatch has come to stage 0 once, and is back where it was, finished.
  """
  stage = stage[0]
  x, beside = jax.tree.map(lambda array: array[0], (x, beside))
  units = circular_order(stacked, stage, plan)
  take = lambda tree, group: jax.tree.map(
    lambda array: jax.lax.dynamic_index_in_dim(array, group, 1, keepdims=False), tree
  )
  onward = [(place, (place + 1) % plan.stages) for place in range(plan.stages)]
  back = [(end, start) for start, end in onward]
  move = lambda tree, way: jax.tree.map(lambda a: jax.lax.ppermute(a, 'stage', way), tree)
  period = plan.stages * plan.visits

  def exchange(ring, state):
    """Stage 0 takes the ring's microbatch and gives it what has come out of the last stage."""
    (ring_x, ring_beside), (state_x, state_beside) = ring, state
    first = lambda a, b: jnp.where(stage == 0, a, b)
    taken = first(ring_x, state_x), jax.tree.map(first, ring_beside, state_beside)
    return move((first(state_x, ring_x), ring_beside), back), taken

  @remat
  def visit(units, number, state_x, state_beside):
    for place in range(plan.layers_per_visit):
      params = jax.tree.map(lambda leaf, place=place: leaf[number, place], units)
      params = checkpoint_name(params, VISIT_PARAMETERS)
      index = (number * plan.stages + stage) * plan.layers_per_visit + place
      state_x = layer(params, index, place, state_x, *state_beside)
    return state_x

  def tick(carry, time):
    ring, state, out = carry
    group, phase = time // period, time % period

    def next_group(ring, out):
      done = jax.lax.dynamic_update_index_in_dim(out, ring[0], jnp.maximum(group - 2, 0), 1)
      coming = take((x, beside), jnp.minimum(group, plan.groups - 1))
      return coming, jnp.where(group >= 2, done, out)

    ring, out = jax.lax.cond(phase == 0, next_group, lambda *same: same, ring, out)
    ring, state = jax.lax.cond(phase < plan.stages, exchange, lambda *same: same, ring, state)
    number = plan.work(stage, time)[3]
    state = visit(units, number, *state), state[1]
    return (ring, move(state, onward), out), None

  empty = jax.tree.map(jnp.zeros_like, take((x, beside), 0))
  with rules_lib.one_stage():
    (ring, state, out), _ = jax.lax.scan(
      tick, (empty, empty, jnp.zeros_like(x)), jnp.arange(plan.ticks)
    )
  # The last group's last microbatch leaves the ring one tick after the last layer.
  ring, _ = exchange(ring, state)
  return out.at[:, -1].set(ring[0])[None]


def circular_order(stacked, stage, plan: Schedule):
  """Hands layers over between stages: from their order to that of the circular schedule.

  A stage's part of the parameters are neighbouring layers; it needs every `stages`-th unit. One
  unit a round goes from each stage to another, so that nobody holds more than its part twice.

  Args:
    stacked: this stage's part of the parameters, [layers / stages, ...] each.
    stage: int32 [], which stage this is.
    plan: of `schedule`.

  Returns:
    The same parameters, [visits, layers_per_visit, ...] each: unit visit · stages + stage.
  """
  rounds = transfers(plan.stages, plan.visits)
  # For each round and stage: the unit, by its place among the stage's own, that leaves it.
  leaving = jnp.array([[unit % plan.visits for unit in units] for units in rounds])
  # For each stage and visit: the round in which its unit comes.
  coming = [[0] * plan.visits for _ in range(plan.stages)]
  for number, units in enumerate(rounds):
    for unit in units:
      coming[unit % plan.stages][unit // plan.stages] = number
  coming = jnp.array(coming)

  def reorder(leaf):
    leaf = leaf.reshape((plan.visits, plan.layers_per_visit) + leaf.shape[1:])
    got = []
    for number, units in enumerate(rounds):
      pairs = [(source, unit % plan.stages) for source, unit in enumerate(units)]
      got.append(jax.lax.ppermute(leaf[leaving[number, stage]], 'stage', pairs))
    return jnp.stack(got)[coming[stage]]

  return jax.tree.map(reorder, stacked)


def transfers(stages: int, visits: int) -> list[list[int]]:
  """Rounds in which every stage gives away one unit and gets one.

  Args:
    stages: number of stages.
    visits: units on each stage; stage s has the units s · visits ... s · visits + visits - 1, and
      needs s, s + stages, s + 2 · stages ...

  Returns:
    `visits` lists with, for each stage, the unit that it gives away in that round.
  """
  left = [set(range(stage * visits, (stage + 1) * visits)) for stage in range(stages)]
  rounds = []
  for _ in range(visits):
    giver: dict[int, int] = {}  # Stage that gets -> unit that it gets.

    def place(stage, tried, giver=giver):
      """Finds a unit for `stage` to give away, moving others' choices if need be."""
      for unit in sorted(left[stage]):
        receiver = unit % stages
        if receiver not in tried:
          tried.add(receiver)
          if receiver not in giver or place(giver[receiver] // visits, tried):
            giver[receiver] = unit
            return True
      return False

    for stage in range(stages):
      assert place(stage, set())  # Every stage gives and gets equally many: there is a matching.
    chosen = {unit // visits: unit for unit in giver.values()}
    rounds.append([chosen[stage] for stage in range(stages)])
    for stage, unit in chosen.items():
      left[stage].remove(unit)
  return rounds

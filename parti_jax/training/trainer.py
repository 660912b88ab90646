"""The jitted steps of an objective on a mesh; they know no data, so that planning can use them too."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec

from parti_jax.core import numerics
from parti_jax.models.nn import layers
from parti_jax.partitioning import local_rows
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.partitioning import rules as rules_lib
from parti_jax.training import config as config_lib
from parti_jax.training import skipped_steps as finite_lib
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import base


def make_train_step(
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  microbatches: int = 1,
) -> Callable[..., Any]:
  """The step of an objective, as a function of state and batch, not yet jitted.

  The keys of dropout and of whatever else is random follow from `seed` and the step alone, so
  that a resumed run draws what an uninterrupted one would.

  Where the loss or a gradient is not finite, all of the state but the step stays as it was, and the
  metric 'finite' is False. The optimisers' own counts, and with them the learning rate, stay too.
  """
  apart = objective.other_optimizers()

  def step(state: state_lib.TrainState, batch, constants):
    rng, after_rng = jax.random.split(jax.random.fold_in(numerics.key(seed), state.step))
    value, aux, gradients = _gradients(
      objective, state.params, constants, batch, rng, state.step, microbatches
    )
    before = state.replace(
      step=state.step + 1, optimizer_state=state_lib.to_device(state.optimizer_state)
    )
    updates, optimizer_state = optimizer.update(gradients, before.optimizer_state, state.params)
    # Momentum of earlier steps and weight decay must not move what is frozen either.
    params = {
      name: part if name in objective.frozen else optax.apply_updates(part, updates[name])
      for name, part in state.params.items()
    }
    params, statistics, metrics = objective.after_step(
      params, state.statistics, aux, state.step, after_rng
    )
    norms = {f'{name}_gradient_norm': optax.tree.norm(gradients.pop(name)) for name in apart}
    norms['gradient_norm'] = optax.tree.norm(gradients)
    finite = finite_lib.all_finite(value, norms.values())
    updated = state_lib.TrainState(before.step, params, optimizer_state, statistics)
    metrics = {'loss': value} | aux['metrics'] | metrics | norms | {'finite': finite}
    return finite_lib.select(finite, updated, before), metrics

  return step


def with_other_optimizers(objective: base.Objective, optimizer: optax.GradientTransformation):
  """An optimiser that leaves parts of the parameters to the objective's `other_optimizers`.

  Args:
    objective: what is trained.
    optimizer: of all other parts.

  Returns:
    An optax transformation; `optimizer` itself if the objective has no others.
  """
  others = objective.other_optimizers()
  if not others:
    return optimizer
  return optax.partition(
    {'main': optimizer, **others},
    lambda params: {name: name if name in others else 'main' for name in params},
  )


def _gradients(objective: base.Objective, params, constants, batch, rng, step, microbatches: int):
  """The loss, what the objective says besides, and gradients, of one microbatch after another.

  Microbatch k of n has the examples k, k + n, k + 2 · n ..., so that each device finds its part of
  every microbatch in its part of the batch. Gradients are summed in float32. All examples weigh
  what they would without microbatches; what a loss computes over several examples
  (`objective.over_examples`) it computes over those of a microbatch.
  """
  size = len(next(iter(batch.values())))
  whole = jnp.maximum(objective.weight(batch), 1.0)

  def loss(params, batch, keys):
    params = {
      name: jax.lax.stop_gradient(part) if name in objective.frozen else part
      for name, part in params.items()
    }
    value, aux = objective.loss(params | constants, batch, keys, step)
    share = objective.weight(batch) / whole
    metrics = {name: share * metric for name, metric in aux['metrics'].items()}
    return share * value, aux | {'metrics': metrics}

  with_gradients = jax.value_and_grad(loss, has_aux=True)
  keys = layers.dropout_keys(rng, size)
  if microbatches == 1:
    (value, aux), gradients = with_gradients(params, batch, keys)
    return value, aux, gradients

  def split(array):
    array = array.reshape((size // microbatches, microbatches) + array.shape[1:])
    return array.swapaxes(0, 1)

  def of_part(part):
    batch, rows = part
    (value, aux), gradients = with_gradients(params, batch, keys.replace(rows=rows))
    return (value, aux.pop('metrics'), gradients), aux

  def body(sums, part):
    found, aux = of_part(part)
    return jax.tree.map(jnp.add, sums, found), aux

  parts = jax.tree.map(split, (batch, keys.rows))
  shapes = jax.eval_shape(lambda: of_part(jax.tree.map(lambda part: part[0], parts)))[0]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  (value, metrics, gradients), others = jax.lax.scan(body, zeros, parts)
  return value, objective.merge(others) | {'metrics': metrics}, gradients


def compiler_options(mesh) -> dict[str, int]:
  """XLA's options for a step: on a CPU, vectors as wide as it has, where LLVM prefers 256 bits."""
  return {'xla_cpu_prefer_vector_width': 512} if mesh.devices.flat[0].platform == 'cpu' else {}


class Trainer:
  """An objective on a mesh: its state's shardings, and its steps compiled for them.

  Args:
    objective: what is trained, such as TokenizerObjective or GeneratorObjective.
    optimizer: an optax transformation, see `with_other_optimizers`.
    mesh: the device mesh.
    seed: of the initial parameters and of dropout.
    microbatches: parts of a batch whose gradients are computed one after the other and summed.
    offload_optimizer: whether the optimiser's state lies in the hosts' memory between steps.

  Raises:
    UserError: if the mesh does not divide a parameter, or its devices can't use their hosts'
      memory.
  """

  @numerics.fixed()
  def __init__(
    self,
    objective: base.Objective,
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
    seed: int = 0,
    microbatches: int = 1,
    offload_optimizer: bool = False,
  ):
    optimizer = with_other_optimizers(objective, optimizer)
    self.objective, self.optimizer, self.mesh, self.seed = objective, optimizer, mesh, seed
    self.microbatches = microbatches
    self.rules = rules_lib.logical_axis_rules()
    # Without stages gin's settings are not asked for, and not among those that a run keeps.
    self._pipeline = pipeline_parallelism.Settings()
    if mesh.shape.get('stage', 1) > 1:
      self._pipeline = pipeline_parallelism.configured()
    self.abstract = state_lib.abstract_state(objective, optimizer, mesh, self.rules)
    if offload_optimizer:
      self.abstract = state_lib.with_optimizer_on_host(self.abstract, mesh)
    self.shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
    self.batch_sharding = rules_lib.batch_sharding(mesh, self.rules)
    self._replicated = NamedSharding(mesh, PartitionSpec())
    self._step = jax.jit(
      make_train_step(objective, optimizer, seed, microbatches),
      donate_argnums=0,
      compiler_options=compiler_options(mesh),
      in_shardings=(self.shardings, self.batch_sharding, self._replicated),
      out_shardings=(self.shardings, None),
    )
    self._evaluate = jax.jit(
      lambda params, constants, batch: objective.evaluate(params | constants, batch),
      in_shardings=(self.shardings.params, self._replicated, self.batch_sharding),
      out_shardings=self._replicated,
    )

  @classmethod
  def of_config(cls, config: config_lib.TrainConfig, mesh: jax.sharding.Mesh) -> Trainer:
    """The trainer of a run with these settings."""
    return cls(
      config.objective,
      config.optimizer(config.schedule),
      mesh,
      config.seed,
      config.microbatches,
      config.offload_optimizer,
    )

  @functools.cached_property
  @numerics.fixed()
  def constants(self):
    """The objective's constants on the mesh; reads the files that they are in.

    Raises:
      UserError: if a file of them is missing or damaged.
    """
    return jax.tree.map(
      lambda leaf: jax.device_put(leaf, self._replicated), self.objective.constants()
    )

  @numerics.fixed()
  def create_state(self) -> state_lib.TrainState:
    """The state before the first step."""
    with pipeline_parallelism.use(self._pipeline):
      return state_lib.create_state(
        self.objective, self.optimizer, self.seed, self.abstract, self.mesh, self.rules
      )

  @numerics.fixed()
  def put(self, batch: dict[str, np.ndarray], batch_size: int | None = None):
    """A batch as global arrays on the mesh.

    Args:
      batch: the rows that this process holds, see `local_rows`.
      batch_size: rows of the global batch; None if `batch` is the whole of it.
    """
    return local_rows.global_arrays(
      self.batch_sharding, batch, batch_size or len(next(iter(batch.values())))
    )

  @numerics.fixed()
  def step(self, state, batch):
    """One update: the new state and scalar metrics; `state` is donated, `batch` of `put`."""
    with self._partitioned():
      return self._step(state, batch, self.constants)

  @numerics.fixed()
  def lower(self, batch_size: int):
    """The step that training runs, lowered for a batch of this size and not yet compiled."""
    batch, constants = (
      self.objective.abstract_batch(batch_size),
      self.objective.abstract_constants(),
    )
    with self._partitioned():
      return self._step.lower(self.abstract, batch, constants)

  @numerics.fixed()
  def evaluate(self, params, batches) -> dict[str, float]:
    """Means over all examples of `batches`; a short batch is padded, which does not count.

    Args:
      params: the parameters.
      batches: the same ones in every process, since all of them must take part in each step.

    Returns:
      What the objective makes of its measures; where some are not finite, also how many examples these
      are of, 'not_finite_examples'.
    """
    measures: dict[str, list[np.ndarray]] = {}
    size, ways = 0, rules_lib.batch_ways(self.mesh, self.rules)
    with self._partitioned():
      for batch in batches:
        count = len(next(iter(batch.values())))
        size = max(size, -(-count // ways) * ways)
        whole = self._put_whole(batch, size)
        for name, values in self._evaluate(params, self.constants, whole).items():
          measures.setdefault(name, []).append(np.asarray(values)[:count])
    whole = {name: np.concatenate(parts) for name, parts in measures.items()}
    # The objective's summary may hide them: NaN loses every comparison in a ranking, say.
    bad = finite_lib.bad_examples(whole)
    return self.objective.summarize(whole) | ({'not_finite_examples': float(bad)} if bad else {})

  @property
  def draws(self) -> bool:
    """Whether the objective draws pictures; reads the files that it draws with.

    Raises:
      UserError: if a file of them is missing or damaged.
    """
    return self._painter is not None

  @numerics.fixed()
  def pictures(self, params, batch) -> dict[str, np.ndarray]:
    """Pictures for a few examples, drawn on the mesh, where all processes take part.

    Args:
      params: the parameters.
      batch: a whole batch, the same one in every process.

    Returns:
      Name -> uint8 [batch, height, width, 3]; nothing where the objective has nothing to draw with.
    """
    if self._painter is None:
      return {}
    draw, inputs = self._painter
    count, ways = len(next(iter(batch.values()))), rules_lib.batch_ways(self.mesh, self.rules)
    with self._partitioned():
      drawn = draw(params, self._put_whole(batch, -(-count // ways) * ways), inputs)
    return {name: np.asarray(pictures)[:count] for name, pictures in drawn.items()}

  @functools.cached_property
  def _painter(self):
    """The objective's painter with its function jitted for the mesh, once for all pictures of a run."""
    painter = self.objective.painter()
    if painter is None:
      return None
    draw, inputs = painter
    shardings = (self.shardings.params, self.batch_sharding, self._replicated)
    return jax.jit(draw, in_shardings=shardings, out_shardings=self._replicated), inputs

  @contextlib.contextmanager
  def _partitioned(self):
    """A context in which the models are split over the mesh."""
    with (
      rules_lib.partitioned(self.mesh, self.rules),
      pipeline_parallelism.use(self._pipeline),
    ):
      yield

  def _put_whole(self, batch, size: int):
    """A batch that every process has, as arrays of `size` rows; the added ones repeat others."""
    padded = {name: np.resize(value, (size,) + value.shape[1:]) for name, value in batch.items()}
    rows = local_rows.local_rows(self.batch_sharding, size)
    held = {name: value[rows] for name, value in padded.items()}
    return local_rows.global_arrays(self.batch_sharding, held, size)

"""The jitted steps of an objective on a mesh.

This module doesn't depend on the data pipeline, so that planning can use it too.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import Shaped
from jaxtyping import UInt8

from parti_jax.core import numerics
from parti_jax.models.nn import layers
from parti_jax.partitioning import compiler_options
from parti_jax.partitioning import local_rows
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.partitioning import placing
from parti_jax.partitioning import rules as rules_lib
from parti_jax.training import config as config_lib
from parti_jax.training import skipped_steps
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import base


def make_train_step(
  objective: base.Objective,
  optimizer: optax.GradientTransformation,
  seed: int,
  microbatches: int = 1,
) -> Callable[
  [state_lib.TrainState, base.Batch, base.Params],
  tuple[state_lib.TrainState, dict[str, Shaped[Array, '']]],
]:
  """Returns an objective's training step, not yet jitted.

  The keys of dropout and of everything else that is random depend only on `seed` and the step, so
  a resumed run draws the same values as an uninterrupted one.

  If the loss or a gradient isn't finite, the metric 'finite' is False and only the state's step
  changes. The optimizers' own counts, and thus the learning rate, don't change then.

  Args:
    objective: the objective to train.
    optimizer: the optimizer of all parameters, a result of `with_other_optimizers`.
    seed: seed of dropout.
    microbatches: number of parts of a batch to compute one after the other.

  Returns:
    A function of the state, a batch and the objective's constants, which returns the new state and
    the metrics, floats except for 'finite'.
  """
  apart = objective.other_optimizers()

  def step(
    state: state_lib.TrainState, batch: base.Batch, constants: base.Params
  ) -> tuple[state_lib.TrainState, dict[str, Shaped[Array, '']]]:
    rng, after_rng = jax.random.split(jax.random.fold_in(numerics.key(seed), state.step))
    value, aux, gradients = _gradients(
      objective, state.params, constants, batch, rng, state.step, microbatches
    )
    before = state.replace(
      step=state.step + 1, optimizer_state=state_lib.to_device(state.optimizer_state)
    )
    updates, optimizer_state = optimizer.update(gradients, before.optimizer_state, state.params)
    # Momentum and weight decay must not change frozen parts either.
    params: base.Params = {
      name: part if name in objective.frozen else optax.apply_updates(part, updates[name])
      for name, part in state.params.items()
    }
    params, statistics, metrics = objective.after_step(
      params, state.statistics, aux, state.step, after_rng
    )
    norms = {
      f'{name}_gradient_norm': optax.tree.norm(gradients.pop(name))
      for name in apart
      if name not in objective.frozen
    }
    norms['gradient_norm'] = optax.tree.norm(gradients)
    finite = skipped_steps.all_finite(value, norms.values())
    updated = state_lib.TrainState(before.step, params, optimizer_state, statistics)
    metrics = {'loss': value} | aux['metrics'] | metrics | norms | {'finite': finite}
    return skipped_steps.select(finite, updated, before), metrics

  return step


def with_other_optimizers(
  objective: base.Objective, optimizer: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Combines the run's optimizer with the objective's `other_optimizers`.

  Args:
    objective: the objective to train.
    optimizer: the optimizer of all parts without a separate one.

  Returns:
    An optax transformation; `optimizer` itself if the objective has no other optimizers.
  """
  others = objective.other_optimizers()
  if not others:
    return optimizer
  return optax.partition(
    {'main': optimizer, **others},
    lambda params: {name: name if name in others else 'main' for name in params},
  )


def _gradients(
  objective: base.Objective,
  params: base.Params,
  constants: base.Params,
  batch: base.Batch,
  rng: PRNGKeyArray,
  step: Int[Array, ''],
  microbatches: int,
) -> tuple[Float[Array, ''], dict[str, Any], base.Params]:
  """Computes the loss, its auxiliary outputs and gradients, one microbatch after another.

  Microbatch k of n has the examples k, k + n, k + 2 · n ..., so each device already holds its part
  of every microbatch. Gradients are summed in float32. All examples have the same weight as without
  microbatches. The `batch_dependent_terms` of the objective's loss are those of a microbatch.
  """
  size = len(next(iter(batch.values())))
  whole = jnp.maximum(objective.weight(batch), 1.0)

  def loss(
    params: base.Params, batch: base.Batch, keys: layers.DropoutKeys
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
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

  def split(array: jax.Array) -> jax.Array:
    array = array.reshape((size // microbatches, microbatches) + array.shape[1:])
    return array.swapaxes(0, 1)

  def of_part(part):
    batch, rows = part
    keys_of_part = layers.DropoutKeys(keys.key, rows)
    (value, aux), gradients = with_gradients(params, batch, keys_of_part)
    return (value, aux.pop('metrics'), gradients), aux

  def body(sums, part):
    found, aux = of_part(part)
    return jax.tree.map(jnp.add, sums, found), aux

  parts = jax.tree.map(split, (batch, keys.rows))
  shapes = jax.eval_shape(lambda: of_part(jax.tree.map(lambda part: part[0], parts)))[0]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  (value, metrics, gradients), others = jax.lax.scan(body, zeros, parts)
  return value, objective.merge(others) | {'metrics': metrics}, gradients


class Trainer:
  """An objective on a mesh: the shardings of its state, and its compiled steps.

  Args:
    objective: the objective to train, such as TokenizerObjective or GeneratorObjective.
    optimizer: an optax transformation, for the parts without one of the objective's
      `other_optimizers`.
    mesh: the device mesh.
    seed: seed of the initial parameters and of dropout.
    microbatches: number of parts of a batch whose gradients are computed one after the other and
      summed.
    offload_optimizer: whether to keep the optimizer's state in host memory between steps.

  Attributes:
    abstract: shapes and shardings of the state, a TrainState.
    shardings: shardings of the state, a TrainState.
    batch_sharding: sharding of a batch's arrays.
    compiler_options: XLA's options for the training step.

  Raises:
    UserError: if a parameter can't be split evenly over the mesh, or the platform can't offload.
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
    self.compiler_options = compiler_options.compiler_options(mesh.devices.flat[0].platform)
    self.rules = rules_lib.logical_axis_rules()
    # With one stage the settings aren't read from gin, so a run's config.gin doesn't list them.
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
      compiler_options=self.compiler_options,
      # The constants stay as `constants` has split them.
      in_shardings=(self.shardings, self.batch_sharding, None),
      out_shardings=(self.shardings, None),
    )
    self._evaluate = jax.jit(
      lambda params, constants, batch: objective.evaluate(params | constants, batch),
      in_shardings=(self.shardings.params, None, self.batch_sharding),
      out_shardings=self._replicated,
    )

  @classmethod
  def of_config(cls, config: config_lib.TrainConfig, mesh: jax.sharding.Mesh) -> Trainer:
    """Returns the trainer of a run with these settings."""
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
  def constants(self) -> base.Params:
    """The objective's constants on the mesh, read from their files.

    Raises:
      UserError: if one of the files is missing or damaged.
    """
    constants = self.objective.constants()
    known = self.abstract_constants() if constants else {}

    def put(name: str) -> Any:
      if name not in known:
        return jax.device_put(constants[name], self._replicated)
      return jax.tree.map(
        lambda leaf, like: placing.put(leaf, like.sharding), constants[name], known[name]
      )

    return {name: put(name) for name in constants}

  def abstract_constants(self) -> base.Params:
    """Returns shapes, dtypes and shardings of the constants; without logical axes they aren't split."""
    boxed = self.objective.abstract_constants()
    return jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      nn.meta.unbox(boxed),
      rules_lib.parameter_shardings(boxed, self.mesh, self.rules),
    )

  @numerics.fixed()
  def create_state(self) -> state_lib.TrainState:
    """Returns the state before the first step."""
    with pipeline_parallelism.use(self._pipeline):
      return state_lib.create_state(
        self.objective, self.optimizer, self.seed, self.abstract, self.mesh, self.rules
      )

  @numerics.fixed()
  def put(
    self, batch: dict[str, np.ndarray], batch_size: int | None = None
  ) -> dict[str, jax.Array]:
    """Makes global arrays on the mesh from a batch.

    Args:
      batch: the rows that this process holds, as `local_rows` gives them.
      batch_size: rows of the global batch; None if `batch` has all of them.
    """
    return local_rows.global_arrays(
      self.batch_sharding, batch, batch_size or len(next(iter(batch.values())))
    )

  @numerics.fixed()
  def step(
    self, state: state_lib.TrainState, batch: base.Batch
  ) -> tuple[state_lib.TrainState, dict[str, Shaped[Array, '']]]:
    """Trains on one batch.

    Args:
      state: the state, whose buffers are donated.
      batch: a result of `put`.

    Returns:
      The new state, and the metrics.
    """
    constants = self.constants
    with self._partitioned(), compiler_options.checked():
      state, metrics = self._step(state, batch, constants)
    if self.mesh.size > 1 and self.mesh.devices.flat[0].platform == 'cpu':
      # The collectives of two steps that run at once on the same cores can wait for each other.
      jax.block_until_ready(metrics)
    return state, metrics

  @numerics.fixed()
  def lower(self, batch_size: int) -> jax.stages.Lowered:
    """Lowers the training step for a batch of this size, without compiling it."""
    batch, constants = self.objective.abstract_batch(batch_size), self.abstract_constants()
    with self._partitioned():
      return self._step.lower(self.abstract, batch, constants)

  @numerics.fixed()
  def evaluate(
    self, params: base.Params, batches: Iterable[Mapping[str, np.ndarray]]
  ) -> dict[str, float]:
    """Evaluates all examples of `batches`.

    Args:
      params: the parameters.
      batches: whole batches, the same ones in every process, since all processes take part in each
        evaluation step. Short batches are padded; the padding isn't counted.

    Returns:
      The objective's summary of its measures. If some measures aren't finite, 'not_finite_examples'
      is the number of their examples.
    """
    measures: dict[str, list[np.ndarray]] = {}
    size, ways = 0, rules_lib.batch_ways(self.mesh, self.rules)
    constants = self.constants
    with self._partitioned():
      for batch in batches:
        count = len(next(iter(batch.values())))
        size = max(size, -(-count // ways) * ways)
        whole = self._put_whole(batch, size)
        for name, values in self._evaluate(params, constants, whole).items():
          measures.setdefault(name, []).append(np.asarray(values)[:count])
    of_all = {name: np.concatenate(parts) for name, parts in measures.items()}
    # The summary may hide values that aren't finite. In a ranking, NaN loses all comparisons.
    bad = skipped_steps.bad_examples(of_all)
    return self.objective.summarize(of_all) | ({'not_finite_examples': float(bad)} if bad else {})

  def can_draw(self) -> bool:
    """Returns whether the objective draws images, after reading the files that it draws with.

    Raises:
      UserError: if one of the files is missing or damaged.
    """
    return self._painter is not None

  @numerics.fixed()
  def pictures(
    self, params: base.Params, batch: Mapping[str, np.ndarray]
  ) -> dict[str, UInt8[np.ndarray, 'batch height width 3']]:
    """Draws images of a few examples on the mesh; all processes must call it.

    Args:
      params: the parameters.
      batch: a whole batch, the same one in every process.

    Returns:
      {name: images}; {} if the objective doesn't draw images.
    """
    if self._painter is None:
      return {}
    draw, inputs = self._painter
    count, ways = len(next(iter(batch.values()))), rules_lib.batch_ways(self.mesh, self.rules)
    constants = self.constants
    with self._partitioned():
      whole = self._put_whole(batch, -(-count // ways) * ways)
      drawn = draw(params, constants, whole, inputs)
    return {name: np.asarray(pictures)[:count] for name, pictures in drawn.items()}

  @functools.cached_property
  def _painter(self) -> tuple[Callable[..., Any], Any] | None:
    """The objective's painter; its function is jitted for the mesh, and takes the constants, too."""
    painter = self.objective.painter()
    if painter is None:
      return None
    draw, inputs = painter
    shardings = (self.shardings.params, None, self.batch_sharding, self._replicated)
    with_constants = lambda params, constants, batch, arrays: draw(
      params | constants, batch, arrays
    )
    return jax.jit(with_constants, in_shardings=shardings, out_shardings=self._replicated), inputs

  @contextlib.contextmanager
  def _partitioned(self) -> Iterator[None]:
    """Splits the models over the mesh in the body."""
    with (
      rules_lib.partitioned(self.mesh, self.rules),
      pipeline_parallelism.use(self._pipeline),
    ):
      yield

  def _put_whole(self, batch: Mapping[str, np.ndarray], size: int) -> dict[str, jax.Array]:
    """Puts a batch that every process has on the mesh, padded to `size` rows by repetition."""
    padded = {name: np.resize(value, (size,) + value.shape[1:]) for name, value in batch.items()}
    rows = local_rows.local_rows(self.batch_sharding, size)
    held = {name: value[rows] for name, value in padded.items()}
    return local_rows.global_arrays(self.batch_sharding, held, size)

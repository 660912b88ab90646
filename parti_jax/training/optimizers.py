"""Optimizers and learning rate schedules for gin."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import gin
import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import ArrayLike
from jax.typing import DTypeLike
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import PyTree

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.models import lora
from parti_jax.partitioning import factored


def decayed(parameters: PyTree) -> PyTree[bool]:
  """Returns which parameters weight decay acts on: kernels, not norms, tables or the codebook.

  It acts on the matrices of adapters (`parti_jax.models.lora`) as on kernels.
  """
  names = ('kernel', lora.A, lora.B)
  return jax.tree_util.tree_map_with_path(
    lambda path, _: str(getattr(path[-1], 'key', '')) in names, parameters
  )


def stored_average(decay: float, dtype: DTypeLike) -> optax.GradientTransformation:
  """Averages updates over steps, in float32, and stores the average in a narrower dtype.

  `optax.ema` with an `accumulator_dtype` multiplies in that dtype. In bfloat16, a decay of 0.9
  rounds to 0.898 and one of 0.999 rounds to 1.

  Args:
    decay: decay of the moving average.
    dtype: dtype of the stored average.

  Returns:
    An optax transformation with the state of `optax.ema`. Its updates are the float32 averages,
    before rounding to `dtype`.
  """
  average = optax.ema(decay, debias=False, accumulator_dtype=jnp.float32)

  def update(
    updates: optax.Updates, state: optax.EmaState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.EmaState]:
    wide = state._replace(ema=optax.tree.cast(state.ema, jnp.float32))
    updates, state = average.update(updates, wide, params)
    return updates, state._replace(ema=optax.tree.cast(state.ema, dtype))

  return optax.GradientTransformation(
    optax.ema(decay, debias=False, accumulator_dtype=dtype).init, update
  )


def scale_by_factored_moment(decay: float) -> optax.GradientTransformation:
  """Divides updates by the root of Adafactor's factored second moment, with a constant decay.

  Attention kernels are factored over embed × (heads · head_dim). `partitioning.factored` chooses
  the axes.

  Args:
    decay: decay of the second moment. The first step uses 0.

  Returns:
    An optax transformation with an `optax.FactoredState`.
  """
  inner = optax.scale_by_factored_rms(
    decay_rate=decay,
    min_dim_size_to_factor=factored.LEAST_SIZE,
    decay_rate_fn=lambda step, rate: jnp.where(step == 0, 0.0, rate),
  )

  def matrices(tree: PyTree) -> PyTree:
    def matrix(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
      names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
      return leaf.reshape(factored.matrix_shape(names, leaf.shape))

    return jax.tree_util.tree_map_with_path(matrix, tree)

  def update(updates: PyTree, state: PyTree, params: PyTree) -> tuple[PyTree, PyTree]:
    scaled, state = inner.update(matrices(updates), state, matrices(params))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), scaled, updates), state

  return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)


@gin.configurable
@checks.bounded(weight_decay=(0, None), max_gradient_norm=(0, None))
def adafactor(
  schedule: optax.ScalarOrSchedule,
  beta1: float = 0.9,
  beta2: float = 0.96,
  weight_decay: float = 4.5e-2,
  max_gradient_norm: float = 4.0,
  first_moment_dtype: str = 'bfloat16',
) -> optax.GradientTransformation:
  """Adafactor with Parti's settings (Parti, section 3).

  The second moment has the constant decay `beta2`. It is factored for parameters with two axes of
  at least 128, where heads and head_dim of attention kernels count as one axis
  (`partitioning.factored`). Other parameters have a full second moment. The first moment is
  computed in float32 and stored in bfloat16. The weight decay is decoupled, and gradients are
  clipped by their global norm.

  Args:
    schedule: learning rate as a function of the step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    weight_decay: weight decay of kernels, multiplied by the learning rate.
    max_gradient_norm: maximum global norm of the gradients.
    first_moment_dtype: dtype of the stored first moment. bfloat16 is too coarse for a `beta1`
      above 0.996: without gradients, the moment would stop decaying.

  Raises:
    UserError: if a decay is not in [0, 1), the norm is 0, or the dtype is neither bfloat16 nor
      float32.
  """
  _check_moments('adafactor', beta1, beta2, max_gradient_norm)
  if first_moment_dtype not in ('bfloat16', 'float32'):
    raise UserError(
      f"adafactor.first_moment_dtype={first_moment_dtype!r} must be 'bfloat16' or 'float32'"
    )
  if 1.0 - beta1 < jnp.finfo(first_moment_dtype).eps / 2:
    warnings.warn(
      f'adafactor.beta1={beta1} is too close to 1 for a first moment in {first_moment_dtype}, '
      "which would stop decaying without gradients; set adafactor.first_moment_dtype='float32'",
      stacklevel=2,
    )
  return optax.chain(
    optax.clip_by_global_norm(max_gradient_norm),
    scale_by_factored_moment(beta2),
    stored_average(beta1, jnp.dtype(first_moment_dtype)),
    optax.add_decayed_weights(weight_decay, decayed),
    optax.scale_by_learning_rate(schedule),
  )


@gin.configurable
@checks.bounded(weight_decay=(0, None), max_gradient_norm=(0, None))
def adamw(
  schedule: optax.ScalarOrSchedule,
  beta1: float = 0.9,
  beta2: float = 0.99,
  weight_decay: float = 1e-4,
  max_gradient_norm: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW (ViT-VQGAN, section 4), with the same arguments as `adafactor`."""
  _check_moments('adamw', beta1, beta2, max_gradient_norm)
  return optax.chain(
    optax.clip_by_global_norm(max_gradient_norm),
    optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay, mask=decayed),
  )


def muon_axes(parameters: PyTree) -> PyTree:
  """Returns the axes over which Muon orthogonalizes parameters.

  Kernels of attention and of MLPs are matrices, in which heads and head_dim count as one axis.
  Layers of a stack, and queries, keys and values that share a kernel, are separate matrices.

  Args:
    parameters: parameters, abstract or concrete.

  Returns:
    A tree of `optax.contrib.MuonDimensionNumbers`; None for parameters that aren't such kernels:
    embeddings, norms, biases, logits, convolutions, adapters and projections of patches and features.
  """

  def axes(
    path: jax.tree_util.KeyPath, leaf: jax.Array
  ) -> optax.contrib.MuonDimensionNumbers | None:
    names = jax.tree_util.keystr(path, simple=True, separator='/').split('/')
    if len(names) < 3 or names[-1] != 'kernel' or names[-3] not in (*factored.ATTENTION, 'mlp'):
      return None
    first, last = int('layers' in names), leaf.ndim - 1
    if names[-3] == 'mlp':
      return optax.contrib.MuonDimensionNumbers((first,), (last,))
    if names[-2] == 'project_out':
      return optax.contrib.MuonDimensionNumbers((last - 2, last - 1), (last,))
    return optax.contrib.MuonDimensionNumbers((first,), (last - 1, last))

  return jax.tree_util.tree_map_with_path(axes, parameters)


@gin.configurable
@checks.bounded(weight_decay=(0, None), max_gradient_norm=(0, None))
def muon(
  schedule: optax.ScalarOrSchedule,
  beta: float = 0.95,
  beta1: float = 0.9,
  beta2: float = 0.95,
  weight_decay: float = 0.1,
  max_gradient_norm: float = 1.0,
) -> optax.GradientTransformation:
  """Muon for the kernels of attention and MLPs, and AdamW for all other parameters.

  Muon orthogonalizes the momentum of each matrix by five steps of Newton-Schulz
  (https://kellerjordan.github.io/posts/muon). Updates are multiplied by 0.2 · √(the longer side), so
  that their root mean square is about that of AdamW's, and both share the learning rate and the
  weight decay (arXiv 2502.16982, section 2.2). `muon_axes` says what is a matrix.

  Args:
    schedule: learning rate as a function of the step; one that suits `adamw` is a good start.
    beta: decay of Muon's momentum, which is Nesterov's.
    beta1: decay of AdamW's first moment.
    beta2: decay of AdamW's second moment.
    weight_decay: weight decay of kernels, multiplied by the learning rate.
    max_gradient_norm: maximum global norm of the gradients.

  Raises:
    UserError: if a decay is not in [0, 1), or the norm is 0.
  """
  _check_moments('muon', beta1, beta2, max_gradient_norm)
  if not 0 <= beta < 1:
    raise UserError(f'muon.beta={beta} must be at least 0 and below 1')
  is_axes = lambda node: node is None or isinstance(node, optax.contrib.MuonDimensionNumbers)

  def labels(parameters: PyTree) -> PyTree[str]:
    name = lambda axes: 'adamw' if axes is None else 'muon'
    return jax.tree.map(name, muon_axes(parameters), is_leaf=is_axes)

  def scaled(update: jax.Array, axes: optax.contrib.MuonDimensionNumbers) -> jax.Array:
    sides = (math.prod(update.shape[axis] for axis in numbers) for numbers in axes)
    return 0.2 * math.sqrt(max(sides)) * update

  orthogonal = optax.chain(
    optax.contrib.scale_by_muon(beta=beta, weight_dimension_numbers=muon_axes),
    optax.stateless(lambda updates, _: jax.tree.map(scaled, updates, muon_axes(updates))),
  )
  return optax.chain(
    optax.clip_by_global_norm(max_gradient_norm),
    optax.partition({'muon': orthogonal, 'adamw': optax.scale_by_adam(beta1, beta2)}, labels),
    optax.add_decayed_weights(weight_decay, decayed),
    optax.scale_by_learning_rate(schedule),
  )


@gin.configurable
@checks.bounded(
  peak=(0, None),
  warmup_steps=(0, None),
  decay_start=(0, None),
  decay_end=(0, None),
  final_ratio=(0, 1),
)
def parti_schedule(
  peak: float = 4.5e-5,
  warmup_steps: int = 5000,
  decay_start: int = 85000,
  decay_end: int = 450000,
  final_ratio: float = 0.025,
) -> optax.Schedule:
  """Linear warm-up, constant, then exponential decay to peak · final_ratio (Parti, section 3).

  Args:
    peak: the constant learning rate.
    warmup_steps: number of steps from 0 to `peak`.
    decay_start: the last step at `peak`.
    decay_end: the step from which the learning rate is peak · final_ratio.
    final_ratio: ratio of the final learning rate to the peak.

  Raises:
    UserError: if the decay ends before it starts.
  """
  if decay_end < decay_start:
    raise UserError(
      f'parti_schedule.decay_end={decay_end} is less than parti_schedule.decay_start={decay_start}'
    )

  def schedule(step: ArrayLike) -> Float[Array, '']:
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(step / max(warmup_steps, 1), 1.0)
    decayed_share = jnp.clip((step - decay_start) / max(decay_end - decay_start, 1), 0.0, 1.0)
    return peak * warm * final_ratio**decayed_share

  return schedule


@gin.configurable
@checks.bounded(
  peak=(0, None),
  warmup_steps=(0, None),
  decay_steps=(1, None),
  final=(0, None),
  train_steps=(1, None),
)
def warmup_cosine(
  peak: float,
  warmup_steps: int,
  decay_steps: int | None = None,
  final: float = 0.0,
  train_steps: int | None = None,
) -> optax.Schedule:
  """Linear warm-up to `peak`, then cosine decay to `final`, then constant.

  Args:
    peak: the peak learning rate.
    warmup_steps: number of steps from 0 to `peak`.
    decay_steps: the step at which the schedule reaches `final`, counted from the first step, the
      warm-up included. None for `train_steps`; a run that is shorter than the warm-up then ends
      during it.
    final: the final learning rate.
    train_steps: number of steps of the run. gin sets it to `train.steps`.

  Raises:
    UserError: if neither `decay_steps` nor `train_steps` is given, or if `decay_steps` is not
      above `warmup_steps`.
  """
  if decay_steps is None:
    if train_steps is None:
      raise UserError('set warmup_cosine.decay_steps, the step at which the schedule ends')
    decay_steps = max(train_steps, warmup_steps + 1)
  if warmup_steps >= decay_steps:
    raise UserError(
      f'warmup_cosine.warmup_steps={warmup_steps} must be less than '
      f'warmup_cosine.decay_steps={decay_steps}, which counts from the first step'
    )
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, decay_steps, final)


@gin.config.register_finalize_hook
def _schedules_follow_the_run(
  config: Mapping[tuple[str, str], Mapping[str, Any]],
) -> dict[str, Any]:
  """Binds `warmup_cosine.train_steps` to `train.steps` whenever gin has read its files."""
  values = config.get(('', 'parti_jax.training.config.train'), {})
  return {'warmup_cosine.train_steps': values['steps']} if 'steps' in values else {}


def _check_moments(name: str, beta1: float, beta2: float, max_gradient_norm: float) -> None:
  """Raises UserError if the optimizer couldn't update any parameter with these settings."""
  for parameter, value in (('beta1', beta1), ('beta2', beta2)):
    if not 0 <= value < 1:
      raise UserError(f'{name}.{parameter}={value} must be at least 0 and below 1')
  if not max_gradient_norm > 0:
    raise UserError(f'{name}.max_gradient_norm={max_gradient_norm} must be above 0')

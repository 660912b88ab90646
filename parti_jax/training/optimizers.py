"""Optimisers and learning rate schedules, bound by gin."""

from __future__ import annotations

import warnings

import gin
import jax
import jax.numpy as jnp
import optax

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.partitioning import factored


def decayed(parameters):
  """Which parameters weight decay acts on: kernels, not norms, tables or the codebook."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: str(getattr(path[-1], 'key', '')) == 'kernel', parameters
  )


def stored_average(decay: float, dtype):
  """A moving average of updates, computed in float32 and stored in a narrower dtype.

  `optax.ema` with an `accumulator_dtype` multiplies in that dtype: in bfloat16 a decay of 0.9 is
  0.898, and one of 0.999 is 1.

  Args:
    decay: share of the average that stays at each step.
    dtype: of the stored average.

  Returns:
    An optax.GradientTransformation with the state of `optax.ema`. Its updates are the float32
    averages, before they are rounded to `dtype`.
  """
  average = optax.ema(decay, debias=False, accumulator_dtype=jnp.float32)

  def update(updates, state, params=None):
    wide = state._replace(ema=optax.tree.cast(state.ema, jnp.float32))
    updates, state = average.update(updates, wide, params)
    return updates, state._replace(ema=optax.tree.cast(state.ema, dtype))

  return optax.GradientTransformation(
    optax.ema(decay, debias=False, accumulator_dtype=dtype).init, update
  )


def scale_by_factored_moment(decay: float):
  """Divides updates by the root of Adafactor's factored second moment, with a constant decay.

  Kernels of attention are factored over embed × (heads · head_dim), see `partitioning.factored`.

  Args:
    decay: share of the second moment that stays at each step; the first step's gradient replaces
      it altogether.

  Returns:
    An optax.GradientTransformation with an optax.FactoredState.
  """
  inner = optax.scale_by_factored_rms(
    decay_rate=decay,
    min_dim_size_to_factor=factored.LEAST_SIZE,
    decay_rate_fn=lambda step, rate: jnp.where(step == 0, 0.0, rate),
  )

  def matrices(tree):
    return jax.tree_util.tree_map_with_path(
      lambda path, leaf: leaf.reshape(
        factored.matrix_shape([str(getattr(key, 'key', key)) for key in path], leaf.shape)
      ),
      tree,
    )

  def update(updates, state, params):
    scaled, state = inner.update(matrices(updates), state, matrices(params))
    return jax.tree.map(lambda new, old: new.reshape(old.shape), scaled, updates), state

  return optax.GradientTransformation(lambda params: inner.init(matrices(params)), update)


@gin.configurable
@checks.bounded(weight_decay=(0, None), max_gradient_norm=(0, None))
def adafactor(
  schedule,
  beta1: float = 0.9,
  beta2: float = 0.96,
  weight_decay: float = 4.5e-2,
  max_gradient_norm: float = 4.0,
  first_moment_dtype: str = 'bfloat16',
):
  """Adafactor as Parti trains with it (Parti, section 3).

  The second moment decays by the constant `beta2`. It is factored wherever a parameter has two
  axes of at least 128, heads and head_dim of attention kernels counted as one, see
  `partitioning.factored`; smaller parameters have a whole one. The first moment is computed in
  float32 and stored in bfloat16. The weight decay is decoupled; the gradient's norm is clipped.

  Args:
    schedule: learning rate by step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    weight_decay: share of a kernel that is taken off at each step, times the learning rate.
    max_gradient_norm: larger gradients are scaled down to it.
    first_moment_dtype: of the stored first moment. bfloat16 is too coarse for a `beta1` above
      0.996: where gradients vanish the moment stops decaying.

  Returns:
    An optax.GradientTransformation.

  Raises:
    UserError: if a decay is not in [0, 1), the norm is 0, or the first moment can't be stored in
      that dtype.
  """
  _check_moments('adafactor', beta1, beta2, max_gradient_norm)
  if first_moment_dtype not in ('bfloat16', 'float32'):
    raise UserError(
      f"adafactor.first_moment_dtype={first_moment_dtype!r} must be 'bfloat16' or 'float32'"
    )
  if 1.0 - beta1 < jnp.finfo(first_moment_dtype).eps / 2:
    warnings.warn(
      f'adafactor.beta1={beta1} is too close to 1 for a first moment in {first_moment_dtype}, '
      "which stops decaying where gradients vanish; set adafactor.first_moment_dtype='float32'",
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
  schedule,
  beta1: float = 0.9,
  beta2: float = 0.99,
  weight_decay: float = 1e-4,
  max_gradient_norm: float = 1.0,
):
  """Adam with decoupled weight decay (ViT-VQGAN, section 4). Arguments as `adafactor`."""
  _check_moments('adamw', beta1, beta2, max_gradient_norm)
  return optax.chain(
    optax.clip_by_global_norm(max_gradient_norm),
    optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay, mask=decayed),
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
):
  """Linear warm-up, constant, then exponential decay to peak · final_ratio (Parti, section 3).

  Args:
    peak: the constant learning rate.
    warmup_steps: steps from 0 to `peak`.
    decay_start: the last step at `peak`.
    decay_end: the step at which the final ratio is reached and kept.
    final_ratio: last over peak learning rate.

  Returns:
    A function of the step.

  Raises:
    UserError: if the decay ends before it starts.
  """
  if decay_end < decay_start:
    raise UserError(
      f'parti_schedule.decay_end={decay_end} is less than parti_schedule.decay_start={decay_start}'
    )

  def schedule(step):
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
):
  """Linear warm-up to `peak`, then a cosine down to `final`, which is kept after it.

  Args:
    peak: the highest learning rate.
    warmup_steps: steps from 0 to `peak`.
    decay_steps: the step at which `final` is reached, counted from the first step. None is
      `train_steps`; a run that is shorter than the warm-up ends within it.
    final: the last learning rate.
    train_steps: the length of the run. gin sets it to `train.steps`.

  Returns:
    A function of the step.

  Raises:
    UserError: neither `decay_steps` nor `train_steps` is given, or `decay_steps` is not above
      `warmup_steps`.
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
def _schedules_follow_the_run(config):
  """Binds `warmup_cosine.train_steps` to `train.steps`, wherever a gin file is read."""
  values = config.get(('', 'parti_jax.training.config.train'), {})
  return {'warmup_cosine.train_steps': values['steps']} if 'steps' in values else {}


def _check_moments(name: str, beta1: float, beta2: float, max_gradient_norm: float):
  """Raises UserError unless an optimizer can move anything with these."""
  for parameter, value in (('beta1', beta1), ('beta2', beta2)):
    if not 0 <= value < 1:
      raise UserError(f'{name}.{parameter}={value} must be at least 0 and below 1')
  if not max_gradient_norm > 0:
    raise UserError(f'{name}.max_gradient_norm={max_gradient_norm} must be above 0')

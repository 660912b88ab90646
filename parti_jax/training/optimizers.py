"""Optimisers and learning rate schedules, bound by gin."""

from __future__ import annotations

import gin
import jax
import jax.numpy as jnp
import optax


def decayed(parameters):
  """Which parameters weight decay acts on: kernels, not norms, tables or the codebook."""
  return jax.tree_util.tree_map_with_path(
      lambda path, _: str(getattr(path[-1], 'key', '')) == 'kernel', parameters)


@gin.configurable
def adafactor(schedule, beta1: float = 0.9, beta2: float = 0.96, weight_decay: float = 4.5e-2,
              max_gradient_norm: float = 4.0):
  """Adafactor as Parti trains with it (Parti, section 3).

  The second moment is factored and decays by the constant `beta2`; the first moment is kept
  in bfloat16; the weight decay is decoupled; the gradient's norm is clipped.

  Args:
    schedule: learning rate by step.
    beta1: decay of the first moment.
    beta2: decay of the second moment.
    weight_decay: share of a kernel that is taken off at each step, times the learning rate.
    max_gradient_norm: larger gradients are scaled down to it.

  Returns:
    An optax.GradientTransformation.
  """
  return optax.chain(
      optax.clip_by_global_norm(max_gradient_norm),
      optax.scale_by_factored_rms(
          decay_rate=beta2, decay_rate_fn=lambda step, rate: jnp.where(step == 0, 0.0, rate)),
      optax.ema(beta1, debias=False, accumulator_dtype=jnp.bfloat16),
      optax.add_decayed_weights(weight_decay, decayed),
      optax.scale_by_learning_rate(schedule))


@gin.configurable
def adamw(schedule, beta1: float = 0.9, beta2: float = 0.99, weight_decay: float = 1e-4,
          max_gradient_norm: float = 1.0):
  """Adam with decoupled weight decay (ViT-VQGAN, section 4). Arguments as `adafactor`."""
  return optax.chain(
      optax.clip_by_global_norm(max_gradient_norm),
      optax.adamw(schedule, beta1, beta2, weight_decay=weight_decay, mask=decayed))


@gin.configurable
def parti_schedule(peak: float = 4.5e-5, warmup_steps: int = 5000, decay_start: int = 85000,
                   decay_end: int = 450000, final_ratio: float = 0.025):
  """Linear warm-up, constant, then exponential decay to peak · final_ratio (Parti, section 3).

  Args:
    peak: the constant learning rate.
    warmup_steps: steps from 0 to `peak`.
    decay_start: the last step at `peak`.
    decay_end: the step at which the final ratio is reached and kept.
    final_ratio: last over peak learning rate.

  Returns:
    A function of the step.
  """

  def schedule(step):
    step = jnp.asarray(step, jnp.float32)
    warm = jnp.minimum(step / max(warmup_steps, 1), 1.0)
    decayed_share = jnp.clip((step - decay_start) / max(decay_end - decay_start, 1), 0.0, 1.0)
    return peak * warm * final_ratio ** decayed_share

  return schedule


@gin.configurable
def warmup_cosine(peak: float, warmup_steps: int, decay_steps: int, final: float = 0.0):
  """Linear warm-up to `peak`, then a cosine down to `final` at `decay_steps`, kept after it."""
  return optax.warmup_cosine_decay_schedule(0.0, peak, warmup_steps, decay_steps, final)

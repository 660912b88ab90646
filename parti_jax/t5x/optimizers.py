"""Wraps our optimizers for t5x."""

from __future__ import annotations

from collections.abc import Callable

import flax.core
import jax
import jax.numpy as jnp
import optax
from flax import serialization
from t5x import optimizers as t5x_optimizers

from parti_jax.core import errors
from parti_jax.partitioning import rules
from parti_jax.training import skipped_steps


class OptaxWrapper(t5x_optimizers.OptaxWrapper):
  """An optax optimizer, such as those of `training.optimizers`, with t5x's learning rate.

  t5x's wrapper leaves the learning rate to optax. This one applies `Trainer.learning_rate_fn`, like
  t5x's own optimizers, so that the rate that t5x reports is the rate in use. The state is that of
  the same optimizer in `parti_jax.training`, so that checkpoints can be converted both ways.

  As in `parti_jax.training`, a step whose gradients are not finite changes only the step count.
  t5x's learning rate depends on this count, whereas our schedules count only the applied steps.

  Args:
    optimizer: maps `schedule`, which maps a step to a learning rate, to an
      optax.GradientTransformation whose updates are proportional to the rate. In gin it is a
      reference without parentheses, `OptaxWrapper.optimizer = @adafactor`.
  """

  def __init__(self, optimizer: Callable[..., optax.GradientTransformation]):
    super().__init__(optimizer(schedule=lambda step: jnp.ones((), jnp.float32)))

  def apply_gradient(self, hyper_params, params, state, grads):
    """Returns the new parameters and state; the arguments are t5x's.

    Raises:
      UserError: if the trainer has no learning rate.
    """
    if hyper_params.learning_rate is None:
      raise errors.UserError('no learning rate; bind trainer.Trainer.learning_rate_fn')
    updates, param_states = self.optax_optimizer.update(grads, state.param_states, params)
    updates = jax.tree.map(lambda update: hyper_params.learning_rate * update, updates)
    finite = skipped_steps.all_finite(optax.tree.norm(grads), ())
    params, param_states = skipped_steps.select(
      finite, (optax.apply_updates(params, updates), param_states), (params, state.param_states)
    )
    return params, t5x_optimizers.OptimizerState(state.step + 1, param_states)

  def derive_logical_axes(self, optimizer, param_logical_axes):
    """Returns the logical axes of a t5x Optimizer, including Adafactor's factored moments.

    Args:
      optimizer: a t5x Optimizer with arrays or abstract arrays.
      param_logical_axes: a PartitionSpec of logical axes for each parameter.

    Returns:
      An Optimizer with a PartitionSpec, or None for no axes, in place of each array.
    """
    of_state = rules.optimizer_specs(
      optimizer.state.param_states, optimizer.target, param_logical_axes
    )
    return optimizer.restore_state(
      {
        'target': flax.core.unfreeze(param_logical_axes),
        'state': {'step': None, 'param_states': serialization.to_state_dict(of_state)},
      }
    )

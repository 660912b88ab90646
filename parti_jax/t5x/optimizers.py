"""Our optimisers as t5x takes them."""

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
from parti_jax.training import skipped_steps as finite_lib


class OptaxWrapper(t5x_optimizers.OptaxWrapper):
  """An optax optimiser whose learning rate is t5x's, such as those of `training.optimizers`.

  t5x's wrapper leaves the learning rate to optax; here it is that of `Trainer.learning_rate_fn`, as
  with t5x's own optimisers, so that the rate that t5x reports is the one in force. The state is
  that of the same optimiser in `parti_jax.training`, so that checkpoints can go both ways.

  As there, a step whose gradients are not finite changes nothing but the number of steps. The
  learning rate of t5x goes by that number, and so goes on; ours goes by the steps applied.

  Args:
    optimizer: takes `schedule`, a function of the step to the learning rate, and returns an
      optax.GradientTransformation whose updates are proportional to it; in gin a reference without
      brackets, `OptaxWrapper.optimizer = @adafactor`.
  """

  def __init__(self, optimizer: Callable[..., optax.GradientTransformation]):
    super().__init__(optimizer(schedule=lambda step: jnp.ones((), jnp.float32)))

  def apply_gradient(self, hyper_params, params, state, grads):
    """New parameters and state; arguments as in t5x.

    Raises:
      UserError: if the trainer gives no learning rate.
    """
    if hyper_params.learning_rate is None:
      raise errors.UserError('no learning rate; bind trainer.Trainer.learning_rate_fn')
    updates, param_states = self.optax_optimizer.update(grads, state.param_states, params)
    updates = jax.tree.map(lambda update: hyper_params.learning_rate * update, updates)
    finite = finite_lib.all_finite(optax.tree.norm(grads), ())
    params, param_states = finite_lib.select(
      finite, (optax.apply_updates(params, updates), param_states), (params, state.param_states)
    )
    return params, t5x_optimizers.OptimizerState(state.step + 1, param_states)

  def derive_logical_axes(self, optimizer, param_logical_axes):
    """Logical axes of a t5x Optimizer, by our rules, which know Adafactor's factored moments.

    Args:
      optimizer: a t5x Optimizer, abstract or not.
      param_logical_axes: a PartitionSpec of logical axes for each parameter.

    Returns:
      An Optimizer with these in place of arrays, and None where there are none.
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

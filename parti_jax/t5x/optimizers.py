"""Our optimisers as t5x takes them."""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import optax
from flax import serialization
from flax.core import frozen_dict
from jax.sharding import PartitionSpec
from t5x import optimizers as t5x_optimizers

from parti_jax import errors
from parti_jax.training import finite as finite_lib


class OptaxWrapper(t5x_optimizers.OptaxWrapper):
  """An optax optimiser whose learning rate is t5x's, such as `parti_jax.training.optimizers`' own.

  t5x's wrapper leaves the learning rate to optax; here it is that of `Trainer.learning_rate_fn`, as
  with t5x's own optimisers, so that the rate that t5x reports is the one in force. The state is that
  of the same optimiser in `parti_jax.training`, so that checkpoints can go both ways. As there, a
  step whose gradients are not finite changes nothing but the number of steps.

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
        finite, (optax.apply_updates(params, updates), param_states),
        (params, state.param_states))
    return params, t5x_optimizers.OptimizerState(state.step + 1, param_states)

  def derive_logical_axes(self, optimizer, param_logical_axes):
    """Logical axes of everything in a t5x Optimizer; Adafactor's factored moments too."""
    rules = _PartitionRules.of(optimizer.target, param_logical_axes)
    axes = jax.tree.map(lambda leaf: None, optimizer.state_dict())
    axes['target'] = param_logical_axes
    axes['state']['param_states'] = serialization.to_state_dict(
        rules.derive_optax_logical_axes(optimizer.state.param_states, param_logical_axes))
    return optimizer.restore_state(frozen_dict.unfreeze(axes))


class _PartitionRules(t5x_optimizers.OptaxStatePartitionRules):
  """t5x's rules, which know no factored second moments, and one for these."""

  @classmethod
  def of(cls, params, params_axes):
    """The rules for parameters of these shapes and axes."""

    def factored(state: optax.FactoredState, axes):
      del axes
      moments = lambda tree, last: jax.tree.map(
          lambda moment, param, names: _without_one(moment.shape, param.shape, names, last),
          tree, params, params_axes)
      return optax.FactoredState(
          count=None, v_row=moments(state.v_row, True), v_col=moments(state.v_col, False),
          v=moments(state.v, False))

    return type('PartitionRules', (cls,), {'_RULES': cls._RULES | {optax.FactoredState: factored}})


def _without_one(shape, of_parameter, names, last: bool) -> PartitionSpec:
  """Names of a moment that has all axes of its parameter, or all but one, or is a stand-in.

  Of two axes of the same length, rows lack the last one and columns the first.
  """
  names = tuple(names) + (None,) * (len(of_parameter) - len(names))
  if shape == of_parameter:
    return PartitionSpec(*names)
  lacking = [axis for axis in range(len(of_parameter))
             if shape == of_parameter[:axis] + of_parameter[axis + 1:]]
  if not lacking:
    return PartitionSpec(*(None,) * len(shape))
  axis = lacking[-1 if last else 0]
  return PartitionSpec(*names[:axis], *names[axis + 1:])

"""What finetuning in t5x takes of a checkpoint: all of it, or the parameters alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.traverse_util

from parti_jax.core import errors

_SHOWN = 3


def of_checkpoint(
  found: Mapping[str, Any],
  wanted: Mapping[str, Any],
  *,
  parameters_only: bool = False,
  is_resuming: bool = False,
) -> Mapping[str, Any]:
  """What to restore, for `RestoreCheckpointConfig.state_transformation_fns`.

  Args:
    found: the checkpoint's state dict with 'target' and 'state', leaves of any kind.
    wanted: the state dict of the model.
    parameters_only: whether the optimiser begins anew; `fallback_to_scratch` has to be the same, by
      which t5x makes what is left away here.
    is_resuming: whether a run of t5x goes on, where everything is taken; t5x sets it.

  Returns:
    `found`, with `parameters_only` without the state of the optimiser.

  Raises:
    UserError: if the model has parameters that are not in the checkpoint, which t5x would begin at
      random; or if the optimiser's state is not there and was not to begin anew.
  """
  if is_resuming:
    return found
  flat = flax.traverse_util.flatten_dict(dict(found), sep='/')
  names = flax.traverse_util.flatten_dict(dict(wanted), sep='/')
  missing = sorted(name for name in names if name.startswith('target/') and name not in flat)
  if missing:
    shown = ', '.join(missing[:_SHOWN]) + (' ...' if len(missing) > _SHOWN else '')
    raise errors.UserError(
      f'INITIAL_CHECKPOINT_PATH: the checkpoint lacks {len(missing)} of the arrays of the model '
      f'({shown}); give the gin file of the model that it is of'
    )
  state = 'state/param_states'
  if parameters_only:
    flat = {name: leaf for name, leaf in flat.items() if not name.startswith(f'{state}/')}
    return flax.traverse_util.unflatten_dict(flat, sep='/')
  if not any(name.startswith(f'{state}/') for name in flat):
    raise errors.UserError(
      'INITIAL_CHECKPOINT_PATH: the checkpoint has no state of an optimiser; '
      'with --gin.PARAMETERS_ONLY=True the optimiser begins anew'
    )
  return found

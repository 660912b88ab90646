"""Selects what t5x restores of a checkpoint for finetuning: all of it, or only the parameters."""

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
  """Returns what to restore, for `RestoreCheckpointConfig.state_transformation_fns`.

  Args:
    found: the checkpoint's state dict with 'target' and 'state', and leaves of any kind.
    wanted: the state dict of the model.
    parameters_only: whether to reset the optimizer. `fallback_to_scratch` must have the same value,
      so that t5x initializes what this function removes.
    is_resuming: whether t5x resumes a run, which restores everything; t5x sets it.

  Returns:
    `found`; with `parameters_only`, without the optimizer's state.

  Raises:
    UserError: if the checkpoint lacks parameters of the model, which t5x would initialize randomly,
      or if it lacks the optimizer's state and `parameters_only` is False.
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
      f'({shown}); give the gin file of the model that it was trained with'
    )
  state = 'state/param_states'
  if parameters_only:
    flat = {name: leaf for name, leaf in flat.items() if not name.startswith(f'{state}/')}
    return flax.traverse_util.unflatten_dict(flat, sep='/')
  if not any(name.startswith(f'{state}/') for name in flat):
    raise errors.UserError(
      'INITIAL_CHECKPOINT_PATH: the checkpoint has no state of an optimizer; use '
      '--gin.PARAMETERS_ONLY=True to reset the optimizer'
    )
  return found

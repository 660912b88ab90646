"""Reads the weights of LPIPS for an objective."""

from __future__ import annotations

from typing import Any

from parti_jax.core import errors
from parti_jax.importers import lpips_files


def of_objective(objective: Any) -> dict[str, Any]:
  """Reads the files of an objective.

  Args:
    objective: an objective with the fields `perceptual_weight`, `vgg16_weights` and
      `lpips_weights`.

  Returns:
    The parameters of `parti_jax.models.lpips.LPIPS`, a tree of float32 numpy arrays.

  Raises:
    UserError: if a file is not given, is missing or damaged.
  """
  kind = type(objective).__name__
  for name in ('vgg16_weights', 'lpips_weights'):
    if getattr(objective, name) is None:
      raise errors.UserError(
        f'{kind}.perceptual_weight={objective.perceptual_weight} needs the file {kind}.{name} '
        f'(docs/tokenizer.md); or set the weight to 0 with --gin.{kind}.perceptual_weight=0'
      )
  return lpips_files.read(objective.vgg16_weights, objective.lpips_weights)

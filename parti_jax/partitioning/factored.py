"""Which axes of a parameter Adafactor's second moment is factored over.

The second moment of a matrix is kept as the means of its rows and of its columns. optax factors an
array over its two largest axes and keeps a separate pair of means for every index of the others:
for each layer of a stack, and for each place of a convolution's kernel.

The kernels of attention split one side of their matrix into heads and head_dim. Neither is large,
so these two axes are joined first, where only that makes the matrix factorable. Queries, keys and
values that share a kernel remain separate matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Both axes must have at least this size; optax's own default.
LEAST_SIZE = 128

# Modules whose kernels have the axes `heads` and `head_dim`, next to each other.
_ATTENTION = ('attention', 'cross_attention')


def axes(shape: Sequence[int]) -> tuple[int, int] | None:
  """The axes that optax factors an array over.

  Args:
    shape: of the array that optax sees.

  Returns:
    The axis that the column means leave out, and the one that the row means leave out. None if
    the array is not factored.
  """
  if len(shape) < 2:
    return None
  column, row = (int(axis) for axis in np.argsort(shape)[-2:])
  return (column, row) if shape[column] >= LEAST_SIZE else None


def joined_axis(names: Sequence[str], shape: Sequence[int]) -> int | None:
  """The axis `heads` of a kernel that is joined with `head_dim` before it is factored.

  Args:
    names: the parameter's path, such as ('decoder', 'layers', 'attention', 'project_in', 'kernel').
    shape: of the parameter.

  Returns:
    The index of `heads`, which `head_dim` follows; None for all other parameters, and where the
    kernel can be factored as it is, or not even with the axes joined.
  """
  if len(names) < 3 or names[-1] != 'kernel' or names[-3] not in _ATTENTION:
    return None
  axis = len(shape) - (3 if names[-2] == 'project_out' else 2)
  if axis < 0 or axes(shape) or not axes(_joined(shape, axis)):
    return None
  return axis


def matrix_shape(names: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
  """The shape in which a parameter is factored: its own, or with heads and head_dim joined."""
  axis = joined_axis(names, shape)
  return tuple(shape) if axis is None else _joined(shape, axis)


def _joined(shape, axis: int) -> tuple[int, ...]:
  return (*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :])

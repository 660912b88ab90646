"""Chooses the axes over which Adafactor factors a parameter's second moment.

Adafactor stores the second moment of a matrix as the means of its rows and of its columns. optax
factors an array over its two largest axes and keeps a separate pair of means for each index of the
other axes: for each layer of a stack, and for each position in a convolution's kernel.

Attention kernels split one side of their matrix into heads and head_dim. Neither axis is large, so
the two are joined first if that makes the matrix factorable. Queries, keys and values that share a
kernel remain separate matrices.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Minimum size of both axes; the default of optax.
LEAST_SIZE = 128

# Modules whose kernels have the axes `heads` and `head_dim`, next to each other.
ATTENTION = ('attention', 'cross_attention')


def axes(shape: Sequence[int]) -> tuple[int, int] | None:
  """Returns the axes over which optax factors an array.

  Args:
    shape: shape of the array that optax sees.

  Returns:
    The axis that the column means leave out, and the axis that the row means leave out. None if
    the array is not factored.
  """
  if len(shape) < 2:
    return None
  column, row = (int(axis) for axis in np.argsort(shape)[-2:])
  return (column, row) if shape[column] >= LEAST_SIZE else None


def joined_axis(names: Sequence[str], shape: Sequence[int]) -> int | None:
  """Returns the axis `heads` of a kernel if it must be joined with `head_dim` for factoring.

  Args:
    names: the parameter's path, such as ('decoder', 'layers', 'attention', 'project_in', 'kernel').
    shape: the parameter's shape.

  Returns:
    The index of `heads`, which `head_dim` follows. None for all other parameters, for a kernel that
    can be factored unchanged, and for one that can't be factored even with the axes joined.
  """
  if len(names) < 3 or names[-1] != 'kernel' or names[-3] not in ATTENTION:
    return None
  axis = len(shape) - (3 if names[-2] == 'project_out' else 2)
  if axis < 0 or axes(shape) or not axes(_joined(shape, axis)):
    return None
  return axis


def matrix_shape(names: Sequence[str], shape: Sequence[int]) -> tuple[int, ...]:
  """Returns the shape in which a parameter is factored, with heads and head_dim joined if needed."""
  axis = joined_axis(names, shape)
  return tuple(shape) if axis is None else _joined(shape, axis)


def _joined(shape: Sequence[int], axis: int) -> tuple[int, ...]:
  return (*shape[:axis], math.prod(shape[axis : axis + 2]), *shape[axis + 2 :])

"""Restores checkpoints of earlier versions, which have whole second moments of attention kernels.

Today Adafactor's second moment of these kernels is factored. A factored moment consists of the
means of the rows and columns of the whole moment, so it can be computed from the whole one without
loss.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from parti_jax.partitioning import factored


def names(
  shapes: Mapping[str, tuple[int, ...]], parameters: str, wanted: Mapping[str, Any] | None = None
) -> list[str]:
  """Returns names of arrays in a checkpoint that are whole moments but are factored today.

  Args:
    shapes: shapes of all of the checkpoint's arrays, by their names in `run_checkpoints.by_path`.
    parameters: prefix of the names of parameters, such as 'params/'.
    wanted: the abstract arrays to restore, by name; only moments whose shape differs count. None
      to return all whole moments of the checkpoint.

  Returns:
    Names such as 'optimizer_state/1/v/decoder/layers/attention/project_in/kernel'.
  """

  def is_whole(name: str) -> bool:
    state, _, kernel = name.partition('/v/')
    return (
      bool(kernel)
      and shapes.get(parameters + kernel) == shapes[name]
      and f'{state}/v_row/{kernel}' in shapes
      and factored.joined_axis(kernel.split('/'), shapes[name]) is not None
      and (wanted is None or name in wanted and wanted[name].shape != shapes[name])
    )

  return [name for name in shapes if is_whole(name)]


def as_saved(wanted: Mapping[str, Any], whole: Iterable[str], parameters: str) -> dict[str, Any]:
  """Returns the abstract arrays to restore, with whole moments in place of factored ones.

  Args:
    wanted: abstract arrays with shardings, by name, in today's form.
    whole: the result of `names`.
    parameters: prefix of the names of parameters, such as 'params/'.

  Returns:
    `wanted`, in the same order, in the checkpoint's form.
  """
  found = dict(wanted)
  for name in whole:
    parameter = wanted[parameters + name.partition('/v/')[2]]
    found[name] = jax.ShapeDtypeStruct(
      parameter.shape, wanted[name].dtype, sharding=parameter.sharding
    )
    for mean in _means_of(name):
      found[mean] = wanted[name]  # Means and whole moments have the same placeholder.
  return found


def factor(
  arrays: Mapping[str, jax.Array],
  whole: Iterable[str],
  shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
  """Replaces whole moments by their means.

  Args:
    arrays: a checkpoint's arrays, by name.
    whole: the result of `names`.
    shardings: shardings of the moments and of their means, by name.

  Returns:
    `arrays`, in the same order, in today's form.
  """
  found = dict(arrays)
  for name in whole:
    shape = factored.matrix_shape(name.split('/'), arrays[name].shape)
    targets = (*_means_of(name), name)
    parts = jax.jit(
      _factored, static_argnums=1, out_shardings=tuple(shardings[target] for target in targets)
    )(arrays[name], shape)
    found |= dict(zip(targets, parts))
  return found


def line(count: int) -> str:
  """Returns a sentence, without a full stop, about `count` factored kernels."""
  return (
    f'the whole second moments of {count} attention kernels, from a checkpoint of an earlier '
    'version, are factored now'
  )


def _means_of(name: str) -> tuple[str, str]:
  state, _, kernel = name.partition('/v/')
  return f'{state}/v_row/{kernel}', f'{state}/v_col/{kernel}'


def _factored(moment, shape: tuple[int, ...]):
  """Returns the means of rows, the means of columns, and the whole moment's placeholder."""
  matrix = moment.reshape(shape)
  axes = factored.axes(shape)
  assert axes is not None
  column, row = axes
  return jnp.mean(matrix, row), jnp.mean(matrix, column), jnp.zeros((1,), moment.dtype)

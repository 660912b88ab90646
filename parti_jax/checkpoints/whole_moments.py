"""Checkpoints of earlier versions, which have whole second moments of attention kernels.

Adafactor's second moment of these kernels is factored today. A factored moment is the means of the
rows and of the columns of the whole one, which is how it is restored: nothing is lost.
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
  """Which arrays of a checkpoint are whole moments of kernels that are factored today.

  Args:
    shapes: of all of the checkpoint's arrays, by the names that `checkpoints.by_path` gives them.
    parameters: how the names of parameters begin, such as 'params/'.
    wanted: the abstract arrays to restore, by name, of which only factored moments count; None
      for whatever the checkpoint has.

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
  """What to restore in place of what is wanted: whole moments, and no means of theirs.

  Args:
    wanted: abstract arrays with shardings, by name, in today's form.
    whole: of `names`.
    parameters: as there.

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
      found[mean] = wanted[name]  # The same placeholder stands for means and for whole moments.
  return found


def factor(
  arrays: Mapping[str, jax.Array],
  whole: Iterable[str],
  shardings: Mapping[str, jax.sharding.Sharding],
) -> dict[str, jax.Array]:
  """Puts the means of whole moments in their place.

  Args:
    arrays: of a checkpoint, by name.
    whole: of `names`.
    shardings: of the moment and of its means, by name.

  Returns:
    `arrays`, in the same order, in today's form.
  """
  found = dict(arrays)
  for name in whole:
    shape = factored.matrix_shape(name.split('/'), arrays[name].shape)
    places = (*_means_of(name), name)
    parts = jax.jit(
      _factored, static_argnums=1, out_shardings=tuple(shardings[place] for place in places)
    )(arrays[name], shape)
    found |= dict(zip(places, parts))
  return found


def line(count: int) -> str:
  """A sentence, without a full stop, about so many kernels."""
  return (
    f'the whole second moments of {count} attention kernels, from a checkpoint of an earlier '
    'version, are factored now'
  )


def _means_of(name: str) -> tuple[str, str]:
  state, _, kernel = name.partition('/v/')
  return f'{state}/v_row/{kernel}', f'{state}/v_col/{kernel}'


def _factored(moment, shape: tuple[int, ...]):
  """Means of rows, means of columns, and the placeholder of the whole moment."""
  matrix = moment.reshape(shape)
  column, row = factored.axes(shape)
  return jnp.mean(matrix, row), jnp.mean(matrix, column), jnp.zeros((1,), moment.dtype)

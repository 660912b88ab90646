"""The config of a generator in a model folder, for runs that train it further."""

from __future__ import annotations

import dataclasses

import gin

from parti_jax.core import checks
from parti_jax.exported_model import model_folder
from parti_jax.models import generators


@gin.configurable
def imported_generator(
  folder: str = gin.REQUIRED,
  dropout: float | None = None,
  dtype: str = 'bfloat16',
  remat: str = 'everything',
  unroll: int = 1,
) -> generators.Config:
  """Returns the config of a folder's generator, for `GeneratorObjective.model`.

  Args:
    folder: a model folder, such as `parti-jax import generator` writes.
    dropout: dropout rate in training; None for the folder's.
    dtype: name of the dtype to compute in.
    remat: what to save for the backward pass.
    unroll: number of layers that each iteration of the scan computes.

  Raises:
    UserError: if the folder has no generator, or a value is invalid.
  """
  config = model_folder.part_config('generator', checks.text('imported_generator.folder', folder))
  given = {'dropout': dropout, 'dtype': dtype, 'remat': remat, 'unroll': unroll}
  fields = {field.name for field in dataclasses.fields(config)}
  return dataclasses.replace(
    config,
    **{name: value for name, value in given.items() if value is not None and name in fields},
  )

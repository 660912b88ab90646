"""Reads and writes the parameters of a network in a model folder: a file of safetensors."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import numpy as np
import safetensors
import safetensors.numpy
from jaxtyping import PyTree

from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names
from parti_jax.exported_model import model_config

# Maximum number of parameter names in an error message.
_SHOWN = 5


def stored(params: PyTree, expected: PyTree, dtype: str, file: str) -> dict[str, np.ndarray]:
  """Checks the parameters of a network and converts them to the stored form.

  Args:
    params: the parameters, with or without axis names.
    expected: abstract parameters of the network.
    dtype: a name in `model_config.STORED_DTYPES`.
    file: name of the file to be written, for messages.

  Returns:
    {path of a parameter: array of the dtype}.

  Raises:
    UserError: if parameters are missing, unknown, of another shape, or not finite in the dtype.
  """
  arrays = {path: np.asarray(leaf) for path, leaf in _flat(params).items()}
  _check_shapes({path: leaf.shape for path, leaf in arrays.items()}, shapes(expected), file)
  converted = {}
  for path, leaf in arrays.items():
    with np.errstate(over='ignore'):
      converted[path] = leaf.astype(model_config.STORED_DTYPES[dtype], order='C')
    if not np.all(np.isfinite(converted[path].astype(np.float32))):
      raise UserError(
        f'{file}: the parameter {path} has values that are not finite as {dtype}; '
        'store the model as float32, or check whether its training diverged'
      )
  return converted


def shapes(expected: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns {path of a parameter: its shape} from abstract parameters of a network."""
  return {path: tuple(leaf.shape) for path, leaf in _flat(expected).items()}


def write(path: pathlib.Path, arrays: Mapping[str, np.ndarray], made_with: Mapping[str, str]):
  """Writes the arrays of `stored`, with fingerprints in the file's metadata."""
  safetensors.numpy.save_file(dict(arrays), path, dict(made_with) or None)


def read(path: pathlib.Path, expected: PyTree) -> dict[str, Any]:
  """Reads a tree of float32 arrays.

  Args:
    path: the file.
    expected: abstract parameters of the network.

  Raises:
    UserError: if the file is damaged, or parameters are missing, unknown or of another shape.
  """
  arrays = {}
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
      _check_shapes(found, shapes(expected), path)
      for name in found:
        arrays[name] = file.get_tensor(name).astype(np.float32)
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return flax.traverse_util.unflatten_dict(arrays, sep='/')


def read_made_with(path: pathlib.Path) -> dict[str, str]:
  """Reads the fingerprints in a file's metadata; files of older versions have none.

  Raises:
    UserError: if the file is damaged.
  """
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      metadata = file.metadata() or {}
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  return {kind: metadata[kind] for kind in fingerprints.KINDS if kind in metadata}


def _flat(tree: PyTree) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(nn.meta.unbox(tree), sep='/')


def _check_shapes(
  found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], file
):
  """Raises UserError unless all expected parameters exist and have the expected shapes."""
  problems = [f'{path} is missing' for path in expected if path not in found]
  problems += [f'{path} is not part of the network' for path in found if path not in expected]
  problems += [
    f'{path} is {list(found[path])} instead of {list(shape)}'
    for path, shape in expected.items()
    if path in found and found[path] != shape
  ]
  if problems:
    more = f', and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
    raise UserError(
      f'{file} does not fit the sizes in {file_names.CONFIG_FILE}: '
      f'{"; ".join(problems[:_SHOWN])}{more}'
    )


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  return UserError(f'{path} is damaged or unfinished ({error}); export or download the model again')

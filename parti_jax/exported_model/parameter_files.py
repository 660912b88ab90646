"""Reads and writes the parameters of a network in a model folder: a file of safetensors."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.traverse_util
import numpy as np
import safetensors
from jaxtyping import PyTree

from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names
from parti_jax.exported_model import model_config

# Maximum number of parameter names in an error message.
_SHOWN = 5
# Names of dtypes in a file of safetensors.
_NAMES = {'float16': 'F16', 'bfloat16': 'BF16', 'float32': 'F32'}


class StoredArray:
  """An array in a parameter file, of which only what is used is read.

  `np.asarray` reads all of it. Indexing with a tuple of slices reads a part. Indexing with an
  integer, and `astype`, read nothing yet.

  Attributes:
    shape: its shape.
    dtype: the dtype that it is converted to when it is read.
  """

  def __init__(
    self,
    file: Any,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype,
    leading: tuple[int, ...] = (),
  ):
    """Refers to an array.

    Args:
      file: the result of `safetensors.safe_open`.
      name: name of the array in the file.
      shape: its shape.
      dtype: the dtype to convert it to.
      leading: indices of the leading axes of the array in the file, of which this is a part.
    """
    self._file, self._name, self._leading = file, name, leading
    self.shape, self.dtype = shape, np.dtype(dtype)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  def astype(self, dtype: Any) -> StoredArray:
    """Returns the same array, to be converted to another dtype."""
    # Rounds once, as the stored values are float32 at most.
    return StoredArray(self._file, self._name, self.shape, np.dtype(dtype), self._leading)

  def __getitem__(self, index: int | tuple[slice, ...]) -> StoredArray | np.ndarray:
    if isinstance(index, int):
      leading = (*self._leading, range(self.shape[0])[index])
      return StoredArray(self._file, self._name, self.shape[1:], self.dtype, leading)
    where = (*self._leading, *index)
    # A slice of an array without axes is an error.
    found = self._file.get_slice(self._name)[where] if where else self._file.get_tensor(self._name)
    if not np.all(np.isfinite(found)):
      raise UserError(
        f'the parameter {self._name} of a model has values that are not finite; export or download '
        'the model again'
      )
    return found.astype(self.dtype, copy=False)

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    del copy  # It is always one.
    found = self[(slice(None),) * self.ndim]
    assert isinstance(found, np.ndarray)
    return found if dtype is None else found.astype(dtype, copy=False)


def check(params: PyTree, expected: PyTree, file: str) -> None:
  """Checks the names and shapes of a network's parameters.

  Args:
    params: the parameters, with or without axis names.
    expected: abstract parameters of the network.
    file: name of the file to be written, for messages.

  Raises:
    UserError: if parameters are missing, unknown or of another shape.
  """
  found = {path: tuple(np.shape(leaf)) for path, leaf in _flat(params).items()}
  _check_shapes(found, shapes(expected), file)


def shapes(expected: PyTree) -> dict[str, tuple[int, ...]]:
  """Returns {path of a parameter: its shape} from abstract parameters of a network."""
  return {path: tuple(leaf.shape) for path, leaf in _flat(expected).items()}


def write(path: pathlib.Path, params: PyTree, dtype: str, made_with: Mapping[str, str]) -> None:
  """Writes the parameters of a network, one array after another.

  Args:
    path: the file.
    params: the parameters, with or without axis names. An array is converted with `np.asarray` when
      it is written, so that lazily read ones are never held together. Of a StoredArray, which may
      have all layers, each layer is read when it is written.
    dtype: a name in `model_config.STORED_DTYPES`.
    made_with: fingerprints for the file's metadata.

  Raises:
    UserError: if a value is not finite in the dtype.
  """
  arrays = dict(sorted(_flat(params).items()))
  stored = np.dtype(model_config.STORED_DTYPES[dtype])
  header: dict[str, Any] = {'__metadata__': dict(sorted(made_with.items()))} if made_with else {}
  start = 0
  for name, leaf in arrays.items():
    end = start + math.prod(np.shape(leaf)) * stored.itemsize
    header[name] = {
      'dtype': _NAMES[dtype],
      'shape': list(np.shape(leaf)),
      'data_offsets': [start, end],
    }
    start = end
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little') + text)
    for name, leaf in arrays.items():
      for part in _parts(leaf):
        with np.errstate(over='ignore'):
          converted = part.astype(stored, order='C', copy=False)
        if not np.all(np.isfinite(converted)):
          raise UserError(
            f'{path.name}: the parameter {name} has values that are not finite as {dtype}; '
            'store the model as float32, or check whether its training diverged'
          )
        # The bytes of the array itself; `tobytes` would copy them.
        file.write(converted.reshape(-1).view(np.uint8).data)


def _parts(leaf: Any) -> Iterator[np.ndarray]:
  """Yields an array, or along the leading axis the arrays that it consists of."""
  if isinstance(leaf, StoredArray) and leaf.ndim > 2:
    yield from (np.asarray(leaf[index]) for index in range(leaf.shape[0]))
  else:
    array = np.asarray(leaf)
    yield from array if array.ndim > 2 else [array]


def read(path: pathlib.Path, expected: PyTree) -> dict[str, Any]:
  """Opens a tree of float32 arrays.

  Args:
    path: the file.
    expected: abstract parameters of the network.

  Returns:
    A tree of StoredArray.

  Raises:
    UserError: if the file is damaged, or parameters are missing, unknown or of another shape.
  """
  try:
    file = safetensors.safe_open(path, framework='numpy')
    slices = {name: file.get_slice(name) for name in file.keys()}
    found = {name: tuple(part.get_shape()) for name, part in slices.items()}
    dtypes = {name: part.get_dtype() for name, part in slices.items()}
  except (safetensors.SafetensorError, OSError) as error:
    raise _damaged(path, error) from error
  _check_shapes(found, shapes(expected), path)
  if other := [
    f'{name} ({dtype})' for name, dtype in dtypes.items() if dtype not in _NAMES.values()
  ]:
    raise _damaged(
      path, ValueError(f'numbers of another kind than stored: {", ".join(other[:_SHOWN])}')
    )
  float32 = np.dtype(np.float32)
  arrays = {name: StoredArray(file, name, shape, float32) for name, shape in found.items()}
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

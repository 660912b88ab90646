"""Lists the arrays in a file of weights by name, without reading their values.

| format | files |
|---|---|
| safetensors | `.safetensors`; several shards; a folder with them |
| torch | `.pt`, `.pth`, `.bin`, `.ckpt` (`parti_jax.importers.torch_files`) |
| Flax msgpack | `.msgpack`, or no ending (`parti_jax.importers.flax_files`) |
| numpy | `.npz` |
| t5x | a folder `checkpoint_<step>` (`parti_jax.importers.t5x_files`) |
"""

from __future__ import annotations

import dataclasses
import hashlib
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import safetensors

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.importers import flax_files
from parti_jax.importers import key_map
from parti_jax.importers import npz_files
from parti_jax.importers import t5x_files
from parti_jax.importers import torch_files

_TORCH = ('.pt', '.pth', '.bin', '.ckpt')
_ENDINGS = ('.safetensors', *_TORCH, '.msgpack', '.npz')


@dataclasses.dataclass(frozen=True)
class Weights:
  """The arrays of one or several files.

  Attributes:
    files: the opened files; for a t5x checkpoint, its folder.
    arrays: {name: array}.
  """

  files: tuple[pathlib.Path, ...]
  arrays: Mapping[str, key_map.StoredArray]

  def digest(self) -> str:
    """SHA-256 of the files' contents, in their order: 64 hexadecimal digits."""
    found = hashlib.sha256()
    for file in (part for given in self.files for part in _contents(given)):
      with open(file, 'rb') as content:
        while block := content.read(2**20):
          found.update(block)
    return found.hexdigest()


def open_weights(paths: Sequence[str]) -> Weights:
  """Lists the arrays in files of weights.

  Args:
    paths: files of one format, or one folder. Of a folder, the files of one format are taken:
      safetensors if it has any, as that is the safest and fastest one to read. A t5x checkpoint
      is one folder.

  Raises:
    UserError: if a file is missing, damaged or of another format, or two of them have an array of
      the same name.
  """
  files = tuple(file for path in paths for file in _files(pathlib.Path(path)))
  if not files:
    raise UserError('no files of weights are given')
  arrays: dict[str, key_map.StoredArray] = {}
  for file in files:
    for name, array in _open(file).items():
      if name in arrays:
        raise UserError(f'{file}: the array {name} is in another of the given files too')
      arrays[name] = array
  return Weights(files, arrays)


def interpolated(first: Weights, second: Weights, share: float) -> Weights:
  """Returns the weights between two files of one network: share · first + (1 - share) · second.

  Args:
    first: weights.
    second: weights with arrays of the same names and shapes.
    share: a number in [0, 1].

  Raises:
    UserError: if the share is another number, or the files have different arrays.
  """
  if not 0 <= share <= 1:
    raise UserError(f'the share {share} of the first weights must lie in [0, 1]')
  both = ' and '.join(', '.join(map(str, weights.files)) for weights in (first, second))
  if different := sorted(set(first.arrays) ^ set(second.arrays)):
    raise UserError(f'{both} have different arrays, such as {different[0]}')
  arrays: dict[str, key_map.StoredArray] = {}
  for name, array in first.arrays.items():
    other = second.arrays[name]
    shapes = [tuple(found.shape) for found in (array, other)]
    if shapes[0] != shapes[1]:
      raise UserError(f'{both} have arrays {name} of different shapes: {shapes[0]}, {shapes[1]}')
    floats = all(jnp.issubdtype(found.dtype, jnp.floating) for found in (array, other))
    arrays[name] = _Interpolated(array, other, share) if floats else array
  return Weights((*first.files, *second.files), arrays)


@dataclasses.dataclass(frozen=True)
class _Interpolated:
  first: key_map.StoredArray
  second: key_map.StoredArray
  share: float
  dtype = np.dtype(np.float32)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.first.shape

  def read(self) -> np.ndarray:
    first, second = (np.asarray(array.read(), np.float32) for array in (self.first, self.second))
    return np.float32(self.share) * first + np.float32(1 - self.share) * second


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files of a path."""
  try:
    is_folder, is_file = path.is_dir(), path.is_file()
  except OSError as error:  # Such as a name that is too long.
    raise UserError(f'{path} cannot be read ({error.strerror or error})') from error
  if is_file and path.name.endswith('.index.json'):
    return _shards(path)
  if is_folder:
    for ending in _ENDINGS:
      found = sorted(file for file in path.glob(f'*{ending}') if file.is_file())
      indices = sorted(path.glob(f'*{ending}.index.json'))
      if len(indices) == 1:
        return _shards(indices[0])
      if len(found) > 1:
        raise UserError(
          f'{path} has {len(found)} files {ending}: {", ".join(file.name for file in found[:5])}; '
          'give the one to read, or all shards'
        )
      if found:
        return found
    if t5x_files.is_checkpoint(path):
      return [path]
    steps = sorted(folder.name for folder in path.glob('checkpoint_*'))
    hint = f'; give one of its checkpoints, such as {path / steps[-1]}' if steps else ''
    raise UserError(f'{path} has no file of weights ({", ".join(_ENDINGS)}){hint}')
  if not is_file:
    raise UserError(f'{path} does not exist')
  return [path]


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that an index of the Hugging Face libraries names."""
  try:
    names = set(storage.read_json(index)['weight_map'].values())
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise UserError(f"{index} isn't an index of shards: {error!r}") from error
  if any(not isinstance(name, str) or pathlib.PurePath(name).name != name for name in names):
    raise UserError(f'{index} names files in other folders')
  missing = sorted(name for name in names if not (index.parent / name).is_file())
  if missing:
    raise UserError(f'{index.parent} lacks {len(missing)} shards, such as {missing[0]}')
  return [index.parent / name for name in sorted(names)]


def _contents(file: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files in a folder in a fixed order, or the file itself."""
  return sorted(part for part in file.rglob('*') if part.is_file()) if file.is_dir() else [file]


def _open(file: pathlib.Path) -> Mapping[str, key_map.StoredArray]:
  if file.is_dir():
    return t5x_files.open_checkpoint(file)
  match file.suffix:
    case '.safetensors':
      return dict(_safetensors(file))
    case '.npz':
      return _npz(file)
    case '.msgpack' | '':
      return flax_files.open_flax_file(file)
    case ending if ending in _TORCH:
      return torch_files.open_torch_file(file)
  raise UserError(f'{file}: weights are read from {", ".join(_ENDINGS)}')


@dataclasses.dataclass(frozen=True)
class _SafetensorsArray:
  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self) -> np.ndarray:
    try:
      with safetensors.safe_open(self.file, framework='numpy') as opened:
        return opened.get_tensor(self.name)
    except (safetensors.SafetensorError, OSError) as error:
      raise UserError(f'{self.file} is damaged at {self.name}: {error}') from error


_SAFETENSORS_DTYPES = {
  'F64': np.float64,
  'F32': np.float32,
  'F16': np.float16,
  'BF16': jnp.bfloat16,
  'I64': np.int64,
  'I32': np.int32,
  'I16': np.int16,
  'I8': np.int8,
  'U8': np.uint8,
  'BOOL': np.bool_,
}


def _safetensors(file: pathlib.Path) -> Iterator[tuple[str, _SafetensorsArray]]:
  try:
    with safetensors.safe_open(file, framework='numpy') as opened:
      for name in opened.keys():
        part = opened.get_slice(name)
        if part.get_dtype() not in _SAFETENSORS_DTYPES:
          raise UserError(f'{file}: {name} is of {part.get_dtype()}, which is not read')
        dtype = np.dtype(_SAFETENSORS_DTYPES[part.get_dtype()])
        yield name, _SafetensorsArray(file, name, tuple(part.get_shape()), dtype)
  except (safetensors.SafetensorError, OSError) as error:
    raise UserError(f'{file} is damaged or unfinished ({error}); download it again') from error


def _npz(file: pathlib.Path) -> dict[str, key_map.StoredArray]:
  # numpy has no name for bfloat16, and stores it as two bytes without a meaning.
  return {
    name: dataclasses.replace(array, dtype=np.dtype(jnp.bfloat16))
    if array.dtype == np.dtype('V2')
    else array
    for name, array in npz_files.open_npz(file).items()
  }

"""The arrays in a file of weights, by name, listed without reading their values.

| format | files |
|---|---|
| safetensors | `.safetensors`; several shards; a folder with them |
| torch | `.pt`, `.pth`, `.bin`, `.ckpt` (`parti_jax.importers.torch_files`) |
| Flax msgpack | `.msgpack`, or no ending |
| numpy | `.npz` |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import mmap
import pathlib
import zipfile
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np
import safetensors

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.importers import key_map
from parti_jax.importers import torch_files

_TORCH = ('.pt', '.pth', '.bin', '.ckpt')
_ENDINGS = ('.safetensors', *_TORCH, '.msgpack', '.npz')
# Flax stores an array as an extension of this type, and larger ones than 2³⁰ bytes in pieces.
_FLAX_ARRAY = 1
_FLAX_PIECES = '__msgpack_chunked_array__'


@dataclasses.dataclass(frozen=True)
class Weights:
  """The arrays of one or several files.

  Attributes:
    files: that were opened.
    arrays: {name: array}.
  """

  files: tuple[pathlib.Path, ...]
  arrays: Mapping[str, key_map.StoredArray]

  def digest(self) -> str:
    """SHA-256 of the files' contents, in their order: 64 hexadecimal digits."""
    found = hashlib.sha256()
    for file in self.files:
      with open(file, 'rb') as content:
        while block := content.read(2**20):
          found.update(block)
    return found.hexdigest()


def open_weights(paths: Sequence[str]) -> Weights:
  """Lists the arrays in files of weights.

  Args:
    paths: files of one format, or one folder. Of a folder, the files of one format are taken:
      safetensors if it has any, as that is the safest and fastest one to read.

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


def _files(path: pathlib.Path) -> list[pathlib.Path]:
  """The files that a path stands for."""
  if path.name.endswith('.index.json'):
    return _shards(path)
  if path.is_dir():
    for ending in _ENDINGS:
      found = sorted(path.glob(f'*{ending}'))
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
    raise UserError(f'{path} has no file of weights ({", ".join(_ENDINGS)})')
  if not path.is_file():
    raise UserError(f'{path} does not exist')
  return [path]


def _shards(index: pathlib.Path) -> list[pathlib.Path]:
  """The files that an index of the Hugging Face libraries names."""
  storage.check_size(index, storage.MAX_JSON)
  try:
    names = set(json.loads(index.read_text(encoding='utf-8'))['weight_map'].values())
  except (OSError, ValueError, KeyError, AttributeError) as error:
    raise UserError(f"{index} isn't an index of shards: {error!r}") from error
  if any(not isinstance(name, str) or pathlib.PurePath(name).name != name for name in names):
    raise UserError(f'{index} names files in other folders')
  missing = sorted(name for name in names if not (index.parent / name).is_file())
  if missing:
    raise UserError(f'{index.parent} lacks {len(missing)} shards, such as {missing[0]}')
  return [index.parent / name for name in sorted(names)]


def _open(file: pathlib.Path) -> Mapping[str, key_map.StoredArray]:
  match file.suffix:
    case '.safetensors':
      return dict(_safetensors(file))
    case '.npz':
      return dict(_npz(file))
    case '.msgpack' | '':
      return _msgpack(file)
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
    with safetensors.safe_open(self.file, framework='numpy') as opened:
      return opened.get_tensor(self.name)


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


@dataclasses.dataclass(frozen=True)
class _NpzArray:
  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self) -> np.ndarray:
    try:
      with np.load(self.file, allow_pickle=False) as opened:
        return opened[self.name].view(self.dtype)
    except (OSError, ValueError, zipfile.BadZipFile, KeyError) as error:
      raise UserError(f'{self.file} is damaged at {self.name}: {error}') from error


def _npz(file: pathlib.Path) -> Iterator[tuple[str, _NpzArray]]:
  readers = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
  }
  try:
    with zipfile.ZipFile(file) as archive:
      for member in archive.namelist():
        name = member.removesuffix('.npy')
        with archive.open(member) as content:
          shape, _, dtype = readers[np.lib.format.read_magic(content)](content)
        if dtype.hasobject:
          raise UserError(f'{file}: {name} holds Python objects, which are not read')
        # numpy has no name for bfloat16, and stores it as two bytes without a meaning.
        dtype = np.dtype(jnp.bfloat16) if dtype == np.dtype('V2') else dtype
        yield name, _NpzArray(file, name, shape, dtype)
  except (OSError, ValueError, KeyError, zipfile.BadZipFile, EOFError) as error:
    raise UserError(f"{file} isn't a file of numpy.savez, or is damaged: {error!r}") from error


@dataclasses.dataclass(frozen=True)
class _MsgpackArray:
  """An array in a file of Flax's msgpack: its bytes lie in pieces, (start, length) in the file."""

  file: pathlib.Path
  shape: tuple[int, ...]
  dtype: np.dtype
  pieces: tuple[tuple[int, int], ...]

  def read(self) -> np.ndarray:
    content = bytearray()
    with open(self.file, 'rb') as opened:
      for start, length in self.pieces:
        opened.seek(start)
        content += opened.read(length)
    if len(content) != math.prod(self.shape) * self.dtype.itemsize:
      raise UserError(f'{self.file} has become shorter while it was read')
    return np.frombuffer(content, self.dtype).reshape(self.shape)


def _msgpack(file: pathlib.Path) -> dict[str, _MsgpackArray]:
  try:
    with (
      open(file, 'rb') as opened,
      mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
      walk = _MsgpackWalk(file, content)
      leaves = dict(walk.leaves())
      if walk.place != len(content):
        raise ValueError(f'{len(content) - walk.place} bytes follow its end')
    arrays = _joined(leaves)
  except (OSError, ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
    raise UserError(f"{file} isn't a file of Flax's msgpack, or is damaged: {error!r}") from error
  if not arrays:
    raise UserError(f'{file} holds no arrays')
  return arrays


def _joined(leaves: Mapping[str, Any]) -> dict[str, _MsgpackArray]:
  """The arrays among the leaves; those that are stored in pieces are put together.

  Flax stores the array `name` in pieces `name/chunks/0` and so on, with its sizes `name/shape/0`
  and so on, and a mark.
  """
  arrays = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, _MsgpackArray)}
  for mark in [name for name in leaves if name.rpartition('/')[2] == _FLAX_PIECES]:
    name = mark.rpartition('/')[0]
    within = f'{name}/'.lstrip('/')
    pieces = _numbered(arrays, f'{within}chunks/')
    shape = tuple(_numbered(leaves, f'{within}shape/'))
    for index in range(len(pieces)):
      del arrays[f'{within}chunks/{index}']
    joined = dataclasses.replace(
      pieces[0], shape=shape, pieces=tuple(part for piece in pieces for part in piece.pieces)
    )
    size = sum(math.prod(piece.shape) for piece in pieces)
    if math.prod(shape) != size or any(piece.dtype != joined.dtype for piece in pieces):
      raise ValueError(f'{name} has {size} values in its pieces instead of {shape}')
    arrays[name] = joined
  return arrays


def _numbered(leaves: Mapping[str, Any], prefix: str) -> list[Any]:
  found: list[Any] = []
  while (name := f'{prefix}{len(found)}') in leaves:
    found.append(leaves[name])
  return found


class _MsgpackWalk:
  """Finds the values in a msgpack without copying its arrays, as a msgpack library would.

  Attributes:
    place: of the next byte to look at.
  """

  _MAX_DEPTH = 100
  # First byte -> bytes of the length that follows it, of maps, extensions and bytes.
  _LENGTHS = {0xDE: 2, 0xDF: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}
  _FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
  # A name or a scalar is no longer than this.
  _LONGEST = 2**16

  def __init__(self, file: pathlib.Path, content: mmap.mmap):
    self._file = file
    self._content = content
    self.place = 0

  def leaves(self, name: str = '', depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the name and the value of every leaf, which is an array or a scalar."""
    if depth > self._MAX_DEPTH:
      raise ValueError('nested too deeply')
    first = self._content[self.place]
    if 0x80 <= first <= 0x8F or first in (0xDE, 0xDF):
      if first <= 0x8F:
        count = first & 0x0F
        self.place += 1
      else:
        count = self._length()
      for _ in range(count):
        yield from self.leaves(f'{name}/{self._small()}'.removeprefix('/'), depth + 1)
    elif first in self._FIXED_EXTENSIONS or first in (0xC7, 0xC8, 0xC9):
      yield name, self._extension()
    else:
      yield name, self._small()

  def _length(self) -> int:
    """Reads the length that follows a first byte."""
    start = self.place + 1
    self.place = start + self._LENGTHS[self._content[self.place]]
    return int.from_bytes(self._content[start : self.place], 'big')

  def _small(self):
    """Reads a name or a scalar."""
    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False, max_buffer_size=self._LONGEST)
    unpacker.feed(self._content[self.place : self.place + self._LONGEST])
    found = unpacker.unpack()
    self.place += unpacker.tell()
    return found

  def _extension(self) -> _MsgpackArray | None:
    """Reads an extension: an array, or None for a scalar of numpy."""
    first = self._content[self.place]
    if first in self._FIXED_EXTENSIONS:
      length = self._FIXED_EXTENSIONS[first]
      self.place += 1
    else:
      length = self._length()
    kind, start = self._content[self.place], self.place + 1
    end = start + length
    if end > len(self._content):
      raise ValueError('it ends within an array')
    self.place = start
    array = self._array(end) if kind == _FLAX_ARRAY else None
    self.place = end
    return array

  def _array(self, end: int) -> _MsgpackArray:
    """Reads an array: a msgpack of its shape, the name of its dtype, and its bytes."""
    if self._content[self.place] != 0x93:
      raise ValueError('an array without shape, dtype and values')
    self.place += 1
    shape, name, length = tuple(self._small()), self._small(), self._length()
    dtype = np.dtype(jnp.dtype(name))
    if self.place + length != end or math.prod(shape) * dtype.itemsize != length:
      raise ValueError(f'an array {shape} of {name} with {length} bytes')
    return _MsgpackArray(self._file, shape, dtype, ((self.place, length),))

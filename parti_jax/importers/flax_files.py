"""Lists the arrays in a file of Flax's msgpack, without reading their values."""

from __future__ import annotations

import dataclasses
import math
import mmap
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import msgpack
import numpy as np

from parti_jax.core.errors import UserError

# Flax stores an array as an extension of this type, and larger ones than 2³⁰ bytes in pieces.
_FLAX_ARRAY = 1
_FLAX_PIECES = '__msgpack_chunked_array__'


@dataclasses.dataclass(frozen=True)
class _MsgpackArray:
  """An array in a file of Flax's msgpack, stored as pieces (start, length) of the file."""

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


def open_flax_file(file: pathlib.Path) -> dict[str, _MsgpackArray]:
  """Lists the arrays in a file of Flax's msgpack.

  Returns:
    {name: array}, with the keys of a nested tree joined by '/'.

  Raises:
    UserError: if the file is damaged, of another format, or has no arrays.
  """
  arrays = {
    name: leaf for name, leaf in read_leaves(file).items() if isinstance(leaf, _MsgpackArray)
  }
  if not arrays:
    raise UserError(f'{file} holds no arrays; of a t5x checkpoint, give the folder')
  return arrays


def read_leaves(file: pathlib.Path) -> dict[str, Any]:
  """Lists the arrays in a file of Flax's msgpack, and reads its strings and scalars.

  Returns:
    {name: array or value}, with the keys of a nested tree joined by '/'.

  Raises:
    UserError: if the file is damaged or of another format.
  """
  try:
    with (
      open(file, 'rb') as opened,
      mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
      walk = _MsgpackWalk(file, content)
      leaves: dict[str, Any] = {}
      for name, leaf in walk.leaves():
        if name in leaves:
          raise ValueError(f'two values are named {name}')
        leaves[name] = leaf
      if walk.place != len(content):
        raise ValueError(f'{len(content) - walk.place} bytes follow its end')
    values = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, _MsgpackArray)}
    return values | _joined(leaves)
  except (OSError, ValueError, TypeError, KeyError, IndexError, msgpack.UnpackException) as error:
    raise UserError(f"{file} isn't a file of Flax's msgpack, or is damaged: {error!r}") from error


def _joined(leaves: Mapping[str, Any]) -> dict[str, _MsgpackArray]:
  """Returns the arrays among the leaves; joins those that are stored in pieces.

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
    place: position of the next byte.
  """

  _MAX_DEPTH = 100
  # First byte -> bytes of the length that follows it, of maps, extensions and bytes.
  _LENGTHS = {0xDE: 2, 0xDF: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xC4: 1, 0xC5: 2, 0xC6: 4}
  _FIXED_EXTENSIONS = {0xD4: 1, 0xD5: 2, 0xD6: 4, 0xD7: 8, 0xD8: 16}
  # A name or a scalar is no longer than this.
  _LONGEST = 2**16
  # Maximum characters of all names on the way to a value.
  _LONGEST_NAME = 10_000

  def __init__(self, file: pathlib.Path, content: mmap.mmap):
    self._file = file
    self._content = content
    self.place = 0

  def leaves(self, name: str = '', depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields the name and the value of every leaf, which is an array or a scalar."""
    if depth > self._MAX_DEPTH:
      raise ValueError('nested too deeply')
    if len(name) > self._LONGEST_NAME:
      raise ValueError(f'a name of more than {self._LONGEST_NAME} characters')
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

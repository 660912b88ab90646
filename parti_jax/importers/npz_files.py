"""Lists the arrays in files of `numpy.savez`, and reads them whole or by rows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import pathlib
import zipfile
from collections.abc import Iterator

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.importers import torch_files

# Deflate packs a byte of zeros in no less than 1 / 1032 bytes; more is a false size.
_MOST_PACKED = 1100
_HEADERS = {
  (1, 0): np.lib.format.read_array_header_1_0,
  (2, 0): np.lib.format.read_array_header_2_0,
}


@dataclasses.dataclass(frozen=True)
class NpzArray:
  """An array in a file.

  Attributes:
    file: the file.
    name: name of the array.
    shape: its shape.
    dtype: its dtype.
    by_columns: whether its first axis varies fastest (Fortran's order).
    start: position of the first value in the member of the zip, in bytes.
    crc: checksum of the member's content, from the zip's directory.
  """

  file: pathlib.Path
  name: str
  shape: tuple[int, ...]
  dtype: np.dtype
  by_columns: bool
  start: int
  crc: int

  def read(self) -> np.ndarray:
    """Reads the array.

    Raises:
      UserError: the file is damaged there.
    """
    values = self._values(0, math.prod(self.shape))
    return values.reshape(self.shape, order='F' if self.by_columns else 'C')

  def rows(self, start: int, stop: int) -> np.ndarray:
    """Reads the rows from `start` to before `stop`, and no others into memory.

    Raises:
      UserError: the file is damaged there.
      ValueError: the array isn't stored by rows.
    """
    if self.by_columns:
      raise ValueError(f'{self.name} is not stored by rows')
    size = math.prod(self.shape[1:])
    return self._values(start * size, stop * size).reshape(-1, *self.shape[1:])

  def _values(self, start: int, stop: int) -> np.ndarray:
    size = self.dtype.itemsize
    with _damaged(self.file, self.name), zipfile.ZipFile(self.file) as archive:
      with archive.open(f'{self.name}.npy') as member:
        member.seek(self.start + start * size)
        content = member.read((stop - start) * size)
    if len(content) != (stop - start) * size:
      raise UserError(f'{self.file} is damaged at {self.name}: it ends too early')
    return np.frombuffer(content, self.dtype)


@contextlib.contextmanager
def _damaged(file: pathlib.Path, name: str) -> Iterator[None]:
  try:
    yield
  except (*torch_files.ZIP_ERRORS, KeyError) as error:
    raise UserError(f'{file} is damaged at {name}: {error}') from error


def open_npz(file: pathlib.Path) -> dict[str, NpzArray]:
  """Lists the arrays in a file, without reading their values.

  Args:
    file: the file, compressed or not.

  Raises:
    UserError: it isn't such a file, is damaged, or holds Python objects.
  """
  found = {}
  try:
    with zipfile.ZipFile(file) as archive:
      for member, info in torch_files.members_of(archive).items():
        name = member.removesuffix('.npy')
        if member == name:
          raise ValueError(f'{member} is not a .npy')
        with archive.open(member) as content:
          shape, by_columns, dtype = _HEADERS[np.lib.format.read_magic(content)](content)
          start = content.tell()
        if dtype.hasobject:
          raise UserError(f'{file}: {name} holds Python objects, which are not read')
        size = info.file_size - start
        if math.prod(shape) * dtype.itemsize != size or info.file_size > _MOST_PACKED * max(
          info.compress_size, 1
        ):
          raise ValueError(f'{name} {list(shape)} of {dtype} has {size} bytes')
        found[name] = NpzArray(file, name, shape, dtype, by_columns, start, info.CRC)
  except (*torch_files.ZIP_ERRORS, KeyError) as error:
    raise UserError(f"{file} isn't a file of numpy.savez, or is damaged: {error!r}") from error
  return found

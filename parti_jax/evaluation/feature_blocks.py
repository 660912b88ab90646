"""Arrays that networks compute of blocks of pictures, kept in files so that a command can resume.

A store is a folder with `NAME_000012.npz` for block 12 and, once all blocks are known, `NAME_end.json`
with their number. Several processes that share the folder fill one store together.
"""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation import output_folder
from parti_jax.importers import npz_files

FOLDER = 'features'
# Array of a block that holds JSON: counts and digests.
_FACTS = 'facts'


class Store:
  """The blocks of one set of pictures.

  Args:
    folder: folder of the output; blocks are in its folder `FOLDER`.
    name: name of the set.
  """

  def __init__(self, folder: pathlib.Path, name: str):
    self._folder, self._name = folder / FOLDER, name
    self._folder.mkdir(exist_ok=True)

  def has(self, index: int) -> bool:
    """Returns whether a block is there."""
    return self._path(index).exists()

  def write(self, index: int, arrays: Mapping[str, np.ndarray], facts: Mapping[str, Any]) -> None:
    """Writes a block.

    Args:
      index: its index.
      arrays: its arrays; rows are pictures, but not all arrays have one for each picture.
      facts: JSON.

    Raises:
      UserError: it can't be written.
    """
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(facts).encode(), np.uint8)
    content: dict[str, Any] = {**arrays, _FACTS: text}
    np.savez(buffer, **content)
    output_folder.write(self._path(index), buffer.getvalue())

  @property
  def count(self) -> int | None:
    """Number of blocks; None if it isn't known yet."""
    try:
      found = storage.read_json(self._end)['blocks']
      return found if isinstance(found, int) else None
    except OSError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{self._end} is damaged; delete it and run the command again') from error

  @count.setter
  def count(self, blocks: int) -> None:
    output_folder.write(self._end, json.dumps({'blocks': blocks}).encode())

  def missing(self) -> list[int]:
    """Returns the indices of the blocks that are not there yet."""
    return [index for index in range(self.count or 0) if not self.has(index)]

  def facts(self) -> Iterator[dict[str, Any]]:
    """Yields the facts of each block in order."""
    for arrays in self._opened():
      yield json.loads(self._read(arrays, _FACTS).tobytes())

  def arrays(self, name: str) -> Iterator[np.ndarray]:
    """Yields an array of each block in order, one at a time; blocks may lack it.

    Raises:
      UserError: a block is damaged.
    """
    for arrays in self._opened():
      if name in arrays:
        yield self._read(arrays, name)

  def _opened(self) -> Iterator[dict[str, npz_files.NpzArray]]:
    for index in range(self.count or 0):
      path = self._path(index)
      try:
        yield npz_files.open_npz(path)
      except UserError as error:
        raise UserError(f'{error}; delete {path} and run the command again') from error

  def _read(self, arrays: Mapping[str, npz_files.NpzArray], name: str) -> np.ndarray:
    if name not in arrays:
      raise UserError(
        f'a block of {self._folder} lacks {name}; delete it and run the command again'
      )
    return arrays[name].read()

  @property
  def _end(self) -> pathlib.Path:
    return self._folder / f'{self._name}_end.json'

  def _path(self, index: int) -> pathlib.Path:
    return self._folder / f'{self._name}_{index:06d}.npz'

"""Paths of sources from gin, and the files of a split."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping

import gin

from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import file_patterns
from parti_jax.data.sources import base

Reader = Callable[[str], Iterator[base.Example | Damaged]]


def required(name: str, path: str | None) -> str:
  """Returns a path that gin must set; raises UserError if it doesn't."""
  if path is None:
    scope = ''.join(f'{part}/' for part in gin.current_scope())
    raise UserError(f'{scope}{name}.path is not set; give --gin.{scope}{name}.path="\'FOLDER\'"')
  return path


class FilesSource(base.Source):
  """A source whose splits are files of many examples.

  Args:
    name: name of the source.
    path: the folder of the files.
    splits: file pattern of each split, relative to the folder, in the syntax of `file_patterns`.
  """

  def __init__(self, name: str, path: str, splits: Mapping[str, str]):
    super().__init__(name, splits)
    self.place = f'{name} {path}'
    self._patterns = {split: file_patterns.join(path, pattern) for split, pattern in splits.items()}

  def files(self, split: str) -> list[str]:
    """Returns the files of a split.

    Raises:
      UserError: the split doesn't exist, or no file matches.
    """
    self.check_split(split)
    try:
      files = file_patterns.files(self._patterns[split])
    except UserError as error:
      raise UserError(
        f'{self.name}: {error} (gin: {self.name}.path, {self.name}.splits)'
      ) from error
    if not files:
      raise UserError(
        f'{self.name}: no file matches {self._patterns[split]!r} '
        f'(gin: {self.name}.path, {self.name}.splits)'
      )
    return files


class Files(base.Shards):
  """Files with a common reader; tolerates files that have become unreadable.

  Args:
    files: paths or URLs.
    reader: yields the examples of a file.
  """

  def __init__(self, files: list[str], reader: Reader):
    self.files, self._reader = files, reader

  def read(self, file: str) -> Iterator[base.Example | Damaged]:
    named = set()
    try:
      for example in self._reader(file):
        if isinstance(example, Damaged):
          # Warns only about the first named thing per file and reason.
          seen = bool(example.name) and example.reason in named
          named.add(example.reason)
          yield Damaged(example.reason, example.name, '' if seen else file)
        else:
          yield example
    except OSError:
      yield Damaged('file that is gone or cannot be read', file=file)

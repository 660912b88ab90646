"""Divides a source's examples into the parts of which one shard each is made."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import xxhash

from parti_jax import storage
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import base
from parti_jax.errors import UserError
from parti_jax.preparation.settings import Settings

# Examples that are read at once from a source with an index.
_AT_ONCE = 64
# Examples in which a column must be found.
_LOOKED_AT = 100


class Part(NamedTuple):
  """Examples of which one shard is made.

  Attributes:
    number: of the shard.
    files: that are read, for a source of files.
    start: index of the first example, for a source with an index.
    stop: one more than that of the last.
  """

  number: int
  files: tuple[str, ...] = ()
  start: int = 0
  stop: int = 0


class Work:
  """A split of a source, which is opened when it is first read; picklable.

  A copy in another process lists the source's files itself, since a pipeline can't hold the names of
  millions. Both lists are compared.

  Args:
    source: the source.
    split: the split.
    settings: how it is divided.
  """

  def __init__(self, source: base.Source, split: str, settings: Settings):
    self._source, self._split, self._settings = source, split, settings
    self._fingerprint: str | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items()
            if name not in ('_opened', 'parts')}

  @functools.cached_property
  def _opened(self) -> base.Records | base.Shards:
    return self._source.open_described(self._split)

  @functools.cached_property
  def parts(self) -> list[Part]:
    """The parts, in the source's order.

    Raises:
      UserError: the source can't be read, or has changed since this object was pickled.
    """
    parts = self._divided()
    found = xxhash.xxh3_64_hexdigest(repr(parts).encode('utf-8', 'surrogateescape'))
    if self._fingerprint not in (None, found):
      raise UserError(f'{self._source.place}: files were added or removed since the command began; '
                      'start it again when the source is complete')
    self._fingerprint = found
    return parts

  def _divided(self) -> list[Part]:
    if isinstance(self._opened, base.Shards):
      size, files = self._settings.files_per_shard, self._opened.files
      return [Part(start // size, tuple(files[start:start + size]))
              for start in range(0, len(files), size)]
    size, count = self._settings.examples_per_shard, len(self._opened)
    return [Part(start // size, (), start, min(start + size, count))
            for start in range(0, count, size)]

  def read(self, part: Part) -> Iterator[tuple[str, base.Example | Damaged]]:
    """Yields the examples of a part, each with a key for it if it has none."""
    for file in part.files:
      for number, example in enumerate(self._opened.read(file)):
        yield f'{storage.name(file)}:{number}', example
    for start in range(part.start, part.stop, _AT_ONCE):
      indices = range(start, min(start + _AT_ONCE, part.stop))
      for index, example in zip(indices, self._opened.read(indices)):
        yield f'{index}', example

  def check_columns(self) -> None:
    """Raises UserError if none of the first examples has a column that the settings name."""
    names = {*self._settings.columns, *(self._settings.keep_columns or ())}
    if not names:
      return
    found, read = set(), 0
    examples = (example for part in self.parts[:1] for _, example in self.read(part))
    for example in itertools.islice(examples, _LOOKED_AT):
      found |= example.get('columns', {}).keys() if not isinstance(example, Damaged) else set()
      read += 1
    if missing := sorted(names - found):
      there = f'which have {", ".join(sorted(found)[:50])}' if found else 'which have no columns'
      raise UserError(f'{self._source.place}: no column {missing[0]!r} in the first {read} '
                      f'examples, {there} (gin: prepare.columns, prepare.keep_columns)')

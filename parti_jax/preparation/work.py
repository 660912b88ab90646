"""Divides a source's examples into shards."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from typing import Any

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import input_parts
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import base
from parti_jax.preparation.settings import Settings

# Examples read at once from a source with an index.
_AT_ONCE = 64
# Number of examples that are searched for the columns.
_LOOKED_AT = 100


class Work:
  """A split of a source, divided into the examples of each shard; picklable.

  The split is opened at the first read. A copy in another process lists the source's files itself,
  since a pipeline can't hold the names of millions of files; then both lists are compared.

  Args:
    source: the source.
    split: the split.
    settings: the sizes of shards.
  """

  def __init__(self, source: base.Source, split: str, settings: Settings):
    self._source, self._split, self._settings = source, split, settings
    self._description: dict[str, Any] | None = None

  def __getstate__(self) -> dict[str, Any]:
    return {
      name: value for name, value in self.__dict__.items() if name not in ('_opened', '_parts')
    }

  def __len__(self) -> int:
    return -(-len(self._parts) // self._parts_per_shard)

  @functools.cached_property
  def _opened(self) -> base.Records | base.Shards:
    return self._source.open_described(self._split)

  @functools.cached_property
  def _parts(self) -> input_parts.InputParts:
    parts = input_parts.InputParts(self._opened, self._settings.examples_per_shard)
    found = parts.description()
    if self._description not in (None, found):
      raise UserError(
        f'{self._source.place} has changed since the command began; start it again '
        'when the source is complete'
      )
    self._description = found
    return parts

  @property
  def _parts_per_shard(self) -> int:
    return self._settings.files_per_shard if isinstance(self._opened, base.Shards) else 1

  def read(self, number: int) -> Iterator[tuple[str, base.Example | Damaged]]:
    """Yields the examples of a shard, each with a default key.

    Raises:
      UserError: the source can't be read, or has changed since this object was pickled.
    """
    count = self._parts_per_shard
    for index in range(number * count, min((number + 1) * count, len(self._parts))):
      opened = self._parts.open(index)
      if isinstance(opened, base.Shards):
        (file,) = opened.files
        for position, example in enumerate(opened.read(file)):
          yield f'{storage.name(file)}:{position}', example
        continue
      first = index * self._settings.examples_per_shard
      for start in range(0, len(opened), _AT_ONCE):
        indices = range(start, min(start + _AT_ONCE, len(opened)))
        for position, example in zip(indices, opened.read(indices)):
          yield f'{first + position}', example

  def check_columns(self) -> None:
    """Raises UserError if none of the first examples has a column that the settings name."""
    names = {*self._settings.columns, *(self._settings.keep_columns or ())}
    if not names:
      return
    found: set[str] = set()
    read = 0
    for _, example in itertools.islice(self.read(0), _LOOKED_AT):
      found |= example.get('columns', {}).keys() if not isinstance(example, Damaged) else set()
      read += 1
    if missing := sorted(names - found):
      there = f'which have {", ".join(sorted(found)[:50])}' if found else 'which have no columns'
      raise UserError(
        f'{self._source.place}: no column {missing[0]!r} in the first {read} '
        f'examples, {there} (gin: prepare.columns, prepare.keep_columns)'
      )

"""Writes a shard of prepared examples, and takes the duplicates out of it."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache
from parti_jax.data import token_cache_info
from parti_jax.data.damage import Damaged
from parti_jax.data.damage import Unusable
from parti_jax.data.readers import array_records
from parti_jax.preparation import examples as examples_lib
from parti_jax.preparation.duplicates import Row
from parti_jax.preparation.settings import Settings

# Damaged places that a shard names.
_MOST_PLACES = 10
_AT_ONCE = 256


@dataclasses.dataclass
class Outcome:
  """What became of a part's examples.

  Attributes:
    number: of the part and its shard.
    read: places of the source, damaged ones included.
    left_out: reason -> examples that were left out.
    notes: what was ignored or cut -> examples that were kept.
    places: damaged files and what is damaged in them, the first ones.
    shard: 'examples', 'bytes' and 'digest' of the shard, as `info.json` has them.
  """

  number: int
  read: int = 0
  left_out: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  notes: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  places: list[str] = dataclasses.field(default_factory=list)
  shard: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def write(
  path: str,
  number: int,
  examples: Iterable[tuple[str, Mapping[str, Any] | Damaged]],
  settings: Settings,
  to_srgb: bool = True,
) -> tuple[Outcome, list[Row]]:
  """Prepares examples and writes those that stay to a shard, whole or not at all.

  Args:
    path: of the shard, on a disk or a URL.
    number: of the shard.
    examples: with a key for each that has none.
    settings: what is done to them.
    to_srgb: whether colours are converted to sRGB.

  Returns:
    What became of the examples, and by what those in the shard are compared with others.

  Raises:
    UserError: the shard can't be written.
  """
  outcome, rows = Outcome(number), []
  try:
    outcome.shard = token_cache.write_shard(
      path, _records(examples, settings, to_srgb, outcome, rows)
    )
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
  return outcome, rows


def _records(examples, settings, to_srgb, outcome: Outcome, rows: list[Row]) -> Iterator[bytes]:
  """Yields the records of examples that stay, and counts the others."""
  for key, example in examples:
    outcome.read += 1
    if isinstance(example, Damaged):
      outcome.left_out[example.reason] += 1
      if example.where and len(outcome.places) < _MOST_PLACES:
        outcome.places.append(f'{example.where}: {example.reason}')
      continue
    try:
      prepared = examples_lib.prepare(example, key, settings, to_srgb)
    except Unusable as error:
      outcome.left_out[str(error)] += 1
      continue
    outcome.notes.update(prepared.notes)
    rows.append(
      Row(
        prepared.digest,
        -1 if prepared.look is None else prepared.look,
        prepared.pixels,
        outcome.number,
        len(rows),
      )
    )
    yield prepared.record


def finish(staged: str, path: str, outcome: Outcome, drops: Mapping[int, str]) -> Outcome:
  """Puts a shard in its place without some of its examples; may be called again after a failure.

  Args:
    staged: where the shard was written.
    path: its place.
    outcome: of `write`.
    drops: number of an example in the shard -> why it is left out.

  Returns:
    What became of the examples in the end.

  Raises:
    UserError: the shard can't be read or written.
  """
  left_out = outcome.left_out + collections.Counter(drops.values())
  shard = outcome.shard
  try:
    if not drops:
      if storage.exists(staged):
        storage.move(staged, path)
    else:
      if storage.exists(staged):
        with storage.local_copy(staged) as local:
          shard = token_cache.write_shard(path, _others(os.fspath(local), drops))
        storage.remove(staged)
      else:  # An earlier try came this far.
        shard = {
          'examples': shard['examples'] - len(drops),
          'bytes': storage.size(path),
          'digest': token_cache_info.digest(path),
        }
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
  return dataclasses.replace(outcome, left_out=left_out, shard=shard)


def _others(path: str, drops: Mapping[int, str]) -> Iterator[bytes]:
  """Yields the records of a shard that are not dropped."""
  reader = array_records.Reader(path, bytes)
  try:
    kept = [index for index in range(reader.count()) if index not in drops]
    for start in range(0, len(kept), _AT_ONCE):
      for record in reader.read(kept[start : start + _AT_ONCE]):
        if isinstance(record, Damaged):
          raise UserError(f'{path} was damaged after it had been written')
        yield record
  finally:
    reader.close()

"""Writes a shard of prepared examples, and removes duplicates from it."""

from __future__ import annotations

import collections
import dataclasses
import itertools
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
from parti_jax.preparation import similarity
from parti_jax.preparation.duplicates import Row
from parti_jax.preparation.settings import Settings

# Maximum number of damaged files listed per shard.
_MOST_PLACES = 10
_AT_ONCE = 256


@dataclasses.dataclass
class Outcome:
  """The outcome for a part's examples.

  Attributes:
    number: index of the part and its shard.
    read: number of examples read, including damaged ones.
    left_out: reason -> examples dropped.
    notes: what was ignored or cut -> examples kept.
    places: the first damaged files, with the damage.
    shard: 'examples', 'bytes' and 'digest' of the shard, for `info.json`.
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
  """Prepares examples and writes those that pass to a shard, atomically.

  Args:
    path: path of the shard, on a disk or a URL.
    number: index of the shard.
    examples: examples, each with a default key.
    settings: the preparation.
    to_srgb: whether colors are converted to sRGB.

  Returns:
    The outcome, and a row for each example in the shard, for comparing it with others.

  Raises:
    UserError: the shard can't be written.
  """
  outcome = Outcome(number)
  rows: list[Row] = []
  try:
    outcome.shard = token_cache.write_shard(
      path, _records(examples, settings, to_srgb, outcome, rows)
    )
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
  return outcome, rows


def _records(
  examples: Iterable[tuple[str, Mapping[str, Any] | Damaged]],
  settings: Settings,
  to_srgb: bool,
  outcome: Outcome,
  rows: list[Row],
) -> Iterator[bytes]:
  """Yields the records of examples that pass, and counts the others."""
  for prepared in _similar(_prepared(examples, settings, to_srgb, outcome), settings, outcome):
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


def _prepared(
  examples: Iterable[tuple[str, Mapping[str, Any] | Damaged]],
  settings: Settings,
  to_srgb: bool,
  outcome: Outcome,
) -> Iterator[examples_lib.Prepared]:
  """Yields the examples that pass the filters of single examples, and counts the others."""
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
    yield prepared


def _similar(
  examples: Iterator[examples_lib.Prepared], settings: Settings, outcome: Outcome
) -> Iterator[examples_lib.Prepared]:
  """Yields the examples whose pictures fit their captions, and counts the others."""
  if settings.min_similarity is None:
    yield from examples
    return
  while batch := list(itertools.islice(examples, similarity.BATCH)):
    verdicts = similarity.judge([one.pair for one in batch if one.pair], settings)
    for example, verdict in zip(batch, verdicts, strict=True):
      if not verdict.cosine >= settings.min_similarity:
        outcome.left_out[similarity.TOO_LOW] += 1
        continue
      if verdict.cut:
        example.notes.append(similarity.CUT)
      yield example


def finish(staged: str, path: str, outcome: Outcome, drops: Mapping[int, str]) -> Outcome:
  """Moves a shard to its final path without the dropped examples; may be called again on failure.

  Args:
    staged: path that the shard was written to.
    path: its final path.
    outcome: the outcome of `write`.
    drops: index of an example in the shard -> why it is dropped.

  Returns:
    The final outcome.

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
      else:  # An earlier attempt has done this.
        shard = {
          'examples': shard['examples'] - len(drops),
          'bytes': storage.size(path),
          'digest': token_cache_info.digest(path),
        }
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror or error}') from error
  return dataclasses.replace(outcome, left_out=left_out, shard=shard)


def _others(path: str, drops: Mapping[int, str]) -> Iterator[bytes]:
  """Yields the records of a shard that aren't dropped."""
  reader = array_records.Reader(path, lambda record: {'record': record})
  try:
    kept = [index for index in range(reader.count()) if index not in drops]
    for start in range(0, len(kept), _AT_ONCE):
      for found in reader.read(kept[start : start + _AT_ONCE]):
        if isinstance(found, Damaged):
          raise UserError(f'{path} was damaged after it was written')
        yield found['record']
  finally:
    reader.close()

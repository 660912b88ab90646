"""Reports what happened to all examples, for `report.json` and as a table."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any

from parti_jax.preparation.settings import Settings
from parti_jax.preparation.shards import Outcome

_MOST_PLACES = 100


def make(outcomes: Iterable[Outcome], source: str, settings: Settings) -> dict[str, Any]:
  """Summarizes the outcomes of a split's parts.

  Args:
    outcomes: outcomes in the order of the parts.
    source: description of the source.
    settings: the preparation.

  Returns:
    For JSON: 'read', the sum of 'written' and 'left_out'; 'bytes' of the shards; reasons with their
    counts; damaged files; and the settings.
  """
  left_out: collections.Counter[str] = collections.Counter()
  notes: collections.Counter[str] = collections.Counter()
  places: list[str] = []
  read = written = size = count = 0
  for outcome in outcomes:
    read += outcome.read
    written += outcome.shard['examples']
    size += outcome.shard['bytes']
    count += 1
    left_out.update(outcome.left_out)
    notes.update(outcome.notes)
    places += outcome.places
  return {
    'source': source,
    'read': read,
    'written': written,
    'shards': count,
    'bytes': size,
    'left_out': _by_count(left_out),
    'ignored_or_cut': _by_count(notes),
    'damaged': places[:_MOST_PLACES],
    'settings': dataclasses.asdict(settings),
  }


def table(report: Mapping[str, Any]) -> str:
  """Returns the counts of a report, one per line."""
  rows = [
    (report['read'], 'read'),
    *((-count, reason) for reason, count in report['left_out'].items()),
    (report['written'], 'written'),
  ]
  rows += [(count, reason) for reason, count in report['ignored_or_cut'].items()]
  width = max(len(f'{count:,}') for count, _ in rows)
  return '\n'.join(f'  {count:>{width},}  {reason}' for count, reason in rows)


def _by_count(counts: Mapping[str, int]) -> dict[str, int]:
  """Sorts counts, the most frequent first, then by name."""
  return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

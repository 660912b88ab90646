"""Reads the journal of a run: its starts, how far each got and how it ended.

`journal` writes it. Reading doesn't need JAX, so that a login node can report on a run at once.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime
import json
import re
from typing import Any

from parti_jax.core import storage
from parti_jax.runs import journal

_NAME = re.compile(
  r'(?P<time>\d{8}T\d{6}\.\d{3})Z-(?P<host>.+)-(?P<pid>\d+)'
  r'(-process(?P<process>\d+))?\.jsonl'
)
# Maximum bytes of one start's file; years of training write less.
_LARGEST = 1 << 28
# Events that every start has; any other event gets its own line in a report.
_USUAL = ('start', 'progress', 'checkpoint', 'skipped', 'stop')
# The rate is measured over this many seconds, and over no fewer than the second number.
_RATE_OVER, _RATE_FROM = 3600, 10


@dataclasses.dataclass
class Start:
  """One start of a run, from its journal.

  Attributes:
    name: name of the start, from its file's name.
    time: time of the start, UTC.
    host: host of the first process, from the file's name.
    pid: process id of the first process.
    records: the first process's events, in order, each with time, text, event and facts.
    others: events of the other processes, in order.
  """

  name: str
  time: datetime.datetime
  host: str
  pid: int
  records: list[dict[str, Any]]
  others: list[dict[str, Any]] = dataclasses.field(default_factory=list)

  def _only(self, event: str) -> dict[str, Any] | None:
    return next((record for record in self.records if record['event'] == event), None)

  @property
  def begun(self) -> dict[str, Any] | None:
    """The event 'start'; None if this start ended before training."""
    return self._only('start')

  @property
  def stopped(self) -> dict[str, Any] | None:
    """The event 'stop'; None if this start was killed or still runs."""
    return self._only('stop')

  @property
  def last_time(self) -> datetime.datetime:
    """Time of the last event, UTC."""
    return parse_time(self.records[-1]['time'])

  @property
  def first_step(self) -> int | None:
    """Steps done before this start; None if training did not begin."""
    return self.begun.get('step') if self.begun else None

  @property
  def last_step(self) -> int | None:
    """Steps done at the end of this start, as far as the journal knows."""
    steps = [record['step'] for record in self.records if isinstance(record.get('step'), int)]
    return max(steps, default=None) if self.begun else None

  @property
  def skipped_examples(self) -> dict[str, int] | None:
    """Examples that all processes skipped in this run, by reason; None if none was reported."""
    newest = {
      record.get('process', 0): record['counts']
      for record in [*self.records, *self.others]
      if record['event'] == 'skipped'
    }
    if not newest:
      return None
    return dict(sum(map(collections.Counter, newest.values()), collections.Counter()))

  @property
  def errors(self) -> list[str]:
    """Errors that ended processes, the first process's error first."""
    return [record['error'] for record in [*self.records, *self.others] if 'error' in record]

  @property
  def unusual(self) -> list[dict[str, Any]]:
    """Unusual events, such as damaged checkpoints."""
    return [record for record in [*self.records, *self.others] if record['event'] not in _USUAL]

  @property
  def newest_progress(self) -> dict[str, Any] | None:
    """The newest event 'progress', with the last logged loss."""
    return next(
      (record for record in reversed(self.records) if record['event'] == 'progress'), None
    )

  @property
  def rate(self) -> float | None:
    """Steps per second over the last hour of this start, pauses included; None if unknown."""
    points = [
      (parse_time(record['time']), record['step'])
      for record in self.records
      if record['event'] in ('progress', 'checkpoint') and isinstance(record.get('step'), int)
    ]
    if not points:
      return None
    end, last = points[-1]
    (begin, first) = next(
      point for point in points if (end - point[0]).total_seconds() <= _RATE_OVER
    )
    seconds = (end - begin).total_seconds()
    return (last - first) / seconds if seconds >= _RATE_FROM else None


@dataclasses.dataclass
class History:
  """The contents of a run's journal.

  Attributes:
    starts: the starts of the run, the oldest first.
    unreadable: number of lines that could not be read, such as one that a kill cut short.
  """

  starts: list[Start]
  unreadable: int = 0

  @property
  def skipped_examples(self) -> dict[str, int]:
    """Examples skipped in the run, by reason; each start continues the counts of the previous."""
    return next(
      (
        start.skipped_examples
        for start in reversed(self.starts)
        if start.skipped_examples is not None
      ),
      {},
    )

  def redone(self, index: int) -> int:
    """Returns how many steps a start repeated because earlier starts had not saved them."""
    reached = max((start.last_step or 0 for start in self.starts[:index]), default=0)
    first = self.starts[index].first_step
    return max(reached - first, 0) if first is not None else 0


def read(model_dir: str) -> History:
  """Reads the journal of a run; a run without one, from an older version, has no starts.

  Args:
    model_dir: the run's folder, a path or a URL.

  Raises:
    UserError: the folder's store can't be reached, or a file is far too large.
  """
  history, others = History([]), []
  folder = storage.join(model_dir, journal.FOLDER)
  for name in storage.names(folder):
    found = _NAME.fullmatch(name)
    if not found:
      continue
    records, unreadable = _records(storage.read(storage.join(folder, name), _LARGEST))
    history.unreadable += unreadable
    time = datetime.datetime.strptime(found['time'], '%Y%m%dT%H%M%S.%f')
    if records and found['process']:
      others.append((time, records))
    elif records:
      history.starts.append(
        Start(name.removesuffix('.jsonl'), time, found['host'], int(found['pid']), records)
      )
  for time, records in others:
    if history.starts:
      # All processes of a start begin within seconds of each other.
      min(history.starts, key=lambda start: abs(start.time - time)).others.extend(records)
  return history


def parse_time(text: str) -> datetime.datetime:
  """Parses the time of an event, UTC."""
  return datetime.datetime.strptime(text, '%Y-%m-%d %H:%M:%S')


def _records(content: bytes) -> tuple[list[dict[str, Any]], int]:
  """Returns a file's events, and how many of its lines aren't events."""
  records, unreadable = [], 0
  for line in content.decode(errors='replace').split('\n'):
    if not line.strip():
      continue
    try:
      record = json.loads(line)
      parse_time(record['time'])
      records.append({'text': '', **record, 'event': str(record['event'])})
    except (ValueError, TypeError, LookupError):
      unreadable += 1
  return records, unreadable

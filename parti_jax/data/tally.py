"""Counts what reading leaves out, so that nothing is dropped silently.

seqio's preprocessors run deep inside seqio and tf.data. The reader at the top opens a `reading`
block; what is built inside it reports to that reader's tally.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import dataclasses
import threading
from collections.abc import Iterator
from collections.abc import Mapping

from absl import logging

# Reasons and places that there were warnings of; each epoch finds them again.
_MOST_WARNINGS = 1000
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


class Tally:
  """Counts by reason; several threads may add at once."""

  def __init__(self):
    self._counts = collections.Counter()
    self._lock = threading.Lock()

  def add(self, reason: str, place: str = '') -> None:
    """Counts one more.

    Args:
      reason: a few words.
      place: the file where it was found, of which a warning is given once.
    """
    with self._lock:
      self._counts[reason] += 1
    warn_once(reason, place)

  def counts(self) -> dict[str, int]:
    """Returns reason -> count, the most frequent first."""
    with self._lock:
      return dict(self._counts.most_common())

  def __str__(self) -> str:
    """Returns '3 damaged picture, 1 no caption', or '' where nothing was counted."""
    return told(self.counts())


def warn_once(reason: str, place: str) -> None:
  """Warns of what was found in a file, once; a place '' is none."""
  with _lock:
    new = place and (reason, place) not in _warned and len(_warned) < _MOST_WARNINGS
    if new:
      _warned.add((reason, place))
  if new:
    logging.warning('%s: %s', place, reason)


def told(counts: Mapping[str, int]) -> str:
  """Returns '3 damaged picture, 1 no caption', or '' where nothing was counted."""
  return ', '.join(f'{count:,} {reason}' for reason, count in counts.items())


@dataclasses.dataclass(frozen=True)
class Reading:
  """What seqio's preprocessors know about who reads.

  Attributes:
    skipped: tally of examples that are left out.
    shortened: tally of examples that are kept, but not whole (captions cut to the text's length).
    drop_text: whether the reader trains, so that `preprocessors.drop_text` drops texts.
  """

  skipped: Tally = dataclasses.field(default_factory=Tally)
  shortened: Tally = dataclasses.field(default_factory=Tally)
  drop_text: bool = False


_current = contextvars.ContextVar('reading')


def current() -> Reading:
  """Returns the reading of the enclosing block, or a new one where there is none."""
  return _current.get(None) or Reading()


@contextlib.contextmanager
def reading(by: Reading) -> Iterator[Reading]:
  """Makes datasets that are built in this block report to `by`."""
  token = _current.set(by)
  try:
    yield by
  finally:
    _current.reset(token)

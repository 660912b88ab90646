"""Counts skipped data, so that nothing is dropped silently.

seqio's preprocessors run deep inside seqio and tf.data. The outermost reader opens a `reading`
block; datasets built inside it report to that reader's tally.
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

# Limit on the (reason, file) pairs that have caused a warning; each epoch finds them again.
_MOST_WARNINGS = 1000
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


class Tally:
  """Counts by reason; thread-safe."""

  def __init__(self):
    self._counts: collections.Counter[str] = collections.Counter()
    self._lock = threading.Lock()

  def add(self, reason: str, place: str = '') -> None:
    """Counts an example.

    Args:
      reason: a few words.
      place: the file with the problem, for a single warning.
    """
    with self._lock:
      self._counts[reason] += 1
    warn_once(reason, place)

  def counts(self) -> dict[str, int]:
    """Returns {reason: count}, the most frequent first."""
    with self._lock:
      return dict(self._counts.most_common())

  def __str__(self) -> str:
    """Returns a text such as '3 damaged picture, 1 no caption'; '' if nothing was counted."""
    return listed(self.counts())


def warn_once(reason: str, place: str) -> None:
  """Warns of a problem in a file, once; a place '' causes no warning."""
  with _lock:
    new = place and (reason, place) not in _warned and len(_warned) < _MOST_WARNINGS
    if new:
      _warned.add((reason, place))
  if new:
    logging.warning('%s: %s', place, reason)


def listed(counts: Mapping[str, int]) -> str:
  """Returns a text such as '3 damaged picture, 1 no caption'; '' if nothing was counted."""
  return ', '.join(f'{count:,} {reason}' for reason, count in counts.items())


@dataclasses.dataclass(frozen=True)
class Reading:
  """The context of a reader for seqio's preprocessors.

  Attributes:
    skipped: tally of skipped examples.
    shortened: tally of examples that are kept in part (captions cut to the text's length).
    drop_text: whether the reader trains, so that `preprocessors.drop_text` drops texts and any of
      several captions is used.
  """

  skipped: Tally = dataclasses.field(default_factory=Tally)
  shortened: Tally = dataclasses.field(default_factory=Tally)
  drop_text: bool = False


_current: contextvars.ContextVar[Reading] = contextvars.ContextVar('reading')


def current() -> Reading:
  """Returns the reading of the enclosing block; a new one without a block."""
  return _current.get(None) or Reading()


@contextlib.contextmanager
def reading(by: Reading) -> Iterator[Reading]:
  """Makes datasets built in this block report to `by`."""
  token = _current.set(by)
  try:
    yield by
  finally:
    _current.reset(token)

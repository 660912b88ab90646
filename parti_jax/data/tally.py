"""Counts what reading leaves out, so that nothing is dropped silently.

The functions that read and preprocess run deep inside seqio and tf.data. The reader at the top
opens a `reading` block; what is built inside it reports to that reader's tally.
"""

import collections
import contextlib
import contextvars
import dataclasses
import threading

from absl import logging

# Reasons and places that there were warnings of; each epoch finds them again.
_MOST_WARNINGS = 1000
_warned: set[tuple[str, str]] = set()


class Tally:
  """Counts by reason; several threads may add at once.

  Reading runs ahead of what is used. So an entry may have the number of its example in its source,
  and then `counts` can leave out what lies ahead.
  """

  def __init__(self):
    self._unnumbered = collections.Counter()
    # Of entries with a number: those below the last `until`, and the others with their numbers.
    self._passed = collections.Counter()
    self._ahead: list[tuple[str, int]] = []
    self._lock = threading.Lock()

  def add(self, reason: str, number: int | None = None, place: str = '') -> None:
    """Counts one more for this reason.

    Args:
      reason: a few words.
      number: that of the example.
      place: the file where it was found, of which a warning is given once.
    """
    with self._lock:
      new = place and (reason, place) not in _warned and len(_warned) < _MOST_WARNINGS
      if new:
        _warned.add((reason, place))
      if number is None:
        self._unnumbered[reason] += 1
      else:
        self._ahead.append((reason, int(number)))
    if new:
      logging.warning('%s: %s', place, reason)

  def counts(self, until: int | None = None, numbered: bool = False) -> dict[str, int]:
    """Returns reason -> count, the most frequent first.

    Args:
      until: entries with this number or a higher one are left out; None for all entries. It must
        not be lower than in an earlier call.
      numbered: whether entries without a number are left out.
    """
    with self._lock:
      found = collections.Counter() if numbered else self._unnumbered.copy()
      if until is None:
        found.update(reason for reason, _ in self._ahead)
      else:
        self._passed.update(reason for reason, number in self._ahead if number < until)
        self._ahead = [entry for entry in self._ahead if entry[1] >= until]
      return dict((found + self._passed).most_common())

  def __str__(self) -> str:
    """Returns '3 damaged picture, 1 no caption', or '' where nothing was counted."""
    return told(self.counts())


def told(counts) -> str:
  """Returns '3 damaged picture, 1 no caption', or '' where nothing was counted."""
  return ', '.join(f'{count:,} {reason}' for reason, count in counts.items())


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the preprocessors know about who reads.

  Attributes:
    skipped: tally of examples that are left out.
    shortened: tally of examples that are kept, but not whole (captions cut to the text's length).
    drop_text: whether the reader trains, so that `preprocessors.drop_text` drops texts.
    start: the number of the example, in the order of reading, at which reading starts.
  """

  skipped: Tally = dataclasses.field(default_factory=Tally)
  shortened: Tally = dataclasses.field(default_factory=Tally)
  drop_text: bool = False
  start: int = 0


_current = contextvars.ContextVar('reading')


def current() -> Reading:
  """Returns the reading of the enclosing block, or a new one where there is none."""
  return _current.get(None) or Reading()


@contextlib.contextmanager
def reading(by: Reading):
  """Makes datasets that are built in this block report to `by`."""
  token = _current.set(by)
  try:
    yield by
  finally:
    _current.reset(token)

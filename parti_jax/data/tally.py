"""Counts what reading leaves out, so that nothing is dropped silently.

The functions that read and preprocess run deep inside seqio and tf.data. The reader at the top
opens a `reading` block; what is built inside it reports to that reader's tally.
"""

import collections
import contextlib
import contextvars
import dataclasses
import threading


class Tally:
  """Counts by reason; several threads may add at once."""

  def __init__(self):
    self._counts = collections.Counter()
    self._lock = threading.Lock()

  def add(self, reason: str) -> None:
    """Counts one more for this reason."""
    with self._lock:
      self._counts[reason] += 1

  def clear(self) -> None:
    """Starts again from nothing."""
    with self._lock:
      self._counts.clear()

  def counts(self) -> dict[str, int]:
    """Returns reason -> count, the most frequent first."""
    with self._lock:
      return dict(self._counts.most_common())

  def __str__(self) -> str:
    """Returns '3 damaged picture, 1 no caption', or '' where nothing was counted."""
    return ', '.join(f'{count:,} {reason}' for reason, count in self.counts().items())


@dataclasses.dataclass(frozen=True)
class Reading:
  """What the preprocessors know about who reads.

  Attributes:
    skipped: tally of examples that are left out.
    shortened: tally of examples that are kept, but not whole (captions cut to the text's length).
    drop_text: whether texts may be dropped for classifier-free guidance.
  """

  skipped: Tally = dataclasses.field(default_factory=Tally)
  shortened: Tally = dataclasses.field(default_factory=Tally)
  drop_text: bool = True


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

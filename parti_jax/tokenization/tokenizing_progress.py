"""Shows the progress of tokenizing: a bar on a terminal, and a line now and then elsewhere."""

from __future__ import annotations

import collections
import sys
import time
from collections.abc import Mapping

import tqdm

from parti_jax.data import tally

# Seconds until the first line, and between later lines.
_FIRST, _BETWEEN = 10, 60


class Progress:
  """Reports on the parts that one process writes.

  Args:
    name: name of the split, for the lines.
    parts: number of parts.
    examples: number of their examples; None if unknown.
  """

  def __init__(self, name: str, parts: int, examples: int | None):
    self._name, self._parts, self._examples = name, parts, examples
    self._done = self._read = self._written = 0
    self._skipped: collections.Counter[str] = collections.Counter()
    self._began = time.monotonic()
    self._next = self._began + _FIRST
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=examples, desc=name, unit='example', dynamic_ncols=True)

  def add(self, written: int, skipped: Mapping[str, int]) -> None:
    """Counts written examples, and skipped ones by reason."""
    self._written += written
    self._skipped.update(skipped)
    read = written + sum(skipped.values())
    self._read += read
    if self._bar is not None:
      self._bar.update(read)
      self._bar.set_postfix_str(self._parts_and_skipped(), refresh=False)
    elif time.monotonic() > self._next:
      self._next = time.monotonic() + _BETWEEN
      print(self.line(time.monotonic() - self._began), file=sys.stderr, flush=True)

  def end_part(self) -> None:
    """Counts a finished part."""
    self._done += 1

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()

  def line(self, seconds: float) -> str:
    """Returns a line about the progress.

    Args:
      seconds: seconds since the beginning.
    """
    rate = self._read / seconds
    line = f'{self._name}: {self._written:,} examples, {rate:,.0f}/s'
    left = self._seconds_left(seconds)
    if left is not None:
      line += f', about {_duration(left)} left'
    return f'{line}; {self._parts_and_skipped()}'

  def _parts_and_skipped(self) -> str:
    line = f'{self._done:,} of {self._parts:,} parts'
    if self._skipped:
      line += f'; skipped {tally.listed(dict(self._skipped.most_common()))}'
    return line

  def _seconds_left(self, seconds: float) -> float | None:
    """Estimates the seconds left from the examples or the parts; returns None at the beginning."""
    if self._examples is not None:
      done, whole = self._read, self._examples
    else:
      done, whole = self._done, self._parts
    return seconds * (whole - done) / done if done else None


def _duration(seconds: float) -> str:
  """Returns '2 h 5 min', '5 min' or '30 s'."""
  if seconds < 60:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  return f'{minutes // 60:,} h {minutes % 60} min' if minutes >= 60 else f'{minutes} min'

"""Decides whether and how long to retry requests to object stores, and counts the retries.

A request is retried after a failure that may be temporary: the statuses 408, 429, 500, 502, 503
and 504, a connection that can't be made or that breaks, a truncated body, and a missing response.
The delay between attempts is an exponential backoff with jitter. A request that keeps failing for
PARTI_JAX_STORE_SECONDS (120) fails for good. The limit is 10 s after such a failure, and before a
store's first response, since its address may be wrong.

A retry must not change the outcome, since the response to a request that took effect may be lost.
The requests of `storage` are idempotent. See `storage.create` and `storage.remove` for how.
"""

from __future__ import annotations

import collections
import contextlib
import contextvars
import os
import random
import sys
import threading
import time
from collections.abc import Iterator

from parti_jax.core.errors import UserError

SECONDS_VARIABLE = 'PARTI_JAX_STORE_SECONDS'
_SECONDS = 120.0
# For a store that hasn't responded yet, or not since a request failed for good.
_FIRST_SECONDS = 10.0
# Timeouts for a connection, and for the next byte of a response.
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
# Slower uploads count as stalled.
_SLOWEST_BYTES_PER_SECOND = 50_000
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 10.0
# How long failures may last before the user is notified.
_QUIET_SECONDS = 10.0

STATUSES = frozenset((408, 429, 500, 502, 503, 504))
LOST, NO_ANSWER, NO_CONNECTION, SHORT = (
  'connection lost',
  'no answer',
  'no connection',
  'body that ended early',
)

# TensorStore reads and writes the arrays of checkpoints at gs:// with its own retries.
ARRAYS = 'failure with arrays of a checkpoint'
_TENSORSTORE_RETRIES = '/tensorstore/kvstore/gcs/retries'

_counts: collections.Counter[str] = collections.Counter()
# The counts when the run began.
_before: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()
# Stores that have responded, and not failed since.
_answered: set[str] = set()
_asked: set[str] = set()


class Operation:
  """One call of `storage`, which may send several requests.

  Args:
    seconds: how long each request may keep failing; None for the environment's value.

  Attributes:
    seconds: how long each request may keep failing.
    failure: why a request has failed for good, even if the library hides the error.
  """

  def __init__(self, seconds: float | None = None):
    self.seconds = patience() if seconds is None else min(seconds, patience())
    self.failure: str | None = None


# Coroutines inherit it from the thread that starts them.
_operation: contextvars.ContextVar[Operation | None] = contextvars.ContextVar(
  'store_operation', default=None
)
_limit: contextvars.ContextVar[float | None] = contextvars.ContextVar('store_limit', default=None)


@contextlib.contextmanager
def operation() -> Iterator[Operation]:
  """Yields an operation; requests within the context belong to it."""
  token = _operation.set(found := Operation(_limit.get()))
  try:
    yield found
  finally:
    _operation.reset(token)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
  """Limits the seconds of each attempt, and the seconds until a request fails for good."""
  token = _limit.set(seconds)
  try:
    yield
  finally:
    _limit.reset(token)


def patience() -> float:
  """Returns the seconds for which a request may keep failing before it fails for good.

  Raises:
    UserError: the environment variable isn't a number of seconds.
  """
  text = os.environ.get(SECONDS_VARIABLE, '')
  try:
    seconds = float(text or _SECONDS)
  except ValueError:
    seconds = -1.0
  if not 0 <= seconds < 1e6:
    raise UserError(f'{SECONDS_VARIABLE}={text} is not a number of seconds; use for example 120')
  return seconds


def timeouts() -> tuple[float, float]:
  """Returns the timeouts in seconds of connecting, and of waiting for the next byte."""
  seconds = max(patience(), 0.1)
  return min(_CONNECT_SECONDS, seconds), min(_READ_SECONDS, seconds)


def attempt_seconds(size: int) -> float:
  """Returns the seconds that an attempt with a body of `size` bytes may take."""
  limit = _limit.get()
  seconds = sum(timeouts()) + size / _SLOWEST_BYTES_PER_SECOND
  return seconds if limit is None else min(seconds, limit)


def answered(store: str) -> None:
  """Records that a store has responded, with any status."""
  _answered.add(store)


def begin() -> None:
  """Records that a run begins, so that counts exclude what this process did before."""
  _before.clear()
  _before.update(counts())
  _asked.clear()


def counts() -> dict[str, int]:
  """Returns {kind of failure: requests retried because of it} since the run began."""
  with _lock:
    found = collections.Counter(_counts)
  if tensorstore := sys.modules.get('tensorstore'):
    for metric in tensorstore.experimental_collect_matching_metrics(_TENSORSTORE_RETRIES):
      found[ARRAYS] += sum(value['value'] for value in metric['values'])
  found.subtract(_before)
  return {kind: count for kind, count in found.most_common() if count}


def summary() -> str:
  """Returns the counts as text; '' if there are none."""
  return ', '.join(f'{count} after {kind}' for kind, count in counts().items())


def used() -> bool:
  """Returns whether this process has sent requests to a store since the run began."""
  return bool(_asked)


class Attempts:
  """The attempts at one request.

  Args:
    store: the kind of store, such as 's3'.
    what: description of the request, for messages.
  """

  def __init__(self, store: str, what: str):
    self._store, self._what = store, what
    _asked.add(store)
    self._operation = _operation.get() or Operation()
    self._began, self._failures, self._reported = time.monotonic(), 0, False

  def delay(self, kind: str, reason: str) -> float | None:
    """Counts a failure.

    Args:
      kind: kind of the failure, for the counts.
      reason: the error message of the store or the library.

    Returns:
      Seconds to wait before the next attempt; None if the request has failed for good.
    """
    elapsed = time.monotonic() - self._began
    limit = self._operation.seconds
    if self._store not in _answered:
      limit = min(limit, _FIRST_SECONDS)
    if elapsed >= limit:
      self._operation.failure = f'{reason} (tried {self._failures + 1} times in {elapsed:.0f} s)'
      _answered.discard(self._store)
      return None
    self._failures += 1
    with _lock:
      _counts[kind] += 1
    if elapsed >= _QUIET_SECONDS and not self._reported:
      self._reported = True
      print(
        f'parti-jax: {self._what}: {reason}; retrying for {limit:g} s in total',
        file=sys.stderr,
        flush=True,
      )
    longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(self._failures - 1, 10))
    return min(random.uniform(longest / 2, longest), max(limit - elapsed, 0.01))


def status_kind(status: int) -> str:
  """Returns the kind of failure for an HTTP status."""
  return f'status {status}'

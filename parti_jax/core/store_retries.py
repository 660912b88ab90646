"""When a request to an object store is tried again, for how long, and how often that happened.

A request is repeated after a failure that may pass: the statuses 408, 429, 500, 502, 503 and 504, a
connection that can't be made or that breaks, a body that ends early, and an answer that does not
come. Between two attempts lies an exponential backoff with jitter. A request that has failed for
PARTI_JAX_STORE_SECONDS (120) fails for good. After that, and before the first answer of a store,
whose address may be wrong, 10 s are enough.

Repeating a request must not change its outcome, since the answer to one that had its effect may be
lost. The requests of `storage` are idempotent; see `storage.create` and `storage.remove`.
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
# For a store that has not answered yet, or not since a request failed for good.
_FIRST_SECONDS = 10.0
# Until a connection is made, and without a byte of an answer.
_CONNECT_SECONDS, _READ_SECONDS = 10.0, 30.0
# The slowest upload that counts as one that goes on.
_SLOWEST_BYTES_PER_SECOND = 50_000
_FIRST_DELAY, _LONGEST_DELAY = 0.2, 10.0
# How long failures go on before the user hears of them.
_QUIET_SECONDS = 10.0

STATUSES = frozenset((408, 429, 500, 502, 503, 504))
LOST, NO_ANSWER, NO_CONNECTION, SHORT = (
  'connection lost',
  'no answer',
  'no connection',
  'body that ended early',
)

# Of checkpoints at gs://, which TensorStore reads and writes with retries of its own.
ARRAYS = 'failure with arrays of a checkpoint'
_TENSORSTORE_RETRIES = '/tensorstore/kvstore/gcs/retries'

_counts: collections.Counter[str] = collections.Counter()
# What was counted when a run began.
_before: collections.Counter[str] = collections.Counter()
_lock = threading.Lock()
# Stores that have answered, and not failed since then.
_answered: set[str] = set()
_asked: set[str] = set()


class Operation:
  """One call of `storage`, which may send several requests.

  Args:
    seconds: how long each request may fail; None for what the environment says.

  Attributes:
    seconds: how long each request may fail.
    failure: why a request has failed for good, whatever the library makes of that.
  """

  def __init__(self, seconds: float | None = None):
    self.seconds = patience() if seconds is None else min(seconds, patience())
    self.failure: str | None = None


# Coroutines inherit it from the thread that started them.
_operation: contextvars.ContextVar[Operation | None] = contextvars.ContextVar(
  'store_operation', default=None
)
_limit: contextvars.ContextVar[float | None] = contextvars.ContextVar('store_limit', default=None)


@contextlib.contextmanager
def operation() -> Iterator[Operation]:
  """Within it, requests belong to the operation that is yielded."""
  token = _operation.set(found := Operation(_limit.get()))
  try:
    yield found
  finally:
    _operation.reset(token)


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
  """Within it, requests fail for good after so many seconds, and so long may an attempt take."""
  token = _limit.set(seconds)
  try:
    yield
  finally:
    _limit.reset(token)


def patience() -> float:
  """How many seconds a request may fail before it fails for good.

  Raises:
    UserError: the environment has no number of seconds.
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
  """Seconds until a connection must be made, and without a byte until an attempt is given up."""
  seconds = max(patience(), 0.1)
  return min(_CONNECT_SECONDS, seconds), min(_READ_SECONDS, seconds)


def attempt_seconds(size: int) -> float:
  """Seconds that an attempt with a body of so many bytes may take."""
  limit = _limit.get()
  seconds = sum(timeouts()) + size / _SLOWEST_BYTES_PER_SECOND
  return seconds if limit is None else min(seconds, limit)


def answered(store: str) -> None:
  """Notes that a store has answered, with whatever status."""
  _answered.add(store)


def begin() -> None:
  """Notes that a run begins, so that what this process did before it does not count."""
  _before.clear()
  _before.update(counts())
  _asked.clear()


def counts() -> dict[str, int]:
  """Kind of failure -> requests that were repeated because of it since a run began."""
  with _lock:
    found = collections.Counter(_counts)
  if tensorstore := sys.modules.get('tensorstore'):
    for metric in tensorstore.experimental_collect_matching_metrics(_TENSORSTORE_RETRIES):
      found[ARRAYS] += sum(value['value'] for value in metric['values'])
  found.subtract(_before)
  return {kind: count for kind, count in found.most_common() if count}


def told() -> str:
  """The counts as a text; '' without any."""
  return ', '.join(f'{count} after {kind}' for kind, count in counts().items())


def used() -> bool:
  """Whether this process has asked a store for anything since a run began."""
  return bool(_asked)


class Attempts:
  """The attempts at one request.

  Args:
    store: the kind of store, such as 's3'.
    what: the request, for messages.
  """

  def __init__(self, store: str, what: str):
    self._store, self._what = store, what
    _asked.add(store)
    self._operation = _operation.get() or Operation()
    self._began, self._failures, self._told = time.monotonic(), 0, False

  def delay(self, kind: str, reason: str) -> float | None:
    """Counts a failure.

    Args:
      kind: of the failure, for the counts.
      reason: what the store or the library said.

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
    if elapsed >= _QUIET_SECONDS and not self._told:
      self._told = True
      print(
        f'parti-jax: {self._what}: {reason}; trying again for {limit:g} s in all',
        file=sys.stderr,
        flush=True,
      )
    longest = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(self._failures - 1, 10))
    return min(random.uniform(longest / 2, longest), max(limit - elapsed, 0.01))


def status_kind(status: int) -> str:
  """The kind of failure of a status."""
  return f'status {status}'

"""Sets how long TensorStore retries requests to gs:// for checkpoints' arrays."""

from __future__ import annotations

import functools
import os
import sys
import threading

from orbax.checkpoint._src.serialization import tensorstore_utils

from parti_jax.core import store_retries

_FIRST_DELAY, _LONGEST_DELAY = 1.0, 20.0


def configure() -> None:
  """Gives Orbax's TensorStore the timeouts of `store_retries` instead of its 15 minutes."""
  connect, read = store_retries.timeouts()
  for variable, value in (
    ('CONNECT_TIMEOUT_SECONDS', connect),
    ('LOW_SPEED_TIME_SECONDS', read),
    ('LOW_SPEED_LIMIT_BYTES', 1),
  ):
    os.environ.setdefault(f'TENSORSTORE_CURL_{variable}', str(max(1, round(value))))
  settings = {
    'max_retries': _retries(store_retries.patience()),
    'initial_delay': f'{_FIRST_DELAY}s',
    'max_delay': f'{_LONGEST_DELAY}s',
  }
  # Orbax has no option for this.
  for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    context['gcs_request_retries'] = settings
  _quiet_threads()


@functools.cache
def _quiet_threads() -> None:
  """Keeps TensorStore's threads from printing errors of requests that Orbax no longer awaits."""
  before = sys.excepthook

  def hook(kind, error, traceback):
    ended = kind is RuntimeError and str(error) == 'Event loop is closed'
    if not ended or threading.current_thread() is threading.main_thread():
      before(kind, error, traceback)

  sys.excepthook = hook


def _retries(seconds: float) -> int:
  """Returns the number of retries that take about `seconds`."""
  retries, waited, delay = 1, _FIRST_DELAY, 2 * _FIRST_DELAY
  while waited < seconds:
    retries, waited, delay = retries + 1, waited + delay, min(2 * delay, _LONGEST_DELAY)
  return retries

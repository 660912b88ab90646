"""Iterators over datasets: closing them, and processes that end during prefetching."""

import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from parti_jax.data import streams
from parti_jax.data.quiet_tensorflow import tf

_SLOW = 0.05
# An end that never comes.
_LONG = 180


def _calls():
  """A dataset whose elements come from slow Python calls, and the list of these calls."""
  calls = []

  def call(number):
    calls.append(number)
    time.sleep(_SLOW)
    if number == 5:
      raise ValueError('five')
    return number

  dataset = tf.data.Dataset.range(1000).map(
    lambda number: tf.numpy_function(call, [number], tf.int64), num_parallel_calls=2
  )
  return dataset.prefetch(2), calls


def _assert_ended(calls):
  count = len(calls)
  time.sleep(5 * _SLOW)
  assert len(calls) == count < 1000


def test_elements_are_arrays():
  with streams.Stream(tf.data.Dataset.range(3)) as stream:
    values = list(stream)
  assert values == [0, 1, 2] and all(isinstance(value, np.integer) for value in values)


def test_nothing_is_prefetched_once_closed():
  dataset, calls = _calls()
  with streams.Stream(dataset) as stream:
    assert next(stream) == 0
  _assert_ended(calls)
  stream.close()
  with pytest.raises(ValueError, match='closed'):
    next(stream)


def test_a_stored_exception_keeps_no_iterator():
  dataset, calls = _calls()
  stream = streams.Stream(dataset)
  with pytest.raises(tf.errors.InvalidArgumentError, match='five') as kept:
    list(stream)
  stream.close()
  _assert_ended(calls)
  assert kept.tb is not None


def test_a_call_that_does_not_return_is_abandoned(monkeypatch, caplog):
  monkeypatch.setattr(streams, '_SECONDS', 0.1)
  begun, ended = threading.Event(), threading.Event()

  def call(number):
    if number:
      begun.set()
      ended.wait(_LONG)
    return number

  stream = streams.Stream(
    tf.data.Dataset.range(3)
    .map(lambda number: tf.numpy_function(call, [number], tf.int64))
    .prefetch(2)
  )
  assert next(stream) == 0 and begun.wait(_LONG)
  stream.close()
  assert caplog.records and '0.1 s' in caplog.text
  ended.set()


def test_what_is_open_at_exit_is_closed():
  dataset, calls = _calls()
  stream = streams.Stream(dataset)
  next(stream)
  streams._close_all()
  _assert_ended(calls)
  with pytest.raises(ValueError):
    next(stream)


# An iterator is open, and another one is referenced only by the traceback.
_SCRIPT = """
import time
from parti_jax.data import streams
from parti_jax.data.quiet_tensorflow import tf

def call(number):
  time.sleep(0.5)
  return number

def dataset():
  return tf.data.Dataset.range(1000).map(
      lambda number: tf.numpy_function(call, [number], tf.int64), num_parallel_calls=4)

def fail():
  iterator = dataset().as_numpy_iterator()
  next(iterator)
  raise RuntimeError('injected')

stream = streams.Stream(dataset())
next(stream)
print('last line', flush=True)
fail()
"""


@pytest.mark.process
def test_a_script_that_closes_nothing_ends():
  done = subprocess.run(
    [sys.executable, '-c', _SCRIPT], capture_output=True, text=True, timeout=_LONG, check=False
  )
  assert done.returncode == 1, done.stderr
  assert done.stdout == 'last line\n' and 'terminate called' not in done.stderr
  assert 'RuntimeError: injected' in done.stderr

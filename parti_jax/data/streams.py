"""Iterators over tf.data datasets, closed before the interpreter shuts down.

tf.data reads ahead in threads of its own, and these call Python. Deleting an iterator waits until
their calls have returned. Once the interpreter has begun to shut down they never do, because no
thread gets the GIL any more: a process that still has an iterator then hangs, or aborts. That
includes an iterator that only the traceback of an uncaught exception refers to. So iterators are
closed by whoever opened them, and at exit at the latest.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable

from absl import logging

from parti_jax.data.quiet_tensorflow import tf

# How long `close` waits for calls of Python that are under way, such as a read from a slow disk.
_SECONDS = 5.0
_open: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
  """An iterator over a dataset's elements as numpy arrays; also a context manager that closes it.

  Args:
    dataset: a tf.data.Dataset.
  """

  def __init__(self, dataset):
    options = tf.data.Options()
    # TensorFlow's thread that tunes parallelism may miss that its iterator is deleted, which then
    # waits for up to a minute. Without it, AUTOTUNE means a call for each core, at most 16.
    options.autotune.enabled = False
    # The only reference to TensorFlow's iterator, which is deleted with it.
    self._held = [dataset.with_options(options).as_numpy_iterator()]
    _open.add(self)

  def __iter__(self) -> Stream:
    return self

  def __next__(self):
    if not self._held:
      raise ValueError('the iterator is closed')
    try:
      return next(self._held[0])
    except BaseException as error:
      _clear_frames(error)
      raise

  def close(self) -> None:
    """Ends reading ahead, and waits for its threads for a few seconds at most."""
    close([self])

  def __enter__(self) -> Stream:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def close(streams: Iterable[Stream]) -> None:
  """Closes several streams at once, as `Stream.close` does."""
  threads = []
  for stream in streams:
    held, stream._held = stream._held, []
    _open.discard(stream)
    if not held:
      continue
    thread = threading.Thread(target=held.clear, name='close_stream', daemon=True)
    try:
      thread.start()
    except RuntimeError:  # Python 3.12 and later start no threads at exit.
      held.clear()
    else:
      threads.append(thread)
  end = time.monotonic() + _SECONDS
  for thread in threads:
    thread.join(max(0.0, end - time.monotonic()))
  if any(thread.is_alive() for thread in threads):
    logging.warning(
      'a call that reads data has not returned after %g s; going on without it', _SECONDS
    )


def _clear_frames(error: BaseException | None) -> None:
  """Drops the local variables of an exception's finished frames, and those of its causes."""
  while error is not None:
    traceback.clear_frames(error.__traceback__)
    error = error.__cause__ or error.__context__


@atexit.register
def _close_all() -> None:
  # Datasets that others iterate over, such as t5x, may be held by an uncaught exception alone.
  _clear_frames(getattr(sys, 'last_value', None))
  close(list(_open))

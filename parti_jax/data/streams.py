"""Iterators over tf.data datasets, closed before the interpreter shuts down.

tf.data prefetches in its own threads, which call Python. Deleting an iterator waits until their
calls have returned. Once the interpreter has begun to shut down they never return, because threads
no longer get the GIL: a process that still has an iterator then hangs or aborts. That includes an
iterator that is only referenced by the traceback of an uncaught exception. So the code that opens
an iterator closes it, and those left are closed at exit.
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

# How long `close` waits for Python calls in progress, such as a read from a slow disk.
_SECONDS = 5.0
_open: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
  """An iterator over a dataset's elements as numpy arrays; also a context manager that closes it.

  Args:
    dataset: a tf.data.Dataset.
  """

  def __init__(self, dataset):
    options = tf.data.Options()
    # TensorFlow's autotuning thread may miss that its iterator is deleted, which then waits for up
    # to a minute. Without that thread, AUTOTUNE means one call per core, at most 16.
    options.autotune.enabled = False
    # The only reference to TensorFlow's iterator; clearing it deletes the iterator.
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
    """Stops prefetching, and waits for the threads for a few seconds at most."""
    close([self])

  def __enter__(self) -> Stream:
    return self

  def __exit__(self, *_) -> None:
    self.close()


def close(streams: Iterable[Stream]) -> None:
  """Closes several streams in parallel, like `Stream.close`."""
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
      'a call that reads data has not returned after %g s; continuing without it', _SECONDS
    )


def _clear_frames(error: BaseException | None) -> None:
  """Clears the local variables of an exception's finished frames, and of its causes' frames."""
  while error is not None:
    traceback.clear_frames(error.__traceback__)
    error = error.__cause__ or error.__context__


@atexit.register
def _close_all() -> None:
  # Third-party iterations, such as t5x's, may be referenced only by an uncaught exception.
  _clear_frames(getattr(sys, 'last_value', None))
  close(list(_open))

"""Saves and stops a run on SIGTERM or the platform's preemption notice, in the time that is left.

A thread of the command line waits for SIGTERM, which is blocked in all other threads. So a step, a
compilation or a disk that takes too long can't keep it from ending the process in time. Several
processes agree on the step at which they all stop through JAX's preemption service, which gets the
signal from that thread.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

from parti_jax.runs import gce_notice

# Exit status of a run that was asked to stop and has saved: start the same command again to resume
# it (EX_TEMPFAIL).
STATUS = 75
# Signals within this many seconds count as one: whoever ends a process group or a service sends it
# to a process and to its parent, which forwards it.
_TOGETHER = 5.0
# Seconds that the last message may take, such as finding the step of the last checkpoint.
_LAST_SECONDS = 2.0
_AGAIN = 'start again to resume'

_listener: _Listener | None = None


@contextlib.contextmanager
def listening(at_once: str | None = None) -> Iterator[None]:
  """Listens for SIGTERM and the platform's notice while the body runs.

  Enter it in the main thread before importing any library that starts threads, because these
  inherit the blocked signal. Without it, for instance in a notebook, SIGTERM ends the process as
  usual.

  Args:
    at_once: for work that has nothing to save and ends at once: says in the last line what remains
      of it.
  """
  global _listener
  _listener = _Listener(at_once)
  before = signal.signal(signal.SIGTERM, _signalled)
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
  _listener.start()
  gce_notice.watch(_listener.notice)
  try:
    yield
  finally:
    _listener.close()
    _listener = None
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    signal.signal(signal.SIGTERM, before)


def begin(grace_seconds: float, journal, newest_step: Callable[[], int | None]) -> None:
  """Sets, before the first step, how to end a run that can't save in time when asked to stop.

  Args:
    grace_seconds: maximum seconds from SIGTERM or the notice to the end.
    journal: the run's journal, with `write(event, **facts)`.
    newest_step: returns the step of the newest whole checkpoint on the disk, None without one.
  """
  if _listener is not None:
    _listener.begin(grace_seconds, journal, newest_step)


def stop_requested(step: int) -> bool:
  """Returns whether to save and stop at this step; all processes call it before each step.

  Args:
    step: steps done.
  """
  import jax
  from orbax.checkpoint import multihost

  if _listener is not None:
    _listener.reach(step)
  if jax.distributed.is_initialized():
    return multihost.reached_preemption(step)
  return _listener is not None and _listener.stopping


def at_end(function: Callable[[], None]) -> None:
  """Registers a function to call if this module ends the process."""
  if _listener is not None:
    _listener.at_end.append(function)


def end_process(status: int, line: str) -> None:
  """Ends a command-line process from any thread, at once, with a line on stderr.

  Without `listening` it does nothing: only the command line may end its process.
  """
  if _listener is not None:
    _listener.write_line(line)
    os._exit(status)


def _signalled(*_) -> None:
  """Python's handler of SIGTERM."""
  if _listener is not None:
    _listener.signalled()


class _Listener:
  """The thread that waits for SIGTERM, with its knowledge of the run.

  Attributes:
    stopping: whether the run has been asked to stop.
    at_end: functions to call before ending the process.
  """

  def __init__(self, at_once: str | None = None):
    self.stopping = False
    self.at_end: list[Callable[[], None]] = []
    self._at_once = at_once
    self._lock = threading.Lock()
    self._seconds = 25.0
    self._newest_step: Callable[[], int | None] | None = None
    self._journal: Any = None
    self._first_step: int | None = None
    self._training = False
    self._asked_at = 0.0  # Only valid if `stopping`.
    self._signalled_at: float | None = None
    self._pending: str | None = None
    self._closed = False
    # A separate descriptor, since stderr is redirected while TensorFlow is imported.
    self._terminal = os.dup(2)
    self._thread = threading.Thread(target=self._listen, name='preemption', daemon=True)

  def start(self) -> None:
    self._thread.start()

  def close(self) -> None:
    self._closed = True
    self._thread.join()
    os.close(self._terminal)

  def begin(self, seconds, journal, newest_step) -> None:
    self._seconds, self._journal, self._newest_step = seconds, journal, newest_step

  def reach(self, step: int) -> None:
    """Records how far the run is: before its first step ends there is nothing to save."""
    if self._first_step is None:
      self._first_step = step
    self._training = step > self._first_step

  def signalled(self) -> None:
    """Handles a SIGTERM that reached another thread nevertheless."""
    self._pending = 'SIGTERM'

  def notice(self, source: str) -> None:
    """Handles a platform's notice; a SIGTERM after it counts as the first signal."""
    self._pending = self._pending or source

  def write_line(self, line: str) -> None:
    """Writes a line past Python's buffers, which another thread may hold."""
    before = '\n' if os.isatty(self._terminal) else ''  # A progress bar's line.
    os.write(self._terminal, f'{before}parti-jax: {line}\n'.encode())

  def _listen(self) -> None:
    while not self._closed:
      if signal.sigtimedwait({signal.SIGTERM}, 0.2):
        self._pending = 'SIGTERM'
      source, self._pending = self._pending, None
      now = time.monotonic()
      if source == 'SIGTERM':
        if self._signalled_at is not None and now - self._signalled_at > _TOGETHER:
          self._end('asked to stop a second time', again=True)
        self._signalled_at = self._signalled_at or now
      if source and not self.stopping:
        self._stop(source, now)
      if self.stopping and time.monotonic() - self._asked_at > self._seconds:
        self._end(
          f'asked to stop, but the step and its checkpoint took more than the '
          f'{self._seconds:g} s of train.grace_seconds'
        )

  def _stop(self, source: str, now: float) -> None:
    if self._at_once:
      self.write_line(f'asked to stop by {source}; {self._at_once}; {_AGAIN}')
      os._exit(STATUS)
    self._asked_at, self.stopping = now, True
    several = _meets_others()
    if not several and not self._training:
      self._end('asked to stop before the first step was done')
    if self._journal is not None:
      # In another thread, since the disk may be slow.
      _in_background(
        lambda: self._journal.write(
          'asked to stop', f'asked to stop by {source}, {self._seconds:g} s to save', source=source
        )
      )
    if several:
      # JAX's own handler for the signal notifies the other processes.
      signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
      signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

  def _end(self, why: str, again: bool = False) -> None:
    """Ends the process, regardless of the main thread."""
    words: list[str] = []
    _in_background(lambda: self._last_words(why, words)).join(_LAST_SECONDS)
    what = words[0] if words else 'the last whole checkpoint is kept'
    self.write_line(f'{why}{": ended at once" if again else ""}; {what}; {_AGAIN}')
    os._exit(STATUS)

  def _last_words(self, why: str, words: list[str]) -> None:
    if self._newest_step is None:
      words.append('the run is unchanged')
    else:
      step = self._newest_step()
      words.append(
        'there is no checkpoint yet'
        if step is None
        else f'the last whole checkpoint is the one of step {step}'
      )
      self._journal.write('stop', f'{why}; {words[0]}', reason='no time to save', step=step)
    for function in self.at_end:
      function()


def _meets_others() -> bool:
  """Returns whether JAX's preemption service runs, without importing JAX."""
  jax: Any = sys.modules.get('jax')
  distributed = getattr(jax, 'distributed', None)
  return bool(
    distributed and distributed.is_initialized() and jax.config.jax_enable_preemption_service
  )


def _in_background(function: Callable[[], None]) -> threading.Thread:
  thread = threading.Thread(target=function, daemon=True)
  thread.start()
  return thread

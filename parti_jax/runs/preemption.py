"""Told to stop: by SIGTERM or the platform's notice. A checkpoint in the time that is left.

A thread of the command line waits for SIGTERM, which is blocked everywhere else, so that a step, a
compilation or a disk that takes too long can't keep it from ending the process in time. Several
processes agree on the step at which all stop through JAX's preemption service, which learns of the
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

from parti_jax.runs import gce_notice

# A run that was told to stop, saved and ended: start the same command again to go on (EX_TEMPFAIL).
STATUS = 75
# The signals of so many seconds count as one: those who end a process group or a service send it to
# a process and to its parent, which passes it on.
_TOGETHER = 5.0
# How long the last words may take, such as what step the last checkpoint is of.
_LAST_SECONDS = 2.0
_AGAIN = 'start again to go on'

_listener: _Listener | None = None


@contextlib.contextmanager
def listening(at_once: str | None = None) -> Iterator[None]:
  """Listens to SIGTERM and the platform's notice while the body runs.

  To be entered in the main thread before any library that starts threads is imported: these take
  over that the signal is blocked. Without it, as in a notebook, SIGTERM ends the process as usual.

  Args:
    at_once: for work with nothing to save, which ends at once: what stays of it, for the last line.
  """
  global _listener
  _listener = _Listener(at_once)
  before = signal.signal(signal.SIGTERM, lambda *_: _listener and _listener.signalled())
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
  """Says, before the first step, what ends a run that is told to stop and can't save in time.

  Args:
    grace_seconds: from SIGTERM or notice to the end, at most.
    journal: the run's, with `write(event, **facts)`.
    newest_step: returns the step of the newest whole checkpoint on the disk, None without one.
  """
  if _listener is not None:
    _listener.begin(grace_seconds, journal, newest_step)


def told_to_stop(step: int) -> bool:
  """Whether to save and stop at this step; to be asked before every step, by all processes alike.

  Args:
    step: steps done.
  """
  import jax
  from orbax.checkpoint import multihost

  if _listener is not None:
    _listener.reach(step)
  if jax.distributed.is_initialized():
    return multihost.reached_preemption(step)
  return _listener is not None and _listener.told


def at_end(function: Callable[[], None]) -> None:
  """Has a function called if this module ends the process."""
  if _listener is not None:
    _listener.at_end.append(function)


def end_process(status: int, line: str) -> None:
  """Ends a process of the command line from any thread, at once, with a line on stderr.

  Without `listening` it does nothing: a process that is not the command line's is not ours to end.
  """
  if _listener is not None:
    _listener.write_line(line)
    os._exit(status)


class _Listener:
  """The thread that waits for SIGTERM, and what it knows of the run.

  Attributes:
    told: whether the run has been told to stop.
    at_end: functions to call before the process is ended.
  """

  def __init__(self, at_once: str | None = None):
    self.told, self.at_end = False, []
    self._at_once = at_once
    self._lock = threading.Lock()
    self._seconds, self._newest_step, self._journal = 25.0, None, None
    self._first_step, self._training = None, False
    self._told_at = self._signalled_at = self._pending = None
    self._closed = False
    # Of its own, since stderr's is elsewhere while TensorFlow is imported.
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
    """Notes how far the run is: before the end of its first step there is nothing to save."""
    if self._first_step is None:
      self._first_step = step
    self._training = step > self._first_step

  def signalled(self) -> None:
    """Of a SIGTERM that came to another thread all the same."""
    self._pending = 'SIGTERM'

  def notice(self, source: str) -> None:
    """Of a platform's notice; SIGTERM may follow, which then is the first."""
    self._pending = self._pending or source

  def write_line(self, line: str) -> None:
    """Past Python's buffers, which another thread may hold."""
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
          self._end('told to stop a second time', again=True)
        self._signalled_at = self._signalled_at or now
      if source and not self.told:
        self._tell(source, now)
      if self.told and time.monotonic() - self._told_at > self._seconds:
        self._end(
          f'told to stop, but the step and its checkpoint took more than the '
          f'{self._seconds:g} s of train.grace_seconds'
        )

  def _tell(self, source: str, now: float) -> None:
    if self._at_once:
      self.write_line(f'told to stop by {source}; {self._at_once}; {_AGAIN}')
      os._exit(STATUS)
    self._told_at, self.told = now, True
    several = _meets_others()
    if not several and not self._training:
      self._end('told to stop before the first step was done')
    if self._journal is not None:
      # In a thread of its own, since the disk may be what is slow.
      _in_background(
        lambda: self._journal.write(
          'told to stop', f'told to stop by {source}, {self._seconds:g} s to save', source=source
        )
      )
    if several:
      # JAX has a handler of its own for the signal, which tells the other processes.
      signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
      signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
      signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

  def _end(self, why: str, again: bool = False) -> None:
    """Ends the process, whatever the main thread does."""
    words: list[str] = []
    _in_background(lambda: self._last_words(why, words)).join(_LAST_SECONDS)
    what = words[0] if words else 'the last whole checkpoint stays'
    self.write_line(f'{why}{": ended at once" if again else ""}; {what}; {_AGAIN}')
    os._exit(STATUS)

  def _last_words(self, why: str, words: list[str]) -> None:
    if self._newest_step is None:
      words.append('nothing of the run is changed')
    else:
      step = self._newest_step()
      words.append(
        'there is no checkpoint yet'
        if step is None
        else f'the last whole checkpoint stays the one of step {step}'
      )
      self._journal.write('stop', f'{why}; {words[0]}', reason='no time to save', step=step)
    for function in self.at_end:
      function()


def _meets_others() -> bool:
  """Whether JAX's preemption service is there, without importing JAX for it."""
  jax = sys.modules.get('jax')
  distributed = getattr(jax, 'distributed', None)
  return bool(
    distributed and distributed.is_initialized() and jax.config.jax_enable_preemption_service
  )


def _in_background(function: Callable[[], None]) -> threading.Thread:
  thread = threading.Thread(target=function, daemon=True)
  thread.start()
  return thread

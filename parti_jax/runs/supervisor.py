"""Runs the work in a child process, so that the parent can explain how it ended.

JAX's distributed runtime ends a process from native code, by SIGABRT, when the coordinator can't
be reached or another process has died. Nothing in that process can then say what to do about it,
but its parent can.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from collections.abc import Iterator

from parti_jax.core import errors

# From the first matching line on, native output is held back: one line replaces it at the end.
_FATAL = re.compile(
  rb'[EF]\d{4} .*\b(coordination_service|coordination_service_agent|client)'
  rb'\.(cc|h):'
)
# The CPU collectives print such a line for each group of devices.
_NOISE = b'[Gloo] Rank '
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_PR_SET_PDEATHSIG = 1
# Seconds that a child may take to end after an error.
_SECONDS_TO_END = 10


class WatchedProcess:
  """Forks once; the child does the work, the parent waits for it and explains its end.

  Attributes:
    connected: whether the child has called `connect`; shared by parent and child.
  """

  def __init__(self):
    # Two shared bytes: 1 once connected; the exit status of a failure that was reported.
    self._shared = mmap.mmap(-1, 2)

  @property
  def connected(self) -> bool:
    return bool(self._shared[0])

  def connect(self) -> None:
    """Records, in the child, that it is connected to the other processes."""
    self._shared[0] = 1

  @contextlib.contextmanager
  def failures(self) -> Iterator[None]:
    """In the child: an error in the body prints its own message, then the parent ends the child.

    Without this, the child may wait at its end for the other processes, which wait for it.
    """
    try:
      yield
    except BaseException as error:
      self._shared[1] = _exit_status(error)
      if isinstance(error, Exception):
        # JAX would enter a barrier at exit, and the other processes would report that barrier's
        # failure, not this process. The function registered last runs first, after the error is
        # printed.
        atexit.register(time.sleep, 2 * _SECONDS_TO_END)
      raise

  def fork(self, explain: Callable[[str], str]) -> int | None:
    """Forks the process; call it before any threads start, in particular JAX's.

    Args:
      explain: takes the runtime's last output and returns a line that says what happened.

    Returns:
      None in the child, which continues with the work. In the parent, once the child has ended,
      the exit status: the child's own, 1 if the runtime ended it, or 128 + the signal's number if
      another signal did.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    reading, writing = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if pid == 0:
      os.close(reading)
      _end_with(parent)
      _send_native_output(writing)
      return None
    os.close(writing)
    return self._follow(pid, reading, explain)

  def _follow(self, pid: int, reading: int, explain: Callable[[str], str]) -> int:
    for number in _FORWARDED:
      signal.signal(number, lambda number, _: os.kill(pid, number))
    relay = _Relay(reading)
    code = os.waitstatus_to_exitcode(self._wait(pid))
    held = relay.finish()
    if code < 0 and self._shared[1]:
      return self._shared[1]  # The child has already reported its error.
    if code == -signal.SIGABRT and 'JAX distributed service detected fatal errors' in held:
      _say(explain(held))
      return 1
    sys.stderr.write(held)
    if code >= 0:
      return code
    name = signal.Signals(-code).name
    hint = ', as the system does when memory runs out' if name == 'SIGKILL' else ''
    _say(f'this process was ended by {name}{hint}')
    return 128 - code

  def _wait(self, pid: int) -> int:
    """Waits for the child, and kills it if it still runs a while after an error."""
    failed_since = None
    while True:
      ended, status = os.waitpid(pid, os.WNOHANG)
      if ended:
        return status
      if self._shared[1]:
        failed_since = failed_since or time.monotonic()
        if time.monotonic() - failed_since > _SECONDS_TO_END:
          os.kill(pid, signal.SIGKILL)
      time.sleep(0.1)


class _Relay:
  """Copies a pipe to stderr line by line, without noise, until a fatal line comes."""

  def __init__(self, reading: int):
    self._held: list[bytes] = []
    self._thread = threading.Thread(target=self._copy, args=(reading,), daemon=True)
    self._thread.start()

  def _copy(self, reading: int) -> None:
    with os.fdopen(reading, 'rb') as lines:
      for line in lines:
        if self._held or _FATAL.match(line):
          self._held.append(line)
        elif not line.startswith(_NOISE):
          os.write(2, line)

  def finish(self) -> str:
    """Waits for the end of the pipe and returns the lines that were held back."""
    self._thread.join(5)  # A process that the child started may keep the pipe open.
    return b''.join(self._held).decode(errors='replace')


def _exit_status(error: BaseException) -> int:
  """Returns the command line's exit status after an error."""
  if isinstance(error, SystemExit):
    return int(error.code or 0)
  if isinstance(error, KeyboardInterrupt):
    return 130
  return 2 if isinstance(error, errors.UserError) else 1


def _end_with(parent: int) -> None:
  """Makes this process end with its parent, and receive signals only from it."""
  os.setpgid(0, 0)
  if sys.platform.startswith('linux'):
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
      os._exit(1)


def _send_native_output(writing: int) -> None:
  """Sends native code's output through the parent; Python keeps writing to the terminal."""
  sys.stdout = os.fdopen(os.dup(1), 'w', buffering=1)
  sys.stderr = os.fdopen(os.dup(2), 'w', buffering=1)
  os.dup2(writing, 1)
  os.dup2(writing, 2)
  os.close(writing)


def _say(line: str) -> None:
  print(f'parti-jax: error: {line}', file=sys.stderr)

"""Locks a run's folder for one process, or for the processes of one run, at a time.

`lock.json` in the folder names the owner, which rewrites it every few seconds. If an earlier owner
ran on this machine, a new run looks up its process. If it ran on another machine, the new run waits
to see whether the file still changes. Clocks are never compared.

Reading and replacing the lock is atomic for runs that start at the same time. On disks, flock on
`lock.json.guard` ensures this; the system releases it however the process ends. On object stores
and disks without flock, a run creates `lock.json.claim`, which only one can do at a time. A claim
that a killed process leaves behind expires as a lock does. Some servers with S3's interface ignore
the condition "only if absent"; there a new owner checks after a while that it still has the lock.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import itertools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.runs import preemption

FILE = 'lock.json'
# Seconds between two writes, and seconds without a change until a lock's owner counts as dead. The
# owner may lose that long to a busy disk or a long call; after a hard end the next run waits for it.
BEAT = 10.0
PATIENCE = 60.0
# Seconds until a new lock is read again, in a store without exclusive creation.
SETTLE = 3.0
_LARGEST = 64 * 1024
# Tenths of a second to wait for a process that reads or replaces the lock.
_GUARD_TRIES = 50
# Numbers the barriers, which all processes of a run reach in the same order.
_barriers = itertools.count()
# The locks that this process holds, by lock id; the process id alone doesn't distinguish them.
_held: dict[str, RunLock] = {}


def check() -> None:
  """Raises UserError if a run of this process is known to have lost its folder."""
  for lock in list(_held.values()):
    lock.check()


def confirm() -> None:
  """Like `check`, but reads the lock file; call it before writing a checkpoint."""
  for lock in list(_held.values()):
    lock.confirm()


def lives(model_dir) -> bool | None:
  """Returns whether a process trains in a folder; None if only the lock's host can know."""
  found = _read(storage.join(model_dir, FILE))
  if not found:
    return False
  me = _this_process()
  if me['boot'] and all(found.get(key) == me[key] for key in ('boot', 'pid_namespace')):
    return _started(found.get('pid')) == found.get('started')
  return None


class RunLock:
  """The lock of a run's folder, held within `with`.

  All processes of a run enter it together: process 0 holds it, and all raise if it is refused.

  Attributes:
    replaced: describes the dead process that held the lock before; None if nobody did.

  Args:
    model_dir: the run's folder, a path or a URL.

  Raises:
    UserError: on entering, if another run owns the folder.
  """

  def __init__(self, model_dir):
    self._model_dir = model_dir
    self._path = storage.join(model_dir, FILE)
    self._me = _this_process()
    self._made_folder = False
    self._exclusive = True  # Whether a guard kept others from the lock.
    self._lost: str | None = None
    self._ending = threading.Event()
    self._thread = threading.Thread(target=self._keep, name='run_lock', daemon=True)
    self.replaced: str | None = None

  def __enter__(self) -> RunLock:
    import jax

    refusal = ''
    if jax.process_index() == 0:
      _held[self._me['id']] = self
      try:
        self._take()
      except errors.UserError as error:
        refusal = str(error)
      except OSError as error:
        refusal = (
          f"{self._path}: can't be written ({error.strerror}); make room or give "
          'yourself write permission there, or choose another --model_dir'
        )
    refusal = _from_process_0(refusal)
    if refusal:
      _held.pop(self._me['id'], None)
      raise errors.UserError(refusal)
    if jax.process_index() == 0:
      preemption.at_end(self.release)
      self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self.release()

  def report(self, journal) -> None:
    """Prints a takeover and writes it to the run's journal."""
    if self.replaced:
      text = f'took the folder over from {self.replaced}, which is dead'
      _say(f'{self._model_dir}: {text}')
      journal.write('lock taken over', text, owner=self.replaced)

  def check(self) -> None:
    """Raises UserError if another run is known to have taken over the folder.

    A command-line process ends at once instead, so that it writes nothing more to the folder.
    """
    if self._lost:
      preemption.end_process(2, f'error: {self._lost}')
      raise errors.UserError(self._lost)

  def confirm(self) -> None:
    """Like `check`, but reads the lock file."""
    if not self._lost:
      with contextlib.suppress(OSError):  # The next checkpoint will report a failing disk.
        self._look(_read(self._path))
    self.check()

  def release(self) -> None:
    """Releases the folder if this run still owns it; disk errors are ignored."""
    if _held.pop(self._me['id'], None) is None:
      return
    self._ending.set()
    with contextlib.suppress(OSError, errors.UserError, _Busy), self._guard():
      if _id(_read(self._path)) == self._me['id']:
        storage.remove(self._path)
    if self._made_folder:
      with contextlib.suppress(OSError):
        os.rmdir(self._model_dir)  # Succeeds only if the run wrote nothing.

  def _take(self) -> None:
    if not storage.is_url(self._model_dir):
      self._made_folder = not os.path.isdir(self._model_dir)
      storage.make_folder(self._model_dir)
    found, taken = None, False
    while not taken:
      found = _read(self._path)
      if found is not None and not self._is_dead(found):
        raise errors.UserError(
          f'{self._model_dir}: another run trains in this folder: {_words(found)}; wait for it to '
          'end, stop it by sending that process SIGTERM, or choose another --model_dir'
        )
      try:
        with self._guard(), self._claim():
          # Otherwise another start was quicker; read its lock.
          if _read(self._path) == found:
            self._write()
            taken = True
      except _Busy as error:
        raise errors.UserError(
          f'{self._model_dir}: another run is starting in this folder; wait '
          'for it to end, or choose another --model_dir'
        ) from error
    if not self._exclusive:
      time.sleep(SETTLE)
      if _id(_read(self._path)) != self._me['id']:
        raise errors.UserError(
          f'{self._model_dir}: another run started in this folder at the same '
          'time and owns it now; choose another --model_dir'
        )
    self.replaced = _words(found) if found is not None else None

  def _write(self) -> None:
    self._me['beat'] += 1
    storage.write(self._path, json.dumps(self._me, indent=2) + '\n')

  def _is_dead(self, owner: dict, path: str | None = None) -> bool:
    """Returns whether the owner has died; if it must, waits to see whether its file changes."""
    path = path or self._path
    if owner.get('id') in _held:
      return False
    here = all(owner.get(key) == self._me[key] for key in ('boot', 'pid_namespace'))
    if here and self._me['boot']:
      # A lock of this process that isn't in `_held` could not be removed when its run ended.
      return owner.get('pid') == os.getpid() or _started(owner.get('pid')) != owner.get('started')
    _say(
      f'{self._model_dir}: {_words(owner)} has left its lock here; waiting up to '
      f'{PATIENCE:g} s to see whether it still runs'
    )
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
      time.sleep(min(2.0, PATIENCE / 10))
      found = _read(path)
      if found != owner:
        return found is None
    return True

  def _keep(self) -> None:
    """Rewrites the lock at intervals until the run ends or loses the lock."""
    while not self._ending.wait(BEAT):
      # Ignore a failing disk: it may recover before another run takes over.
      with contextlib.suppress(OSError, errors.UserError, _Busy):
        self.beat()
      if self._lost:
        preemption.end_process(2, f'error: {self._lost}')
        return  # Outside the command line the training loop's `check` raises it.

  def beat(self) -> None:
    """Rewrites the lock if this run still owns it."""
    # A write that a store accepts much later would replace the lock of a run that took over.
    with self._guard(), store_retries.at_most(BEAT):
      self._look(_read(self._path))
      if not self._lost and not self._ending.is_set():
        self._write()

  def _look(self, found: dict | None) -> None:
    if _id(found) != self._me['id']:
      by = _words(found) if found else 'another run, which has ended, or someone removed the file'
      self._lost = (
        f'{self._path} no longer belongs to this run: it could not update the lock for '
        f'{PATIENCE:g} s or more, and the folder was taken over by {by}; nothing more '
        'is written here'
      )

  @contextlib.contextmanager
  def _guard(self) -> Iterator[None]:
    """Keeps other processes of this machine, or of a disk with flock, from replacing the lock.

    Raises:
      _Busy: another process holds the guard.
    """
    self._exclusive = not storage.is_url(self._path)
    if not self._exclusive:
      yield
      return
    guard = f'{self._path}.guard'
    for _ in range(_GUARD_TRIES):
      with open(guard, 'wb') as file:
        try:
          fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
          alone = _is_file(file, guard)
        except BlockingIOError:
          alone = False
        except OSError:  # A disk without flock.
          self._exclusive, alone = False, True
        if alone:
          try:
            yield
          finally:
            with contextlib.suppress(FileNotFoundError):
              os.unlink(guard)
          return
      time.sleep(0.1)
    raise _Busy

  @contextlib.contextmanager
  def _claim(self) -> Iterator[None]:
    """Keeps other starts from replacing the lock if there is no guard.

    Raises:
      _Busy: another process holds the claim.
    """
    if self._exclusive:
      yield
      return
    claim = f'{self._path}.claim'
    while not self._claimed(claim):
      other = _read(claim)
      if other is not None and not self._is_dead(other, claim):
        raise _Busy
      if _read(claim) == other:
        _remove(claim)
    try:
      # A second creation succeeds only if the store ignores the condition.
      self._exclusive = not _created(claim, self._me | {'again': True})
      yield
    finally:
      _remove(claim)

  def _claimed(self, claim: str) -> bool:
    for _ in range(_GUARD_TRIES):
      if _created(claim, self._me):
        return True
      time.sleep(0.1)
    return False


class _Busy(Exception):
  """Another process is reading or replacing the lock right now."""


def _is_file(file, path: str) -> bool:
  """Returns whether an open file is still the one at `path`; its last holder may have removed it."""
  try:
    return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
  except FileNotFoundError:
    return False


def _created(path: str, owner: dict) -> bool:
  """Creates a file that names an owner; returns False if the file exists already."""
  try:
    storage.create(path, json.dumps(owner).encode())
  except FileExistsError:
    return False
  return True


def _remove(path: str) -> None:
  with contextlib.suppress(FileNotFoundError):
    storage.remove(path)


def _this_process() -> dict:
  now = datetime.datetime.now(datetime.UTC)
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'since': f'{now:%Y-%m-%d %H:%M:%S} UTC',
    'id': uuid.uuid4().hex,
    'beat': 0,
    'started': _started(os.getpid()),
    'boot': _text('/proc/sys/kernel/random/boot_id'),
    'pid_namespace': _link('/proc/self/ns/pid'),
  }


def _read(path: str) -> dict | None:
  """Returns the owner that a lock names; None without a lock, {} for a file that isn't a lock."""
  try:
    found = storage.read_json(path, _LARGEST)
  except FileNotFoundError:
    return None
  except ValueError:
    return {}
  return found if isinstance(found, dict) else {}


def _id(found: dict | None) -> str | None:
  return found.get('id') if found else None


def _words(owner: dict) -> str:
  return (
    f'process {owner.get("pid", "?")} on host {owner.get("host", "?")}, since '
    f'{owner.get("since", "?")}'
  )


def _started(pid) -> str | None:
  """Returns when a process of this machine started, in ticks since boot; None if it is dead."""
  text = _text(f'/proc/{pid}/stat')
  fields = text.rpartition(')')[2].split() if text else ['X']
  # The fields from the third of `man 5 proc` on. A zombie counts as dead.
  return None if fields[0] in 'ZX' else fields[19]


def _text(path: str) -> str | None:
  try:
    return pathlib.Path(path).read_text(encoding='utf-8', errors='replace').strip()
  except OSError:
    return None


def _link(path: str) -> str | None:
  try:
    return os.readlink(path)
  except OSError:
    return None


def _from_process_0(text: str) -> str:
  """Returns process 0's text on all processes of the run."""
  import jax
  import numpy as np
  from orbax.checkpoint import multihost

  if jax.process_count() == 1:
    return text
  # The others wait here, since a collective would time out.
  multihost.get_barrier_sync_fn()(
    key=f'parti_jax_run_lock_{next(_barriers)}', timeout_ms=int(1000 * (PATIENCE + 300))
  )
  padded = np.frombuffer(text.encode()[:2000].ljust(2000), np.uint8)
  received = multihost.broadcast_one_to_all(padded)
  return bytes(np.asarray(received, np.uint8)).decode(errors='ignore').strip()


def _say(line: str) -> None:
  print(f'parti-jax: {line}', file=sys.stderr, flush=True)

"""Writes a run's journal: one file for each start, one line for each event.

The files are `journal/<time of the start, UTC>-<host>-<process id>.jsonl` in the run's folder. A
line is JSON with the time, a sentence and the event's name first, so that people can read it too.
`history` reads it for `parti-jax info`. A start whose file has no 'stop' event was killed.

Files of processes other than the first end in `-process<index>.jsonl` and have only the events
that the first process can't know.
"""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import socket
import sys
import threading
import time
from typing import Any

from parti_jax.core import errors
from parti_jax.core import gin_config as gin_config_lib
from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.runs import environment

FOLDER = 'journal'
_LARGEST = 1 << 24


class Journal:
  """Writes what happens to a run and, as a context manager, also how it ends.

  Nothing is written before the first event. A line is on the disk once `write` has returned, so
  SIGKILL loses none. On object stores, which can't append, each event rewrites the file. Lines
  that can't be written are kept and tried again with the next event: a full disk must not end a
  run because of its journal.

  Attributes:
    name: name of this start, part of the names of its files.
    step: steps done, for the 'stop' event; None before training.

  Args:
    model_dir: the run's folder, a path or a URL.
  """

  def __init__(self, model_dir):
    import jax

    self._folder = model_dir
    self._process = jax.process_index()
    self.step: int | None = None
    self.name = (
      f'{_now():%Y%m%dT%H%M%S.%f}'[:-3] + f'Z-{_in_a_file_name(socket.gethostname())}-{os.getpid()}'
    )
    suffix = f'-process{self._process}' if self._process else ''
    self._path = storage.join(model_dir, FOLDER, f'{self.name}{suffix}.jsonl')
    # On a disk: the lines not written yet. On object stores: all lines.
    self._lines: list[str] = []
    self._begun = self._torn = self._complained = False
    self._skipped: dict[str, int] = {}
    self._retries: dict[str, int] = {}
    self._lock = threading.Lock()
    self._started, self._progress_due = time.monotonic(), 0.0
    # The newest progress, while it is not written.
    self._progress: tuple[str, dict[str, Any]] | None = None

  def write(self, event: str, text: str = '', every_process: bool = False, **facts: Any) -> None:
    """Writes one event. If the disk or connection fails, prints a warning once and doesn't raise.

    May be called from any thread.

    Args:
      event: a short name, such as 'checkpoint'.
      text: a sentence for people, without a full stop; made from the facts if omitted.
      every_process: whether processes other than the first write it too, to their own files.
      **facts: JSON values; other objects are written as text.
    """
    if self._process and not every_process:
      return
    facts = {name: plain(value) for name, value in facts.items()}
    if self._process:
      facts['process'] = self._process
    text = text or _as_text(event, facts)
    record = {'time': _time(), 'text': text, 'event': event} | facts
    with self._lock:
      self._lines.append(json.dumps(record, ensure_ascii=False) + '\n')
      try:
        if storage.is_url(self._path):
          storage.write(self._path, ''.join(self._lines))
        else:
          self._append()
        self._begun = True
      except Exception as error:
        # Object stores' libraries raise their own errors, and a journal must not end a run.
        if not self._complained:
          self._complained = True
          print(
            f"parti-jax: {self._path} can't be written ({error}); training continues",
            file=sys.stderr,
          )

  def start(self, text: str, gin_config: str, **facts: Any) -> None:
    """Writes that training begins, with its environment and gin values.

    The gin values go to `config.gin` and stay in `configs/<name of the start>.gin`. A start with
    the same values as the previous one gets no new file; its event names the previous file.

    Args:
      text: a sentence for people.
      gin_config: the gin values in force.
      **facts: as for `write`, such as step, the steps done before.

    Raises:
      OSError: config.gin can't be written.
    """
    if self._process:
      return
    storage.write(storage.join(self._folder, 'config.gin'), gin_config)
    configs = storage.join(self._folder, 'configs')
    kept = max(storage.names(configs), default='')
    if not kept or storage.read(storage.join(configs, kept), _LARGEST) != gin_config.encode():
      kept = f'{self.name}.gin'
      storage.write(storage.join(configs, kept), gin_config)
    self.step = facts.get('step')
    self.write('start', text, config=f'configs/{kept}', **facts, **environment.describe())

  def checkpoint(self, step: int, skipped: dict[str, int]) -> None:
    """Writes that a checkpoint is being written; also calls `skipped` and `store_retries`."""
    self.write('checkpoint', f'writing a checkpoint of step {step}', step=step)
    self.skipped(skipped)
    self.store_retries()

  def skipped(self, counts: dict[str, int]) -> None:
    """Writes how many examples could not be read, by reason, if the counts have changed.

    Args:
      counts: the counts of this process in this run; each process writes its own.
    """
    if counts != self._skipped:
      self._skipped = dict(counts)
      what = ', '.join(f'{count} {reason}' for reason, count in sorted(counts.items()))
      self.write('skipped', f'examples skipped so far: {what}', every_process=True, counts=counts)

  def store_retries(self) -> None:
    """Writes how often this process repeated requests to object stores, if that has changed."""
    counts = store_retries.counts()
    if counts != self._retries:
      self._retries = counts
      self.write(
        'store retries',
        f'requests to stores repeated so far: {store_retries.summary()}',
        every_process=True,
        counts=counts,
      )

  def progress(self, step: int, metrics: dict[str, float]) -> None:
    """Writes how far the run is, often in the first minutes and then every ten minutes.

    The newest progress is also written when the run ends.

    Args:
      step: steps done.
      metrics: the latest metrics, of which 'loss' and 'examples_per_second' are written.
    """
    elapsed = time.monotonic() - self._started
    facts: dict[str, Any] = {'step': step}
    facts |= {name: metrics[name] for name in ('loss', 'examples_per_second') if name in metrics}
    self._progress = _time(), facts
    if elapsed >= self._progress_due:
      self._progress_due = elapsed + min(600.0, max(10.0, elapsed / 10))
      self._write_progress()

  def _write_progress(self) -> None:
    if self._progress is not None:
      when, facts = self._progress
      self.write('progress', _as_text('progress', facts), time=when, **facts)
      self._progress = None

  def __enter__(self) -> Journal:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    facts = {}
    if error is None:
      reason, text = 'finished', 'nothing is left to train'
    elif isinstance(error, SystemExit):
      reason, text = 'asked to stop', f'asked to stop, ends with status {error.code}'
    elif isinstance(error, KeyboardInterrupt):
      reason, text = 'interrupted', 'interrupted from the keyboard'
    else:
      words = gin_config_lib.without_call_chain(error).split()
      message = ' '.join([f'{kind.__name__}:', *words])[:1000]
      reason, text, facts = 'error', message, {'error': message}
    # An error before anything was done isn't part of a run yet.
    if self._begun or self._is_a_run():
      self._write_progress()
      where = f' at step {self.step}' if self.step is not None else ''
      self.write(
        'stop',
        f'ended{where}: {text}',
        every_process=reason == 'error',
        reason=reason,
        step=self.step,
        **facts,
      )

  def _is_a_run(self) -> bool:
    try:
      return storage.is_folder(storage.join(self._folder, 'checkpoints'))
    except errors.UserError:  # The store fails; that has been reported already.
      return False

  def _append(self) -> None:
    # A line that a full disk cut short must not swallow the next one.
    storage.make_folder(storage.join(self._folder, FOLDER))
    text = ('\n' if self._torn else '') + ''.join(self._lines)
    self._torn = True
    with open(storage.as_epath(self._path), 'a', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    self._torn, self._lines = False, []


def plain(value: Any) -> Any:
  """Returns a JSON value: NumPy and JAX scalars as Python's, anything JSON can't hold as text."""
  if isinstance(value, dict):
    return {str(name): plain(inner) for name, inner in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(inner) for inner in value]
  if hasattr(value, 'item') and not getattr(value, 'shape', ()):
    value = value.item()
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _now() -> datetime.datetime:
  return datetime.datetime.now(datetime.UTC)


def _time() -> str:
  return f'{_now():%Y-%m-%d %H:%M:%S}'


def _as_text(event: str, facts: dict[str, Any]) -> str:
  return ', '.join([event, *(f'{name} {value}' for name, value in facts.items())])


def _in_a_file_name(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9._-]', '_', text)

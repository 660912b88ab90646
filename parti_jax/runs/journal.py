"""A run's journal: what happened to it, one file for each start, one line for each event.

The files are `journal/<time of the start, UTC>-<host>-<process id>.jsonl` in the run's folder. A
line is JSON with the time, a sentence and the event's name first, so that a person can read it as
well; `story` reads it for `parti-jax info`. A start whose file has no stop was killed.

Files of processes other than the first have only what the first can not know, and end in
`-process<index>.jsonl`.
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
  """Writes what happens to a run, as a context manager also how it ends.

  Nothing is written before the first event. A line is on the disk once `write` has returned, and
  an end by SIGKILL loses none. On object stores, which can't append, the file is written anew for
  each event. What can't be written is kept and tried again with the next event: a full disk must
  not end a run because of its journal.

  Attributes:
    name: of this start, as in the names of its files.
    step: steps done, for the event of the end; None before training.

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
    # On a disk: lines that are not written yet. On object stores: all lines.
    self._lines: list[str] = []
    self._begun = self._torn = self._complained = False
    self._skipped: dict[str, int] = {}
    self._retries: dict[str, int] = {}
    self._lock = threading.Lock()
    self._started, self._progress_due = time.monotonic(), 0.0

  def write(self, event: str, text: str = '', every_process: bool = False, **facts: Any) -> None:
    """Writes one event; never raises for a disk or a connection that fails, but says so once.

    May be called from any thread.

    Args:
      event: a short name, such as 'checkpoint'.
      text: a sentence for people, without a full stop; made of the facts if it is left away.
      every_process: whether processes other than the first write it too, in files of their own.
      **facts: anything that JSON can hold; other things as text.
    """
    if self._process and not every_process:
      return
    facts = {name: plain(value) for name, value in facts.items()}
    if self._process:
      facts['process'] = self._process
    text = text or ', '.join([event, *(f'{name} {value}' for name, value in facts.items())])
    record = {'time': f'{_now():%Y-%m-%d %H:%M:%S}', 'text': text, 'event': event} | facts
    with self._lock:
      self._lines.append(json.dumps(record, ensure_ascii=False) + '\n')
      try:
        if storage.is_url(self._path):
          storage.write(self._path, ''.join(self._lines))
        else:
          self._append()
        self._begun = True
      except Exception as error:
        # Object stores' libraries have errors of their own, and no journal is worth a run.
        if not self._complained:
          self._complained = True
          print(
            f'parti-jax: {self._path} can not be written ({error}); training goes on',
            file=sys.stderr,
          )

  def start(self, text: str, gin_config: str, **facts: Any) -> None:
    """Writes that training begins here, in what surroundings and with which gin values.

    The values go to `config.gin` and stay in `configs/<name of the start>.gin`; a start with the
    values of the one before has no file of its own, and the event names that one's.

    Args:
      text: a sentence for people.
      gin_config: the gin values in force.
      **facts: as in `write`, such as step, the steps that were done before.

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
    """Writes that a checkpoint is being written, and what `skipped` and `store_retries` do."""
    self.write('checkpoint', f'writing a checkpoint of step {step}', step=step)
    self.skipped(skipped)
    self.store_retries()

  def skipped(self, counts: dict[str, int]) -> None:
    """Writes how many examples could not be read, by reason, if that has changed.

    Args:
      counts: those of this process in this run; every process writes its own.
    """
    if counts != self._skipped:
      self._skipped = dict(counts)
      what = ', '.join(f'{count} {reason}' for reason, count in sorted(counts.items()))
      self.write('skipped', f'examples skipped so far: {what}', every_process=True, counts=counts)

  def store_retries(self) -> None:
    """Writes how many requests to object stores this process has repeated, if that has changed."""
    counts = store_retries.counts()
    if counts != self._retries:
      self._retries = counts
      self.write(
        'store retries',
        f'requests to stores repeated so far: {store_retries.told()}',
        every_process=True,
        counts=counts,
      )

  def progress(self, step: int, metrics: dict[str, float]) -> None:
    """Writes how far the run is, often in the first minutes and then every ten minutes.

    Args:
      step: steps done.
      metrics: the last ones; 'loss' and 'examples_per_second' of them are written.
    """
    elapsed = time.monotonic() - self._started
    if elapsed >= self._progress_due:
      self._progress_due = elapsed + min(600.0, max(10.0, elapsed / 10))
      kept = {name: metrics[name] for name in ('loss', 'examples_per_second') if name in metrics}
      self.write('progress', step=step, **kept)

  def __enter__(self) -> Journal:
    return self

  def __exit__(self, kind, error, traceback) -> None:
    facts = {}
    if error is None:
      reason, text = 'finished', 'nothing is left to train'
    elif isinstance(error, SystemExit):
      reason, text = 'told to stop', f'told to stop, ends with status {error.code}'
    elif isinstance(error, KeyboardInterrupt):
      reason, text = 'interrupted', 'interrupted from the keyboard'
    else:
      words = gin_config_lib.without_call_chain(error).split()
      message = ' '.join([f'{kind.__name__}:', *words])[:1000]
      reason, text, facts = 'error', message, {'error': message}
    # An error before anything was done is not yet part of a run.
    if self._begun or self._is_a_run():
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
    except errors.UserError:  # The store fails; that is told already.
      return False

  def _append(self) -> None:
    # A line that a full disk has cut short must not swallow the next one.
    storage.make_folder(storage.join(self._folder, FOLDER))
    text = ('\n' if self._torn else '') + ''.join(self._lines)
    self._torn = True
    with open(storage.as_epath(self._path), 'a', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    self._torn, self._lines = False, []


def plain(value: Any) -> Any:
  """A value as JSON has it: numpy's and JAX's scalars as Python's, what it can't hold as text."""
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


def _in_a_file_name(text: str) -> str:
  return re.sub(r'[^A-Za-z0-9._-]', '_', text)

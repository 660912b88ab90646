"""Summarizes a run from its folder: its progress, its checkpoints, its history.

This doesn't need JAX, so that a login node can report on a run at once. Only verifying old
checkpoints that have no manifest needs JAX.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.runs import history as history_lib
from parti_jax.runs import run_lock

# Maximum bytes of a small JSON file of a checkpoint.
_LARGEST = 1 << 24
_STEP = re.compile(r'\d+')
_DAMAGED = re.compile(r'(\d+)\.damaged.*')


def summarize(model_dir: str, verify: bool = False) -> dict[str, Any]:
  """Returns a summary of a run as a JSON-compatible dict; None stands for unknown values.

  Args:
    model_dir: the run's folder, a path or a URL.
    verify: whether to read the checkpoints' files instead of only comparing their sizes.

  Returns:
    kind: 'run'.
    folder: `model_dir`.
    stage, objective, model, parameters: the objective's name and class, its model's sizes, how many
      parameters are trained.
    lora: what the run's checkpoints say about the adapters that it trains; None without adapters.
    state: 'finished', 'stopped' (on request, or interrupted), 'failed', 'killed', 'running',
      'running or killed' if only the run's host can know, or 'never started'.
    step, steps: the last known step, and the step at which the run ends.
    steps_per_second, seconds_left: from the last hour of the last start.
    loss: {'value', 'step', 'time'}, the last loss in the journal.
    devices, mesh, processes: those of the last start.
    checkpoints: the result of `checkpoints`.
    starts: a dict for each start: time, host, pid, from, to, redone, ended (None: killed, or still
      running), last_sign (time of the last journal entry), reason, errors, config, devices, mesh,
      processes, git, changes (a line for each difference from the previous start), events (text
      and time of each unusual event).
    skipped_examples: {reason: count}, of all processes, since the run began.
    versions, git, command: those of the last start.
    unreadable: lines of the journal that can't be read.

  Raises:
    UserError: the folder's store can't be reached.
  """
  history = history_lib.read(model_dir)
  found = checkpoints(model_dir, verify)
  model = _model(model_dir, found)
  begun = [start for start in history.starts if start.begun]
  facts = (begun[-1].begun or {}) if begun else {}
  saved = max((checkpoint['step'] for checkpoint in found if not checkpoint['fault']), default=None)
  step = begun[-1].last_step if begun else saved
  rate, steps = begun[-1].rate if begun else None, facts.get('steps')
  state, left = _state(history, model_dir), None
  if rate and steps is not None and step is not None and 'running' in state:
    left = max(steps - step, 0) / rate
  return {
    'kind': 'run',
    'folder': str(model_dir),
    'stage': facts.get('stage', model.get('stage')),
    'objective': facts.get('objective'),
    'model': model.get('config'),
    'lora': model.get('lora'),
    'parameters': facts.get('parameters'),
    'state': state,
    'step': step,
    'steps': steps,
    'steps_per_second': rate,
    'seconds_left': left,
    'loss': _loss(begun),
    'devices': facts.get('devices'),
    'mesh': facts.get('mesh'),
    'processes': facts.get('processes'),
    'checkpoints': found,
    'starts': [_start(model_dir, history, index) for index in range(len(history.starts))],
    'skipped_examples': history.skipped_examples,
    'versions': facts.get('versions'),
    'git': facts.get('git'),
    'command': facts.get('command'),
    'unreadable': history.unreadable,
  }


def checkpoints(model_dir: str, verify: bool = False) -> list[dict[str, Any]]:
  """Returns the checkpoints of a run, the oldest first.

  Args:
    model_dir: the run's folder.
    verify: whether to read their files instead of only comparing their sizes.

  Returns:
    A dict for each checkpoint: step; name of its folder; bytes; time of writing, UTC, or None;
    checked, how it was verified: 'sizes', 'digests', 'reading' or None for not at all; fault,
    a description of its damage, or None.
  """
  folder = storage.join(model_dir, 'checkpoints')
  found = []
  for name in storage.names(folder):
    damaged = _DAMAGED.fullmatch(name)
    if not damaged and not _STEP.fullmatch(name):
      continue
    path = storage.join(folder, name)
    sizes = storage.sizes(path)
    checked, fault = (None, 'found damaged before') if damaged else _check(path, verify)
    found.append(
      {
        'step': int(damaged.group(1) if damaged else name),
        'name': name,
        'bytes': sum(sizes.values()),
        'time': _written(path, sizes),
        'checked': checked,
        'fault': fault,
      }
    )
  return sorted(found, key=lambda checkpoint: (checkpoint['step'], checkpoint['name']))


def _check(path: str, verify: bool) -> tuple[str | None, str | None]:
  """Returns how a checkpoint was verified, and its fault or None."""
  from parti_jax.checkpoints import manifest

  try:
    fault = manifest.fault(storage.as_epath(path), sizes_alone=not verify)
    return 'digests' if verify else 'sizes', fault
  except FileNotFoundError:  # An old checkpoint without a manifest.
    if not verify:
      return None, None
  # This needs JAX and Orbax.
  from parti_jax.checkpoints import verification

  return 'reading', verification.fault(storage.as_epath(path).absolute())


def _written(path: str, sizes: dict[str, int]) -> str | None:
  """Returns when Orbax committed a checkpoint, UTC; None if unknown."""
  if '_CHECKPOINT_METADATA' not in sizes:
    return None
  try:
    metadata = storage.read_json(storage.join(path, '_CHECKPOINT_METADATA'), _LARGEST)
    nanoseconds = metadata['commit_timestamp_nsecs'] or metadata['init_timestamp_nsecs']
    time = datetime.datetime.fromtimestamp(nanoseconds / 1e9, datetime.UTC)
  except (ValueError, LookupError, TypeError, OSError, OverflowError, errors.UserError):
    return None
  return f'{time:%Y-%m-%d %H:%M:%S}'


def _model(model_dir: str, found: list[dict[str, Any]]) -> dict[str, Any]:
  """Returns the objective and model config from the newest readable checkpoint, {} without one."""
  for checkpoint in reversed(found):
    path = storage.join(model_dir, 'checkpoints', checkpoint['name'], 'model', 'metadata')
    try:
      model = storage.read_json(path, _LARGEST)
      lora = model.get('lora')
      described = {'stage': model['stage'], 'config': model['config']}
      return described | ({'lora': lora} if isinstance(lora, dict) else {})
    except (OSError, ValueError, LookupError, TypeError, errors.UserError):
      continue
  return {}


def _state(history: history_lib.History, model_dir: str) -> str:
  if not any(start.begun for start in history.starts):
    return 'failed' if history.starts else 'never started'
  stopped = history.starts[-1].stopped
  if stopped is None:
    return {True: 'running', False: 'killed', None: 'running or killed'}[run_lock.lives(model_dir)]
  reason: Any = stopped.get('reason')
  return {'finished': 'finished', 'error': 'failed'}.get(reason, 'stopped')


def _loss(begun: list[history_lib.Start]) -> dict[str, Any] | None:
  progress = next(
    (start.newest_progress for start in reversed(begun) if start.newest_progress), None
  )
  if not progress or 'loss' not in progress:
    return None
  return {'value': progress['loss'], 'step': progress['step'], 'time': progress['time']}


def _start(model_dir: str, history: history_lib.History, index: int) -> dict[str, Any]:
  start = history.starts[index]
  facts, stopped = start.begun or {}, start.stopped or {}
  before = next((other.begun for other in reversed(history.starts[:index]) if other.begun), None)
  return {
    'time': f'{start.time:%Y-%m-%d %H:%M:%S}',
    'host': facts.get('host', start.host),
    'pid': start.pid,
    'from': start.first_step,
    'to': start.last_step,
    'redone': history.redone(index),
    'ended': stopped.get('time'),
    'last_sign': f'{start.last_time:%Y-%m-%d %H:%M:%S}',
    'reason': stopped.get('reason'),
    'errors': start.errors,
    'config': facts.get('config'),
    'devices': facts.get('devices'),
    'mesh': facts.get('mesh'),
    'processes': facts.get('processes'),
    'git': facts.get('git'),
    'changes': _changes(model_dir, before, facts) if before and facts else [],
    'events': [{'time': record['time'], 'text': record['text']} for record in start.unusual],
  }


def _changes(model_dir: str, before: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """Returns a line for each difference between a start and the previous one."""
  changes = []
  for what, shown in (
    ('devices', devices_in_words),
    ('processes', str),
    ('mesh', mesh_in_words),
    ('git', revision_in_words),
  ):
    if before.get(what) != now.get(what):
      changes.append(f'{what}: {shown(before.get(what))} → {shown(now.get(what))}')
  changes += _gin_changes(model_dir, before.get('config'), now.get('config'))
  for group in ('versions', 'environment'):
    old, new = before.get(group) or {}, now.get(group) or {}
    changes += [
      f'{name} {old.get(name, "none")} → {new.get(name, "none")}'
      for name in dict.fromkeys([*old, *new])
      if old.get(name) != new.get(name)
    ]
  return changes


def _gin_changes(model_dir: str, before: str | None, now: str | None) -> list[str]:
  """Returns the gin values that differ between two files, or the files' names if one is gone."""
  if before == now:
    return []
  if before is None or now is None:
    return [f'config: {before} → {now}']
  try:
    old, new = (
      gin_values(
        gin_config.with_new_names(storage.read(storage.join(model_dir, name), _LARGEST).decode())
      )
      for name in (before, now)
    )
  except (OSError, TypeError, UnicodeDecodeError):
    return [f'config: {before} → {now}']
  unset = 'not set'
  return [
    f'{key} {old.get(key, unset)} → {new.get(key, unset)}'
    for key in sorted({*old, *new})
    if old.get(key) != new.get(key)
  ]


def gin_values(text: str) -> dict[str, str]:
  """Returns the values in gin's output: {'train.steps': '4'}, each in one line."""
  values, key = {}, None
  for line in text.splitlines():
    if line[:1] in ('', '#'):
      key = None
    elif not line[0].isspace():
      key, equals, value = line.partition(' = ')
      values[key] = value.rstrip('\\').strip() if equals else 'set'
    elif key is not None:
      values[key] = f'{values[key]} {line.strip()}'.strip()
  return values


def mesh_in_words(mesh: dict[str, int] | None) -> str:
  """Returns the mesh axes with more than one device, such as 'data 4 × tensor 2'."""
  split = [f'{axis} {size}' for axis, size in (mesh or {}).items() if size != 1]
  return ' × '.join(split) or 'one device'


def revision_in_words(git: dict[str, Any] | None) -> str:
  """Returns a commit's abbreviated hash, with a note of uncommitted changes."""
  if not git:
    return 'unknown'
  return git['revision'][:12] + (' with uncommitted changes' if git['uncommitted'] else '')


def devices_in_words(devices: dict[str, Any] | None) -> str:
  return f'{devices["count"]} × {devices["kind"]}' if devices else 'unknown'

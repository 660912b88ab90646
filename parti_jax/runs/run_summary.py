"""What a run's folder says about the run: how far it is, its checkpoints, its story.

Needs no JAX, so that a login node can tell about a run at once; only to verify
checkpoints of before there were manifests takes JAX.
"""

from __future__ import annotations

import datetime
import re
from typing import Any

from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.runs import history as story_lib
from parti_jax.runs import run_lock

# The most bytes of a small JSON file of a checkpoint.
_LARGEST = 1 << 24
_STEP = re.compile(r'\d+')
_DAMAGED = re.compile(r'(\d+)\.damaged.*')


def summarize(model_dir: str, verify: bool = False) -> dict[str, Any]:
  """What is known about a run; all of it JSON, None for what is unknown.

  Args:
    model_dir: the run's folder, a path or a URL.
    verify: whether the checkpoints' files are read, and not only their sizes compared.

  Returns:
    kind: 'run'.
    folder: `model_dir`.
    objective, model, parameters: the objective's name, its model's sizes, how many parameters it has.
    state: 'finished', 'stopped' (told to, or interrupted), 'failed', 'killed', 'running', 'running
      or killed' where only the host it was on can tell, or 'never started'.
    step, steps: how far the run is known to be, and where it ends.
    steps_per_second, seconds_left: over the last hour of the last start.
    loss: {'value', 'step', 'time'}, the one in the journal last.
    devices, mesh, processes: of the last start.
    checkpoints: see `checkpoints`.
    starts: a dict each: time, host, pid, from, to, redone, ended (None: killed, or still
      running), last_sign, when the journal was written last, reason, errors, config, devices, mesh,
      processes, git, changes (a line each on what is other than at the start before), events (text
      and time of what was unusual).
    skipped_examples: {reason: count}, of all processes, since the run began.
    versions, git, command: of the last start.
    unreadable: lines of the journal that can't be read.

  Raises:
    UserError: the folder's store can't be reached.
  """
  story = story_lib.read(model_dir)
  found = checkpoints(model_dir, verify)
  model = _model(model_dir, found)
  begun = [start for start in story.starts if start.begun]
  facts = begun[-1].begun if begun else {}
  saved = max((checkpoint['step'] for checkpoint in found if not checkpoint['fault']), default=None)
  step = begun[-1].last_step if begun else saved
  rate, steps = begun[-1].rate if begun else None, facts.get('steps')
  state, left = _state(story, model_dir), None
  if rate and steps is not None and step is not None and 'running' in state:
    left = max(steps - step, 0) / rate
  return {
    'kind': 'run',
    'folder': str(model_dir),
    'stage': facts.get('stage', model.get('stage')),
    'model': model.get('config'),
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
    'starts': [_start(model_dir, story, index) for index in range(len(story.starts))],
    'skipped_examples': story.skipped_examples,
    'versions': facts.get('versions'),
    'git': facts.get('git'),
    'command': facts.get('command'),
    'unreadable': story.unreadable,
  }


def checkpoints(model_dir: str, verify: bool = False) -> list[dict[str, Any]]:
  """The checkpoints of a run, the oldest first.

  Args:
    model_dir: the run's folder.
    verify: whether their files are read, and not only their sizes compared.

  Returns:
    A dict each: step; name of its folder; bytes; time when it was written, UTC, or None; checked,
    how it was looked at: 'sizes', 'digests', 'reading' or None for not at all; fault, what is
    wrong with it, or None.
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
  """How a checkpoint was looked at, and what is wrong with it."""
  from parti_jax.checkpoints import manifest

  try:
    fault = manifest.fault(storage.as_epath(path), sizes_alone=not verify)
    return 'digests' if verify else 'sizes', fault
  except FileNotFoundError:  # Of before there were manifests.
    if not verify:
      return None, None
  # Only JAX and Orbax can tell.
  from parti_jax.checkpoints import verification

  return 'reading', verification.fault(storage.as_epath(path).absolute())


def _written(path: str, sizes: dict[str, int]) -> str | None:
  """When Orbax committed a checkpoint."""
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
  """Objective and sizes, as the newest readable checkpoint has them (see `checkpoints.describe`)."""
  for checkpoint in reversed(found):
    path = storage.join(model_dir, 'checkpoints', checkpoint['name'], 'model', 'metadata')
    try:
      model = storage.read_json(path, _LARGEST)
      return {'stage': model['stage'], 'config': model['config']}
    except (OSError, ValueError, LookupError, TypeError, errors.UserError):
      continue
  return {}


def _state(story: story_lib.Story, model_dir: str) -> str:
  if not any(start.begun for start in story.starts):
    return 'failed' if story.starts else 'never started'
  stopped = story.starts[-1].stopped
  if stopped is None:
    return {True: 'running', False: 'killed', None: 'running or killed'}[run_lock.lives(model_dir)]
  return {'finished': 'finished', 'error': 'failed'}.get(stopped.get('reason'), 'stopped')


def _loss(begun: list[story_lib.Start]) -> dict[str, Any] | None:
  progress = next(
    (start.newest_progress for start in reversed(begun) if start.newest_progress), None
  )
  if not progress or 'loss' not in progress:
    return None
  return {'value': progress['loss'], 'step': progress['step'], 'time': progress['time']}


def _start(model_dir: str, story: story_lib.Story, index: int) -> dict[str, Any]:
  start = story.starts[index]
  facts, stopped = start.begun or {}, start.stopped or {}
  before = next((other.begun for other in reversed(story.starts[:index]) if other.begun), None)
  return {
    'time': f'{start.time:%Y-%m-%d %H:%M:%S}',
    'host': facts.get('host', start.host),
    'pid': start.pid,
    'from': start.first_step,
    'to': start.last_step,
    'redone': story.redone(index),
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
  """What is other at a start than at the one before it, a line each."""
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
  """The gin values that differ between two files of a run's folder, or the files if one is gone."""
  if before == now:
    return []
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
  """The values of a file that gin wrote: {'train.steps': '4'}, each in one line."""
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
  """The axes of a mesh that split something, such as 'data 4 × tensor 2'."""
  split = [f'{axis} {size}' for axis, size in (mesh or {}).items() if size != 1]
  return ' × '.join(split) or 'one device'


def revision_in_words(git: dict[str, Any] | None) -> str:
  """A commit in short."""
  if not git:
    return 'unknown'
  return git['revision'][:12] + (' with uncommitted changes' if git['uncommitted'] else '')


def devices_in_words(devices: dict[str, Any] | None) -> str:
  return f'{devices["count"]} × {devices["kind"]}' if devices else 'unknown'

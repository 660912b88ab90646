"""Formats the text that `parti-jax info` prints."""

from __future__ import annotations

import datetime
import textwrap
from typing import Any

from parti_jax.core import image_sizes
from parti_jax.runs import run_summary

_WIDTH = 100
# Maximum events to show for each start; the last ones are shown.
SHOWN = 20
# Name of a network that is alone in its folder -> what the folder is.
_ALONE = {
  'tokenizer': 'an image tokenizer',
  'text_encoder': 'a text encoder',
  'super_resolution': 'a super-resolution network',
}
_STATES = {
  'finished': 'finished',
  'stopped': 'stopped; start again to resume',
  'failed': 'ended by an error; see the last start below',
  'killed': 'killed; start again to resume',
  'running': 'running',
  'running or killed': 'running, or killed: run this command on its host to find out',
  'never started': 'no journal: never started, or started by an older version',
}


def run(found: dict[str, Any]) -> list[str]:
  """Returns lines about a run from the result of `run_summary.summarize`."""
  kind = f' ({found["objective"]})' if found['objective'] else ''
  lines = [f'{found["folder"]}: a run of the objective {found["stage"] or "(unknown)"}{kind}', '']
  lines += _facts(
    {
      'state': _state(found),
      'progress': _progress(found),
      'loss': _loss(found['loss']),
      'parameters': _count(found['parameters']),
      'adapters': _adapters(found['lora']),
      'model': _sizes(found['model'] or {}),
      'devices': _devices(found),
      'versions': _versions(found['versions'] or {}),
      'git': run_summary.revision_in_words(found['git']) if found['git'] else None,
      'command': found['command'],
    }
  )
  lines += _section('checkpoints', _checkpoints(found['checkpoints']))
  lines += _section('starts, times in UTC', _starts(found['starts'], found['state']))
  lines += _section('what happened', _events(found['starts']))
  lines += _section(
    'examples skipped',
    [f'{count:>8,} {reason}' for reason, count in sorted(found['skipped_examples'].items())],
  )
  if found['unreadable']:
    lines += ['', f'{found["unreadable"]} lines of the journal are cut short or damaged']
  return lines


def _adapters(lora: dict[str, Any] | None) -> str | None:
  """Returns a text about the adapters that a run trains; None without."""
  if lora is None:
    return None
  values = [f'{name} {lora.get(name)}' for name in ('rank', 'alpha')]
  targets = ', '.join(map(str, lora.get('targets') or ()))
  return f'{", ".join(values)}, of {targets}; base {lora.get("base")}'


def _sides(size: image_sizes.ImageSize) -> str:
  """Returns height and width of pictures as a text."""
  return '{}×{}'.format(*image_sizes.sides(size))


def model(found: dict[str, Any]) -> list[str]:
  """Returns lines about an exported model from the result of `info.describe`."""
  size, upscaled = found['picture_size'], found['upscaled_size']
  picture = f'{_sides(size)} pixels' if size else None
  if found['image_tokens']:
    picture = f'{picture} of {found["image_tokens"]} image tokens'
  if upscaled:
    picture = f'{picture}, {_sides(upscaled)} with --upscale'
  total = sum(part['parameters'] for part in found['parts'].values())
  plain = lambda values: ', '.join(f'{name} {value}' for name, value in values.items())
  vocabulary = found['vocabulary']
  alone = found['alone']
  what = _ALONE.get(alone, f'a {alone}') if alone else 'an exported model'
  lines = [f'{found["folder"]}: {what}', '']
  lines += _facts(
    {
      'pictures': picture,
      'parameters': f'{total:,}, stored as {found["stored_as"]}',
      'vocabulary': vocabulary and _vocabulary(vocabulary),
      'sampling': plain(found['sampling']),
      'provenance': plain(found['provenance']),
      'missing': ', '.join(found['missing'])
      and f'{", ".join(found["missing"])}: unfinished or '
      'damaged; export or download the model again',
    }
  )
  for name, part in found['parts'].items():
    lines += _section(
      f'{name}: {part["parameters"]:,} parameters, {_bytes(part["bytes"])}',
      textwrap.wrap(_sizes(part['sizes']), _WIDTH),
    )
  return lines


def _vocabulary(found: dict[str, Any]) -> str:
  ids = '' if found['ids'] is None else f'{found["ids"]:,} ids, '
  return ids + _bytes(found['bytes'])


def _state(found: dict[str, Any]) -> str:
  return _STATES.get(found['state'], found['state'])


def _progress(found: dict[str, Any]) -> str | None:
  if found['step'] is None:
    return None
  text = f'step {found["step"]:,}'
  if found['steps']:
    text += f' of {found["steps"]:,} ({100 * found["step"] / found["steps"]:.1f}%)'
  if found['steps_per_second']:
    text += f', {found["steps_per_second"]:.3g} steps/s'
  if found['seconds_left'] is not None:
    text += f', {_duration(found["seconds_left"])} to the end at this rate'
  return text


def _loss(loss: dict[str, Any] | None) -> str | None:
  if loss is None:
    return None
  value = f'{loss["value"]:.4g}' if isinstance(loss['value'], (int, float)) else loss['value']
  return f'{value} at step {loss["step"]:,}, {loss["time"]} UTC'


def _devices(found: dict[str, Any]) -> str | None:
  if not found['devices']:
    return None
  among = f' of {found["processes"]} processes' if (found['processes'] or 1) > 1 else ''
  return (
    f'{run_summary.devices_in_words(found["devices"])}{among}, mesh '
    f'{run_summary.mesh_in_words(found["mesh"])}'
  )


def _versions(versions: dict[str, str]) -> str:
  return ', '.join(f'{package} {version}' for package, version in versions.items())


def _checkpoints(checkpoints: list[dict[str, Any]]) -> list[str]:
  checked = {
    'sizes': 'whole by its sizes',
    'digests': 'whole, every byte read',
    'reading': 'whole, every array read',
    None: 'not checked',
  }
  rows = [
    [
      f'{found["step"]:,}',
      found['time'] or '?',
      _bytes(found['bytes']),
      f'damaged: {found["fault"]}' if found['fault'] else checked[found['checked']],
    ]
    for found in checkpoints
  ]
  return _table(['step', 'written', 'size', ''], rows, right=(0, 2))


def _starts(starts: list[dict[str, Any]], state: str) -> list[str]:
  rows = []
  for index, start in enumerate(starts):
    unstopped = state if index == len(starts) - 1 else 'killed'
    number = lambda value: '' if value is None else f'{value:,}'
    rows.append(
      [
        start['time'],
        f'{start["host"]}, {start["pid"]}',
        number(start['from']),
        number(start['to']),
        number(start['redone'] or None),
        start['ended'] or start['last_sign'],
        _end(start, unstopped),
      ]
    )
  return _table(
    ['start', 'host, process', 'from', 'to', 'redone', 'last sign', 'end'], rows, right=(2, 3, 4)
  )


def _end(start: dict[str, Any], unstopped: str) -> str:
  if start['errors']:
    return textwrap.shorten(start['errors'][0], 80, placeholder=' ...')
  return start['reason'] or unstopped


def _events(starts: list[dict[str, Any]]) -> list[str]:
  lines = []
  for start in starts:
    lines += [f'{start["time"]}  new at this start: {change}' for change in start['changes']]
    lines += [f'{event["time"]}  {event["text"]}' for event in start['events'][-SHOWN:]]
    if len(start['events']) > SHOWN:
      lines.append(
        f'{start["time"]}  and {len(start["events"]) - SHOWN} more before these in the journal'
      )
  return [
    part for line in lines for part in textwrap.wrap(line, _WIDTH, subsequent_indent=' ' * 21)
  ]


def _sizes(sizes: dict[str, Any]) -> str:
  return ', '.join(f'{name} {value}' for name, value in sizes.items())


def _facts(facts: dict[str, str | None]) -> list[str]:
  """Returns lines 'name   value', with long values wrapped and unknown ones left out."""
  lines = []
  for name, value in facts.items():
    if value:
      indent = ' ' * 12
      lines += textwrap.wrap(value, _WIDTH, initial_indent=f'{name:12}', subsequent_indent=indent)
  return lines


def _section(title: str, lines: list[str]) -> list[str]:
  return ['', title, *(f'  {line}' for line in lines)] if lines else []


def _table(head: list[str], rows: list[list[str]], right: tuple[int, ...]) -> list[str]:
  if not rows:
    return []
  widths = [max(map(len, column)) for column in zip(head, *rows)]
  return [
    '  '.join(
      cell.rjust(width) if index in right else cell.ljust(width)
      for index, (cell, width) in enumerate(zip(row, widths))
    ).rstrip()
    for row in [head, *rows]
  ]


def _count(count: int | None) -> str | None:
  return None if count is None else f'{count:,}'


def _bytes(count: int | None) -> str:
  if count is None:
    return 'missing'
  size = float(count)
  for unit in ('B', 'kB', 'MB', 'GB'):
    if size < 1000:
      return f'{size:.3g} {unit}'
    size /= 1000
  return f'{size:,.1f} TB'


def _duration(seconds: float) -> str:
  time = datetime.timedelta(seconds=round(seconds))
  days, rest = time.days, time.seconds
  hours, minutes = divmod(rest // 60, 60)
  if days:
    return f'{days} d {hours} h'
  return f'{hours} h {minutes} min' if hours else f'{minutes} min {rest % 60} s'

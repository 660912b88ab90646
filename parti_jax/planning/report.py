"""Formats plans as text: a report of one, a table of many."""

from __future__ import annotations

from typing import Any

from parti_jax.core import texts
from parti_jax.partitioning import compiler_options

_GIB = 2**30


def text(plan: dict[str, Any], traffic: int = 0) -> str:
  """Returns the report of a plan that `plan.make` returned.

  Args:
    plan: the plan.
    traffic: number of lines about the largest shares of the traffic with the main memory.
  """
  sections = [
    _head(plan),
    _memory(plan),
    _flops(plan),
    _bytes(plan),
    _traffic(plan, traffic),
    _collectives(plan),
    _times(plan),
    _constants(plan),
    _notes(plan),
    _verdict(plan),
  ]
  return '\n\n'.join(filter(None, sections))


def table(plans: list[dict[str, Any]]) -> str:
  """Returns plans as a Markdown table with a row for each."""
  head = (
    'step',
    'chips',
    'mesh',
    'batch',
    'remat, microbatches',
    'GiB of HBM',
    'FLOPs over model',
    'compute, HBM, network: s',
    'MFU bound',
    'compile',
  )
  lines = [head, ('---',) * len(head)] + [_row(plan) for plan in plans]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines)


def name_of(plan: dict[str, Any]) -> str:
  """Returns the run's name, such as '20b': the stem of its gin file without 'parti_'."""
  last = plan['gin_files'][-1] if plan['gin_files'] else plan['settings']['model']
  return last.rsplit('/', maxsplit=1)[-1].removesuffix('.gin').removeprefix('parti_')


def mesh_of(plan: dict[str, Any]) -> str:
  """Returns the mesh axes with more than one device, such as 'data 4 × tensor 8'."""
  sizes = [f'{axis} {size}' for axis, size in plan['mesh'].items() if size > 1]
  return ' × '.join(sizes) or 'one device'


def _row(plan) -> tuple[str, ...]:
  memory, seconds, settings = plan['memory'], plan['seconds'], plan['settings']
  needed = memory['total'] if memory else plan['exhausted']['needed']
  used = 'too much' if needed is None else f'{needed / _GIB:.1f}'
  if plan['chip']:
    used += f' of {_capacity(plan) / _GIB:.1f}'
  if plan['what'] == 'train':
    kept = f'{settings["remat"]}, {settings["microbatches"]}'
  else:
    # Older plans don't name the weights and the cache.
    int8 = [name for name in ('weights', 'cache') if settings.get(name) == 'int8']
    kept = f'cache of {settings["cache_length"]}'
    kept += f', int8 {" and ".join(int8)}' if int8 else ''
  times = '–'
  if seconds:
    times = ', '.join(f'{seconds[part]:.3g}' for part in ('compute', 'hbm', 'interconnect'))
  return (
    f'{plan["what"]} {name_of(plan)}',
    plan['topology'],
    mesh_of(plan),
    f'{plan["batch_size"]:,}',
    kept,
    used if plan['fits'] else f'{used}: too large',
    f'{plan["flops"]["ratio"]:.2f}' if plan['flops'] else '–',
    times,
    f'{plan["mfu"]["bound"]:.0%}' if plan['mfu'] else '–',
    f'{plan["compile_seconds"]:.0f} s, {plan["compile_peak_bytes"] / _GIB:.1f} GiB',
  )


def _capacity(plan) -> float:
  return plan['chip']['hbm_usable'] / plan['chip']['devices']


def _head(plan) -> str:
  settings = ', '.join(
    f'{name} {value}'
    for name, value in plan['settings'].items()
    if name not in ('model', 'config', 'compiler_options')
  )
  options = plan['settings'].get('compiler_options')
  unit = 'examples' if plan['what'] == 'train' else 'images'
  return '\n'.join(
    [
      f'{plan["what"]}: {name_of(plan)}, {texts.short_count(plan["parameters"])} parameters, on '
      f'{plan["topology"]}: {texts.counted(plan["chips"], "chip")}, '
      f'{texts.counted(plan["devices"], "device")}',
      f'  mesh        {mesh_of(plan)}',
      f'  batch       {plan["batch_size"]:,} {unit}',
      f'  settings    {settings}',
      *([] if options is None else [f'  XLA options {compiler_options.text(options)}']),
      f'  compiled    in {plan["compile_seconds"]:.0f} s, {plan["compile_cpu_seconds"]:.0f} s of '
      f'processor time, with at most {plan["compile_peak_bytes"] / _GIB:.1f} GiB of memory',
    ]
  )


def _memory(plan) -> str:
  if not plan['memory']:
    return ''
  memory = dict(plan['memory'])
  total, capacity, host = (memory.pop(name) for name in ('total', 'capacity', 'host'))
  lines = ['bytes per device']
  for name, value in memory.items():
    if value or name != 'resident':
      lines.append(f'  {name.replace("_", " "):22}{_size(value)}')
  of = f' of {_size(capacity).strip()} of HBM, {total / capacity:.0%}' if capacity else ''
  lines.append(f'  {"total":22}{_size(total)}{of}')
  if host:
    lines.append(f'  {"in the host":22}{_size(host)}')
  return '\n'.join(lines)


def _flops(plan) -> str:
  flops = plan['flops']
  if not flops:
    return ''
  kernels = f', {flops["kernels"] / 1e12:.4g} T of them in kernels' if flops['kernels'] else ''
  return '\n'.join(
    [
      'FLOPs per device and step',
      f'  model                 {flops["model"] / 1e12:10.4g} T',
      f'  compiled              {flops["compiled"] / 1e12:10.4g} T, {flops["ratio"]:.3f} times the '
      f"model's{kernels}",
    ]
  )


def _bytes(plan) -> str:
  counted = plan['bytes']
  if not counted:
    return ''
  lines = [
    'bytes moved per device and step',
    f'  main memory           {counted["hbm"] / 1e9:10.4g} GB',
  ]
  if counted['host']:
    lines.append(f'  to and from the host  {counted["host"] / 1e9:10.4g} GB')
  if 'ideal' in counted:
    parts = ', '.join(f'{name} {value / 1e9:.4g}' for name, value in counted['ideal'].items())
    lines.append(
      f'  at least needed       {sum(counted["ideal"].values()) / 1e9:10.4g} GB '
      f'({parts}): {counted["ratio"]:.3f} times as much is moved'
    )
  return '\n'.join(lines)


def _traffic(plan, limit: int) -> str:
  if not limit or not plan['traffic']:
    return ''
  lines = [f'{"GB":>10}{"share":>8}  {"pass":12}largest shares of the traffic with the main memory']
  for entry in plan['traffic'][:limit]:
    size = f'{entry["bytes"] / 1e9:10.4g}{entry["share"]:8.1%}'
    lines.append(f'{size}  {entry["part"]:12}{entry["scope"]}')
  return '\n'.join(lines)


def _collectives(plan) -> str:
  if not plan['collectives']:
    return ''
  lines = [
    f'{"collectives per step":22}{"mesh axes":22}{"count":>8}{"GB sent per device":>20}{"s":>10}'
  ]
  for entry in plan['collectives']:
    axes = ', '.join(entry['axes']) + (' (between slices)' if entry['dcn'] else '')
    seconds = '–' if entry['seconds'] is None else f'{entry["seconds"]:.4f}'
    lines.append(
      f'  {entry["kind"]:20}{axes:22}{entry["count"]:8.0f}'
      f'{entry["bytes_sent"] / 1e9:20.4f}{seconds:>10}'
    )
  if least := plan.get('least_sent'):  # Older plans don't have it.
    total = sum(least.values())
    parts = ', '.join(f'{name} {value / 1e9:.4g}' for name, value in least.items())
    sent = sum(entry['bytes_sent'] for entry in plan['collectives'])
    times = f': {sent / total:.3f} times as much is sent' if total else ''
    lines.append(f'  {"at least needed":50}{total / 1e9:20.4f}  ({parts}){times}')
  return '\n'.join(lines)


def _times(plan) -> str:
  seconds = plan['seconds']
  if not seconds:
    return ''
  lines = ['minimum seconds of a step']
  for name in ('compute', 'hbm', 'interconnect'):
    bound = '  <- the bound' if seconds['bound'] == name else ''
    lines.append(f'  {name:22}{seconds[name]:10.4f}{bound}')
  longest = max(seconds[name] for name in ('compute', 'hbm', 'interconnect'))
  lines += [
    f'  {"if all overlap":22}{longest:10.4f}  MFU at most {plan["mfu"]["bound"]:.1%}',
    f'  {"if none overlap":22}{seconds["sum"]:10.4f}  MFU {plan["mfu"]["without_overlap"]:.1%}',
  ]
  if plan['what'] == 'sample':
    lines.append(f'  {"tokens/s at most":22}{plan["batch_size"] / longest:10.0f}')
  return '\n'.join(lines)


def _constants(plan) -> str:
  chip = plan['chip']
  if not chip:
    return 'no roofline: an emulated device has no published constants'
  return '\n'.join(
    [
      f'constants of a {chip["kind"]} chip ({chip["source"]})',
      f'  {chip["peak_flops"] / 1e12:g} TFLOP/s in bfloat16, {chip["hbm_bytes"] / _GIB:g} GiB of '
      f'HBM at {chip["hbm_bandwidth"] / 1e9:g} GB/s',
      f'  {2 * chip["torus_dimensions"]} links of {chip["link_bandwidth"] / 1e9:g} GB/s one way; '
      f'data-center network {chip["dcn_bandwidth"] / 1e9:g} GB/s a chip',
      f'  {plan["network_model"]}',
    ]
  )


def _notes(plan) -> str:
  return '\n'.join(['notes', *(f'  {note}' for note in plan['notes'])]) if plan['notes'] else ''


def _verdict(plan) -> str:
  if plan['fits']:
    return 'it fits' if plan['memory']['capacity'] else ''
  if plan['exhausted']:
    needed, available = plan['exhausted']['needed'], plan['exhausted']['available']
    what = f'XLA says: {plan["exhausted"]["message"]}'
  else:
    needed, available = plan['memory']['total'], plan['memory']['capacity']
    what = f'{_size(needed).strip()} of {_size(available).strip()}'
  by = '' if needed is None else f' by {_size(needed - available).strip()} a device'
  return '\n'.join(
    [
      f'it does not fit{by}: {what}',
      'what would help:',
      *(f'  {line}' for line in plan['remedies']),
    ]
  )


def _size(value: float) -> str:
  for unit, size in (('GiB', _GIB), ('MiB', 1 << 20)):
    if abs(value) >= 0.1 * size:
      return f'{value / size:10.2f} {unit}'
  return f'{value / 1024:10.2f} KiB'

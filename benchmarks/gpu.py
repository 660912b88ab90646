"""Training and sampling on one GPU, against PyTorch with a network of the same sizes.

  python benchmarks/gpu.py --output gpu.json [--sections training sampling]

Prints a Markdown table. Every measurement runs in a process of its own, which has the GPU for
itself. Finished sections are read from the output file and not measured again. Ratios are between
measurements of one section, and so of one run. PyTorch is left out where it isn't installed.
"""

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_measurements

MOST_SECONDS = 280  # For one measurement.


def run_here(settings: gpu_measurements.Settings, section: str, name: str) -> dict:
  """Runs a measurement in this process."""
  function, arguments = gpu_measurements.sections(settings)[section][0][name]
  return function(settings, **arguments)


def run_in_a_process(
  settings: gpu_measurements.Settings, section: str, name: str, seconds: float
) -> dict:
  """Runs a measurement in a process of its own; returns {'error': ...} if it fails."""
  command = [sys.executable, os.path.abspath(__file__), '--measure', section, name]
  command += ['--repeats', str(settings.repeats)]
  command += ['--small'] if settings.small else []
  command += ['--model', settings.model] if settings.model else []
  # Without another process on the GPU, most of its memory may be used.
  environment = {'XLA_PYTHON_CLIENT_MEM_FRACTION': '0.92'} | os.environ
  if platforms := os.environ.get('JAX_PLATFORMS'):
    environment['JAX_PLATFORMS'] = ','.join(dict.fromkeys([*platforms.split(','), 'cpu']))
  try:
    done = subprocess.run(
      command, env=environment, stdout=subprocess.PIPE, text=True, timeout=seconds, check=False
    )
  except subprocess.TimeoutExpired:
    return {'error': f'took more than {seconds:.0f} seconds'}
  if done.returncode:
    return {'error': f'ended with status {done.returncode}; its message is above'}
  return json.loads(done.stdout.splitlines()[-1])


def run_section(settings: gpu_measurements.Settings, section: str, run=run_here) -> dict:
  """Runs all measurements of a section; `run` takes settings, section and name."""
  measurements, sum_up = gpu_measurements.sections(settings)[section]
  begin, found = time.perf_counter(), {}
  for name in measurements:
    found[name] = run(settings, section, name)
    print(f'{section}: {name}: {short(found[name])}', file=sys.stderr, flush=True)
  return sum_up(settings, found) | {
    'took_seconds': time.perf_counter() - begin,
    'finished': not any('error' in value for value in found.values()),
  }


def short(value: dict) -> str:
  """What a measurement found, in a few words."""
  for name in ('skipped', 'error'):
    if name in value:
      return value[name]
  if 'equal' in value:
    sign = '≤' if value['equal'] else '> (DIFFERENT)'
    return f'largest difference {value["difference"]:.1e} {sign} {value["tolerance"]:.0e}'
  if 'on' in value:
    off, on = (value[name]['seconds'] for name in ('off', 'on'))
    return f'{off:.3f} s without, {on:.3f} s with'
  parts = [f'batch {value["batch_size"]}', f'{value["seconds"]:.4f} s']
  for name, unit in (('tokens_per_second', 'tokens/s'), ('pictures_per_second', 'pictures/s')):
    parts += [f'{value[name]:,.1f} {unit}'] if name in value else []
  parts += [f'MFU {value["mfu"]:.3f}'] if 'mfu' in value else []
  return ', '.join(parts)


def table(results: dict) -> str:
  """The results as a table in Markdown."""
  rows = ['| section | measurement | found |', '|---|---|---|']
  for section, result in results['sections'].items():
    for name, value in result['measurements'].items():
      rows.append(f'| {section} | {name} | {short(value)} |')
      if 'ratio' in value:
        rows.append(f'| {section} | {name}: time without over time with | {value["ratio"]:.2f} |')
    for name, ratio in result.get('ratios', {}).items():
      rows.append(f'| {section} | parti_jax over PyTorch, {name} | {ratio:.2f} |')
  return '\n'.join(rows)


def read(path: pathlib.Path | None, settings: gpu_measurements.Settings) -> dict:
  """Returns the results in a file, which must be of the same settings; empty without a file."""
  empty = {'settings': dataclasses.asdict(settings), 'sections': {}}
  if path is None or not path.exists():
    return empty
  found = json.loads(path.read_text(encoding='utf-8'))
  if found['settings'] != empty['settings']:
    sys.exit(f'{path} has results of other settings, {found["settings"]}; choose another --output')
  return found


def main(arguments=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  names = list(gpu_measurements.sections(gpu_measurements.Settings()))
  parser.add_argument('--sections', nargs='+', choices=names, default=names)
  parser.add_argument('--output', type=pathlib.Path, metavar='FILE', help='results as JSON')
  parser.add_argument('--small', action='store_true', help='tiny sizes, for a test on a CPU')
  parser.add_argument('--model', help='model folder for options and demo (default: the demo model)')
  parser.add_argument('--repeats', type=int, default=5, help='timings of each step')
  parser.add_argument('--minutes', type=float, default=12, help='begin nothing after that')
  parser.add_argument('--measure', nargs=2, help=argparse.SUPPRESS)
  args = parser.parse_args(arguments)
  settings = gpu_measurements.Settings(args.model, args.small, args.repeats)
  if args.measure == ['about', 'device']:
    print(json.dumps(gpu_measurements.describe()))
    return
  if args.measure:
    print(json.dumps(run_here(settings, *args.measure)))
    return
  results, end = read(args.output, settings), time.monotonic() + 60 * args.minutes

  def run(settings, section, name):
    left = end - time.monotonic()
    if left < 10:
      return {'error': f'not begun: the {args.minutes:g} minutes are over'}
    return run_in_a_process(settings, section, name, min(left, MOST_SECONDS))

  about = run(settings, 'about', 'device')
  for section in args.sections:
    if results['sections'].get(section, {}).get('finished'):
      continue
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
    results['sections'][section] = run_section(settings, section, run)
    results['sections'][section] |= {'about': about, 'date': now}
    if args.output:
      args.output.write_text(json.dumps(results, indent=2) + '\n', encoding='utf-8')
  print(table(results))
  if not all(results['sections'][section]['finished'] for section in args.sections):
    sys.exit('some measurements failed; the same command repeats their sections')


if __name__ == '__main__':
  main()

"""Time of `parti-jax generate` from its start to its end, for four pictures of the demo model.

  python benchmarks/startup.py [--against FOLDER] [--rounds N] [--json FILE]

The first call finds an empty cache of compiled programs, and later ones find all of them there. With
--against, another version of parti_jax, whose package is in FOLDER, is measured in turn. Of each, the
fastest round counts: in wall time, and in the processor time of the process, which other programs
affect less. An unmeasured call before writes Python's bytecode. Both versions must write the same
files, or the benchmark fails.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

PROMPT = 'waving hand: dark skin tone'


def call(version: pathlib.Path, cache: str, output: str) -> tuple[float, float]:
  """Returns the wall time and the processor time of a call, in seconds."""
  settings = {'PYTHONPATH': str(version), 'PARTI_JAX_CACHE': cache, 'JAX_PLATFORMS': 'cpu'}
  environment = {
    name: value
    for name, value in os.environ.items()
    if name not in ('PYTHONDONTWRITEBYTECODE', 'JAX_COMPILATION_CACHE_DIR')
  }
  command = [sys.executable, '-m', 'parti_jax.cli.main', 'generate', PROMPT]
  before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
  subprocess.run(
    [*command, f'--output_dir={output}'],
    cwd=version,
    env=environment | settings,
    check=True,
    capture_output=True,
  )
  wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
  return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--against', metavar='FOLDER', help='the folder of another parti_jax package')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json', metavar='FILE')
  args = parser.parse_args()
  versions = {'this version': pathlib.Path(__file__).resolve().parents[1]}
  if args.against:
    versions['the other'] = pathlib.Path(args.against).resolve()
  times: dict[str, dict[str, list]] = {name: {'first': [], 'later': []} for name in versions}
  files: dict[str, bytes] = {}
  for number in range(args.rounds + 1):
    for name, folder in versions.items():
      with tempfile.TemporaryDirectory() as work:
        for kind in ('first', 'later'):
          pictures = pathlib.Path(work, 'pictures')
          measured = call(folder, os.path.join(work, 'cache'), str(pictures))
          written = {path.name: path.read_bytes() for path in pictures.iterdir()}
          files = files or written
          if written != files:
            sys.exit(f'{name} writes other files in its {kind} call')
          if number:
            times[name][kind].append(measured)
  fastest = {
    name: {kind: [min(column) for column in zip(*rounds)] for kind, rounds in kinds.items()}
    for name, kinds in times.items()
  }
  for name, kinds in fastest.items():
    for kind, (wall, processor) in kinds.items():
      print(f'{name}, {kind} call: {wall:.2f} s, {processor:.2f} s of processor time')
  if args.against:
    for kind, (wall, processor) in fastest['this version'].items():
      other = fastest['the other'][kind]
      print(
        f'{kind} call: {wall / other[0]:.2f} of the other, {processor / other[1]:.2f} in '
        'processor time'
      )
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps({'rounds': times, 'fastest': fastest}, indent=2))


if __name__ == '__main__':
  main()

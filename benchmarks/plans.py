"""Plans of the paper's models on TPU pods and slices, and of public ones.

Each is one JSON file in benchmarks/plans/.

    python benchmarks/plans.py            makes those that are missing, one after another
    python benchmarks/plans.py --list     names them, with the command of each
    python benchmarks/plans.py 20b_v5p    makes those whose names contain the words given, again

A plan takes minutes and up to 16 GiB of memory, and needs no TPU (pip install "parti_jax[tpu]").
The table of all: parti-jax plan --table benchmarks/plans/*.json
"""

import argparse
import pathlib
import shlex
import subprocess
import sys
import time

FOLDER = pathlib.Path(__file__).parent / 'plans'
SIZES = ('350m', '750m', '3b', '20b')
PODS = ('v4:8x8x8', 'v5p:8x8x8', 'v6e:16x16')

# Recomputes less where compute is the bound and memory has room for it.
DOTS = ["--gin.PartiConfig.remat='dots'"]
WHOLE = ['--gin.train.microbatches=1']
# What a plan needs besides its run's gin file.
CHANGES: dict[str, list[str]] = {
  **{f'{size}_{chip}': DOTS + WHOLE for size in ('350m', '750m') for chip in ('v4', 'v5p')},
  **{f'{size}_v6e': WHOLE for size in ('350m', '750m')},
  '3b_v4': DOTS,
  '3b_v5p': DOTS + WHOLE,
  '20b_v5p': DOTS,
}
# Small slices, with 32 examples on each device, or 16 where the memory is small.
SLICES = {
  '350m_v6e_16': ('350m', 'v6e:4x4', 512, WHOLE),
  '750m_v6e_16': ('750m', 'v6e:4x4', 512, WHOLE),
  '350m_v5e_16': ('350m', 'v5e:4x4', 256, DOTS + WHOLE),
  '350m_v4_16': ('350m', 'v4:2x2x4', 512, DOTS + WHOLE),
  '3b_v5e_64': ('3b', 'v5e:8x8', 2048, WHOLE),
}


def plans() -> dict[str, list[str]]:
  """Name -> arguments of `parti-jax plan`."""
  wanted = [(f'{size}_{pod.split(":")[0]}', size, pod) for size in SIZES for pod in PODS]
  wanted.append(('3b_v5e', '3b', 'v5e:16x16'))
  found = {
    name: ['--what=train', f'--topology={pod}', *_run(size), *CHANGES.get(name, [])]
    for name, size, pod in wanted
  }
  for name, (size, topology, batch, changes) in SLICES.items():
    arguments = ['--what=train', f'--topology={topology}', *_run(size), f'--batch_size={batch}']
    found[name] = arguments + changes
  # The paper's own way of splitting: 16 pipeline stages, and data parallelism.
  found['20b_v4_stages'] = [
    *found['20b_v4'],
    '--gin.make_mesh.stage=16',
    '--gin.make_mesh.data=32',
    '--gin.make_mesh.fsdp=1',
    '--gin.pipeline.groups=8',
    *WHOLE,
  ]
  found['20b_v5e_sample'] = [
    '--what=sample',
    '--topology=v5e:4x8',
    *_run('20b'),
    '--batch_size=64',
    '--gin.make_mesh.data=-1',
    '--gin.make_mesh.fsdp=1',
    '--gin.make_mesh.tensor=8',
  ]
  # Sampling of public models, whose networks fit on one chip.
  for size, mesh in (('mini', 'data'), ('mega', 'tensor')):
    sample = ['--what=sample', f'--gin_file=gin_configs/runs/dalle_{size}.gin']
    one = ['--topology=v5e:1x1', '--batch_size=16', '--gin.make_mesh.fsdp=1']
    four = ['--topology=v5e:2x2', '--batch_size=64', '--gin.make_mesh.fsdp=1']
    found[f'dalle_{size}_v5e_sample'] = sample + one
    found[f'dalle_{size}_v5e_4_sample'] = [*sample, *four, f'--gin.make_mesh.{mesh}=4']
  llamagen = ['--what=sample', '--gin_file=gin_configs/runs/llamagen_3b.gin']
  one = ['--topology=v5e:1x1', '--batch_size=16', '--gin.make_mesh.fsdp=1']
  four = ['--topology=v5e:2x2', '--batch_size=32', '--gin.make_mesh.fsdp=1']
  found['llamagen_3b_v5e_sample'] = llamagen + one
  found['llamagen_3b_v5e_4_sample'] = [*llamagen, *four, '--gin.make_mesh.tensor=4']
  found['20b_v5e_sample_int8'] = [*found['20b_v5e_sample'], '--weights=int8']
  found['20b_v5e_sample_int8_cache'] = [*found['20b_v5e_sample_int8'], '--cache=int8']
  return found


def _run(size: str) -> list[str]:
  return [f'--gin_file=gin_configs/runs/parti_{size}.gin']


def main():
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('words', nargs='*')
  parser.add_argument('--list', action='store_true')
  args = parser.parse_args()
  failed = 0
  for name, arguments in plans().items():
    file = FOLDER / f'{name}.json'
    command = [sys.executable, '-m', 'parti_jax.cli.main', 'plan', *arguments, f'--json={file}']
    if args.list:
      print(f'{name}: parti-jax plan {shlex.join(arguments)}')
    elif any(word in name for word in args.words) or (not args.words and not file.exists()):
      start = time.perf_counter()
      done = subprocess.run(command, capture_output=True, text=True, check=False)
      said = {0: 'fits', 1: 'does not fit'}.get(done.returncode, done.stderr.strip()[-300:])
      print(f'{name}: {said}, {time.perf_counter() - start:.0f} s', flush=True)
      failed += done.returncode not in (0, 1)
  return failed


if __name__ == '__main__':
  sys.exit(main())

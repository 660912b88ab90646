"""Fuzzes one target with atheris, led by what the code covers. Not part of the tests.

  pip install atheris
  python tests/fuzz/run_atheris.py picture --seconds=300 --output=runs/fuzz

New inputs go to OUTPUT/TARGET; those that fail are written to the working folder. What is worth
keeping, small and of a behavior of its own, belongs in tests/fuzz/corpus/TARGET, which the tests
try again.
"""

import argparse
import pathlib
import sys
import warnings

import atheris

# Pillow, numpy and tarfile are instrumented as they are imported; TensorFlow would take minutes.
with atheris.instrument_imports(include=['PIL', 'tarfile', 'parti_jax']):
  import fuzz_targets


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('target', choices=fuzz_targets.TARGETS)
  parser.add_argument('--seconds', type=int, default=300)
  parser.add_argument('--output', default='runs/fuzz')
  args = parser.parse_args()
  found = pathlib.Path(args.output) / args.target
  found.mkdir(parents=True, exist_ok=True)
  for index, data in enumerate(fuzz_targets.EXAMPLES[args.target]):
    (found / f'example{index}').write_bytes(data)
  kept = pathlib.Path(__file__).parent / 'corpus' / args.target
  folders = [str(found), *([str(kept)] if kept.is_dir() else [])]
  warnings.simplefilter('ignore')
  # Memory is bounded: one picture of the most pixels, and TensorFlow itself.
  atheris.Setup(
    [
      sys.argv[0],
      f'-max_total_time={args.seconds}',
      '-rss_limit_mb=2500',
      '-timeout=30',
      '-max_len=20000',
      *folders,
    ],
    fuzz_targets.TARGETS[args.target],
  )
  atheris.Fuzz()


if __name__ == '__main__':
  main()

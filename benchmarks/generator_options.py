"""What the options beyond the paper do to the demo generator's validation loss, at equal steps.

  python benchmarks/generator_options.py --dir runs/options [--steps 400]

trains the demo's generator with each option, with the same seed, examples and schedule, and prints
the cross entropy on `validation`, in nats a token. Runs that have ended are not repeated. Needs a
token cache of the demo's tokenizer and the `data` extra.
"""

import argparse
import pathlib
import re
import subprocess
import sys

RUN = [
  '--gin_file=gin_configs/runs/demo_generator.gin',
  '--gin.train.pictures_every=0',
  '--gin.train.checkpoint_every=0',
  '--gin.GeneratorObjective.tokenizer=None',
  '--gin.GeneratorObjective.depth_loss_weights=None',
  # To the end of the run, rather than of the demo's.
  '--gin.warmup_cosine.decay_steps=None',
]
MUON = ['--gin.train.optimizer=@muon', '--gin.muon.weight_decay=0.05']
Z_LOSS = ['--gin.GeneratorObjective.z_loss_weight=1e-4']
SMOOTHING = ['--gin.GeneratorObjective.label_smoothing=0.1']
AVERAGE = ['--gin.GeneratorObjective.ema=0.99']
QK_NORM = ['--gin.PartiConfig.qk_norm=True']
# Name of a row -> its flags. The others have the first one's optimizer unless they name one.
OPTIONS = {
  'AdamW': [],
  'Adafactor': ['--gin.train.optimizer=@adafactor', '--gin.adafactor.weight_decay=0.05'],
  'Muon': MUON,
  'z-loss 1e-4': Z_LOSS,
  'label smoothing 0.1': SMOOTHING,
  'average 0.99': AVERAGE,
  'QK-norm': QK_NORM,
  'Muon, z-loss, average': [*MUON, *Z_LOSS, *AVERAGE],
}


def train(folder: pathlib.Path, flags: list[str]) -> str:
  """Trains a run, unless it has ended, and returns what it printed."""
  log, ended = folder.with_suffix('.log'), folder.with_suffix('.ended')
  if not ended.exists():
    command = [sys.executable, '-m', 'parti_jax.train', f'--model_dir={folder}', *flags]
    print(*command, file=sys.stderr, flush=True)
    with log.open('a', encoding='utf-8') as file:
      subprocess.run(command, stderr=file, check=True)
    ended.touch()
  return log.read_text(encoding='utf-8')


def losses(log: str) -> dict[int, float]:
  """Step -> loss on `validation`."""
  found = re.findall(r'step (\d+): validation/loss (\S+)', log)
  return {int(step): float(loss) for step, loss in found}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--dir', required=True, type=pathlib.Path, help='folder of the runs')
  parser.add_argument('--tokens', default='runs/demo_tokens', help='token cache (%(default)s)')
  parser.add_argument('--steps', type=int, default=400, help='steps of each run (%(default)s)')
  parser.add_argument('--evaluations', type=int, default=4, help='of each run (%(default)s)')
  parser.add_argument('--options', nargs='+', default=list(OPTIONS), choices=list(OPTIONS))
  parser.add_argument(
    '--gin', action='append', default=[], metavar='KEY=VALUE', help='further settings of all runs'
  )
  args = parser.parse_args()
  args.dir.mkdir(parents=True, exist_ok=True)
  shared = [
    *RUN,
    f"--gin.token_cache.path='{args.tokens}'",
    f'--gin.train.steps={args.steps}',
    f'--gin.warmup_cosine.warmup_steps={max(args.steps // 10, 1)}',
    f'--gin.train.evaluate_every={max(args.steps // args.evaluations, 1)}',
    f'--gin.train.log_every={max(args.steps // args.evaluations, 1)}',
    *(f'--gin.{setting}' for setting in args.gin),
  ]
  curves = {}
  for name in args.options:
    folder = re.sub(r'[^a-z0-9]+', '_', name.lower())
    curves[name] = losses(train(args.dir / folder, [*shared, *OPTIONS[name]]))
  steps = sorted(set.intersection(*map(set, curves.values())))
  print('| option |', ' | '.join(f'step {step:,}' for step in steps), '|')
  print('|---' * (len(steps) + 1) + '|')
  for name, curve in curves.items():
    print(f'| {name} |', ' | '.join(f'{curve[step]:.3f}' for step in steps), '|')


if __name__ == '__main__':
  main()

"""What starting from a pretrained text encoder does to the demo generator's validation loss.

  python benchmarks/text_encoder.py --dir runs/warm_start [--picture FILE.png]

pretrains the demo's text encoder with each objective, trains the generator from each and from
random parameters, with the same seed and examples, and prints the losses. Runs that have ended are
not repeated. Needs the token cache runs/demo_tokens, the `data` extra, and for the picture
matplotlib.
"""

import argparse
import pathlib
import re
import subprocess
import sys

GENERATOR = [
  '--gin_file=gin_configs/runs/demo_generator.gin',
  '--gin.train.evaluate_every=25',
  '--gin.train.log_every=25',
  '--gin.train.pictures_every=0',
  '--gin.warmup_cosine.warmup_steps=50',
  '--gin.GeneratorObjective.tokenizer=None',
  '--gin.GeneratorObjective.depth_loss_weights=None',
]
ENCODER = [
  '--gin_file=gin_configs/runs/demo_text_encoder.gin',
  '--gin.train.evaluate_every=50',
  '--gin.train.log_every=25',
]
# Objective -> the flags that leave the other one out, and its share of the pretraining's steps:
# without pictures a step is a fraction of the work.
OBJECTIVES = {
  'masked': (
    ['--gin.TextEncoderObjective.contrastive_weight=0', "--gin.train.task='openmoji_texts'"],
    2,
  ),
  'contrastive': (['--gin.TextEncoderObjective.masked_weight=0'], 1),
  'both': ([], 1),
}


def train(folder, name, steps, flags) -> str:
  """Trains a run, unless it has ended, and returns what it printed."""
  log, ended = folder / f'{name}.log', folder / f'{name}.ended'
  if not ended.exists():
    command = [
      sys.executable,
      '-m',
      'parti_jax.train',
      f'--model_dir={folder / name}',
      f'--gin.train.steps={steps}',
      *flags,
    ]
    print(*command, flush=True)
    with log.open('w', encoding='utf-8') as file:
      subprocess.run(command, stderr=file, check=True)
    ended.touch()
  return log.read_text(encoding='utf-8')


def losses(log: str) -> dict[int, float]:
  """Step -> loss on `validation`."""
  return {
    int(step): float(loss)
    for step, loss in re.findall(r'step (\d+): validation/loss ([\d.]+)', log)
  }


def draw(path, curves):
  """Draws the losses by step, and how they differ from those of a random start."""
  from matplotlib import pyplot

  figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.5, 4), dpi=110)
  for name, curve in curves.items():
    steps, values = list(curve), list(curve.values())
    left.plot(steps, values, marker='.', label=name)
    right.plot(steps, [value - curves['random'][step] for step, value in curve.items()], marker='.')
  left.set(ylabel='validation loss, nats a token')
  left.legend(title='text encoder starts from')
  right.set(ylabel='difference from random')
  for axes in (left, right):
    axes.set(xlabel='training steps of the generator')
    axes.grid(alpha=0.3)
  figure.tight_layout()
  figure.savefig(path)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--dir', required=True, type=pathlib.Path, help='folder of the runs')
  parser.add_argument('--steps', type=int, default=200, help='of the generators')
  parser.add_argument(
    '--pretraining_steps',
    type=int,
    default=150,
    help='of the objectives with pictures; masked alone takes twice as many',
  )
  parser.add_argument('--picture', help='PNG file to draw the losses in')
  args = parser.parse_args()
  args.dir.mkdir(parents=True, exist_ok=True)
  curves = {'random': losses(train(args.dir, 'generator_random', args.steps, GENERATOR))}
  for name, (flags, share) in OBJECTIVES.items():
    train(args.dir, name, share * args.pretraining_steps, ENCODER + flags)
    start = [f"--gin.GeneratorObjective.text_encoder='{args.dir / name}'"]
    curves[name] = losses(train(args.dir, f'generator_{name}', args.steps, GENERATOR + start))
  steps = sorted(curves['random'])
  print('| start |', ' | '.join(map(str, steps)), '|')
  print('|---' * (len(steps) + 1) + '|')
  for name, curve in curves.items():
    print(f'| {name} |', ' | '.join(f'{curve[step]:.3f}' for step in steps), '|')
  if args.picture:
    draw(args.picture, curves)


if __name__ == '__main__':
  main()

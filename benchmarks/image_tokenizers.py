"""ViT-VQGAN against a convolutional VQGAN on OpenMoji, and what the generator makes of each.

  python benchmarks/image_tokenizers.py --dir runs/image_tokenizers [--minutes 20]

trains a tokenizer of each kind, with the same tokens, codes and loss, about the same number of
parameters, and the same processor time; tokenizes the pictures with each; trains the demo's
generator on the tokens of each, for the same number of steps; and judges pictures of both. Runs that
have ended are not repeated. Needs the `data` extra.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

from parti_jax.sampling import text_to_image

KINDS = {
  'vit_vqgan': [],
  'vqgan': [
    '--gin_file=gin_configs/models/vqgan_demo.gin',
    '--gin.TokenizerObjective.model=@VQGANConfig()',
  ],
}
TOKENIZER = ['train', '--gin_file=gin_configs/runs/demo_tokenizer.gin']
GENERATOR = [
  'train',
  '--gin_file=gin_configs/runs/demo_generator.gin',
  '--gin.train.pictures_every=0',
  '--gin.train.evaluate_every=0',
  '--gin.GeneratorObjective.tokenizer=None',
  '--gin.GeneratorObjective.depth_loss_weights=None',
]
# Steps of the two short runs whose difference gives the time of a step.
SHORT, LONG = 10, 110


def run(log: pathlib.Path, command: list[str]) -> float:
  """Runs a command of parti-jax and returns the processor time that it took, in seconds."""
  print('parti-jax', *command, flush=True)
  before = os.times()
  with log.open('w', encoding='utf-8') as file:
    whole = [sys.executable, '-m', 'parti_jax.cli.main', *command]
    subprocess.run(whole, stdout=file, stderr=subprocess.STDOUT, check=True)
  after = os.times()
  return sum(after[2:4]) - sum(before[2:4])


def seconds_of_a_step(folder: pathlib.Path, flags: list[str]) -> float:
  """Returns the processor time of a training step."""
  seconds = {}
  # The first run compiles the step, which the others find compiled.
  for name, steps in (('compiled', SHORT), ('short', SHORT), ('long', LONG)):
    model_dir = folder / f'timing_{name}'
    settings = [f'--gin.train.steps={steps}', '--gin.train.evaluate_every=0']
    settings += ['--gin.train.pictures_every=0', '--gin.warmup_cosine.warmup_steps=1']
    command = [*TOKENIZER, *flags, *settings, f'--model_dir={model_dir}']
    seconds[name] = run(folder / f'timing_{name}.log', command)
  step = (seconds['long'] - seconds['short']) / (LONG - SHORT)
  if step <= 0:
    raise RuntimeError(f'{LONG} steps took less than {SHORT}: {seconds}; nothing else may run')
  return step


def once(path: pathlib.Path, make) -> dict:
  """Returns the JSON in a file; makes it if it doesn't exist."""
  if not path.exists():
    content = json.dumps(make())
    path.write_text(content, encoding='utf-8')
  return json.loads(path.read_text(encoding='utf-8'))


def study(folder: pathlib.Path, flags: list[str], args: argparse.Namespace) -> dict:
  """Trains and judges one kind; returns the figures of its row."""
  folder.mkdir(parents=True, exist_ok=True)

  def tokenizer() -> dict:
    step = seconds_of_a_step(folder, flags)
    steps = max(1, round(60 * args.minutes / step))
    settings = [f'--gin.train.steps={steps}', '--gin.train.pictures_every=0']
    settings += ['--gin.train.evaluate_every=0', f'--gin.warmup_cosine.warmup_steps={steps // 10}']
    settings += [f'--gin.TokenizerObjective.revive_until={steps * 3 // 4}']
    settings += [f'--gin.TokenizerObjective.quantize_from={steps // 7}']
    command = [*TOKENIZER, *flags, *settings, f'--model_dir={folder / "tokenizer"}']
    return {'step': step, 'steps': steps, 'seconds': run(folder / 'tokenizer.log', command)}

  def tokens() -> dict:
    command = ['tokenize', '--gin_file=gin_configs/tasks/openmoji.gin', '--overwrite']
    command += [f'--tokenizer={folder / "tokenizer"}', f'--output_dir={folder / "tokens"}']
    return {'seconds': run(folder / 'tokens.log', command)}

  def generator() -> dict:
    command = [*GENERATOR, f"--gin.token_cache.path='{folder / 'tokens'}'"]
    command += [f'--gin.train.steps={args.generator_steps}', '--gin.warmup_cosine.warmup_steps=100']
    command += [f'--model_dir={folder / "generator"}']
    return {'seconds': run(folder / 'generator.log', command)}

  def report() -> dict:
    model = folder / 'model'
    command = ['export', f'--tokenizer={folder / "tokenizer"}', f'--output_dir={model}']
    command += [f'--generator={folder / "generator"}', '--overwrite']
    command += [f'--vocabulary={text_to_image.DEMO_FOLDER / "vocabulary.model"}']
    run(folder / 'export.log', [*command, '--guidance_scale=2'])
    command = ['evaluate', f'--model={model}', f'--output_dir={folder / "evaluation"}']
    run(folder / 'evaluation.log', [*command, '--splits', 'train', 'validation'])
    text = (folder / 'evaluation' / 'report.json').read_text(encoding='utf-8')
    return {split['split']: split for split in json.loads(text)['splits']}

  trained = once(folder / 'tokenizer.json', tokenizer)
  once(folder / 'tokens.json', tokens)
  once(folder / 'generator.json', generator)
  splits = once(folder / 'report.json', report)
  config = json.loads((folder / 'model' / 'config.json').read_text(encoding='utf-8'))
  percent = lambda split, row, metric: f'{100 * splits[split]["rows"][row][metric]["mean"]:.1f}'
  measured = splits['validation']['tokenizer']
  return {
    'parameters': f'{config["parameters"]["tokenizer"] / 1e6:.2f}M',
    'ms of a step': f'{1000 * trained["step"]:.0f}',
    'steps': f'{trained["steps"]:,}',
    'PSNR': f'{measured["psnr"]:.1f} dB',
    'codes used': f'{splits["train"]["tokenizer"]["codes_used"]:,}',
    'tone kept': percent('validation', 'reconstruction', 'tone_right'),
    'name kept': percent('validation', 'reconstruction', 'name_top1'),
    'tone drawn': percent('train', 'generated', 'tone_right'),
    'name drawn': percent('train', 'generated', 'name_top1'),
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--dir', required=True, type=pathlib.Path, help='folder of the runs')
  parser.add_argument(
    '--minutes', type=float, default=20, help='processor time of each tokenizer (%(default)s)'
  )
  parser.add_argument('--generator_steps', type=int, default=1500, help='(%(default)s)')
  args = parser.parse_args()
  rows = {kind: study(args.dir / kind, flags, args) for kind, flags in KINDS.items()}
  names = list(next(iter(rows.values())))
  print('| kind |', ' | '.join(names), '|')
  print('|---' * (len(names) + 1) + '|')
  for kind, row in rows.items():
    print(f'| {kind} |', ' | '.join(row.values()), '|')


if __name__ == '__main__':
  main()

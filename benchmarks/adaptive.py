"""Early exit and skipped guidance: what a threshold saves, and what it costs.

  python benchmarks/adaptive.py [--max_prompts N] [--json FILE] [--picture FILE]

Draws OpenMoji's prompts with the demo model at every setting, from the same seed. Alignment is
OpenMoji's judge. Layers are those that tokens passed, and those that were computed for their batch.
Pictures a second are of batches of 1 and of 32, the fastest of some rounds in which all settings
take turns, over those of the same model without thresholds. A setting is EXIT/SKIP, the two
thresholds.
"""

import argparse
import json
import pathlib
import time

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont

import parti_jax
from parti_jax.evaluation.openmoji import alignment

SETTINGS = [
  '1/1',
  '0.999/1',
  '0.99/1',
  '0.95/1',
  '0.9/1',
  '0.8/1',
  '0.6/1',
  '0.3/1',
  '0/1',
  '1/0.99',
  '1/0.9',
  '1/0.6',
  '1/0',
  '0.99/0.9',
  '0.9/0.9',
]
BATCHES = (1, 32)


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--split', default='unseen_combinations')
  parser.add_argument('--max_prompts', type=int)
  parser.add_argument('--num_images', type=int, default=4)
  parser.add_argument('--settings', nargs='+', default=SETTINGS, metavar='EXIT/SKIP')
  parser.add_argument('--rounds', type=int, default=3)
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  parser.add_argument('--picture', metavar='FILE', help='also plot alignment over layers per token')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  judge = alignment.OpenMojiAlignment(model.image_size, args.split, args.max_prompts)
  settings = {
    name: dict(zip(('exit_threshold', 'guidance_skip_threshold'), map(float, name.split('/'))))
    for name in args.settings
  }
  rows = [
    {'setting': name} | measured(model, judge, args.num_images, values)
    for name, values in settings.items()
  ]
  for row, rates in zip(rows, speeds(model, judge.prompts, settings.values(), args.rounds)):
    row['pictures_per_second'] = rates
  print(f'{args.split}: {len(judge.prompts)} prompts, {args.num_images} pictures of each')
  for row in rows:
    print(line(row, rows[0]))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n', encoding='utf-8')
  if args.picture:
    plot(rows, model.decoder_layers).save(args.picture, optimize=True)


def measured(model, judge, num_images: int, values) -> dict:
  """Alignment, and what the tokens took."""
  result = model.generate(judge.prompts, num_images=num_images, batch_size=max(BATCHES), **values)
  row = {
    name: alignment.mean_and_error(scores) for name, scores in judge.scores(result.images).items()
  }
  layers, usage = model.decoder_layers, result.usage
  if usage is None:
    return row | {'layers': layers, 'computed': layers, 'without': layers, 'unguided': 0.0}
  return row | {
    'layers': float(usage.layers.mean()),
    'computed': float(usage.computed[..., 0].mean()),
    'without': float(usage.computed[..., 1].mean()),
    'unguided': float(usage.unguided.mean()),
  }


def speeds(model, prompts, settings, rounds: int) -> list[dict]:
  """Pictures a second of each setting, by size of batch."""
  rates = [dict.fromkeys(map(str, BATCHES), 0.0) for _ in settings]
  for _ in range(rounds + 1):  # The first one compiles.
    for rate, values in zip(rates, settings):
      for batch in BATCHES:
        count = max(16, batch)
        chosen = [prompts[index] for index in np.linspace(0, len(prompts) - 1, count).astype(int)]
        begin = time.perf_counter()
        model.generate(chosen, num_images=1, batch_size=batch, **values)
        rate[str(batch)] = max(rate[str(batch)], count / (time.perf_counter() - begin))
  return rates


def line(row, first) -> str:
  """A row of the table, in Markdown."""
  exit_threshold, skip_threshold = row['setting'].split('/')
  rates = [row['pictures_per_second'][size] for size in map(str, BATCHES)]
  speedups = [
    rate / first['pictures_per_second'][size] for size, rate in zip(map(str, BATCHES), rates)
  ]
  cells = [
    exit_threshold,
    skip_threshold,
    f'{row["layers"]:.2f}',
    f'{row["computed"]:.2f}',
    f'{100 * row["unguided"]:.0f}%',
    f'{row["without"]:.2f}',
    *(
      '{:.1f} ± {:.1f}'.format(*(100 * value for value in row[name]))
      for name in alignment.OpenMojiAlignment.measures
    ),
    *(f'{rate:.1f} (×{speedup:.2f})' for rate, speedup in zip(rates, speedups)),
  ]
  return f'| {" | ".join(cells)} |'


def plot(rows, layers: int) -> Image.Image:
  """Alignment in % over the layers that tokens passed; a dot with its threshold for each row."""
  width, height, edge = 760, 420, 56
  picture = Image.new('RGB', (width, height), 'white')
  draw, font = ImageDraw.Draw(picture), ImageFont.load_default(size=13)
  across = lambda value: edge + (value - 1) / (layers - 1) * (width - 2 * edge)
  up = lambda value: height - edge - value * (height - 2 * edge)
  for percent in range(0, 101, 20):
    draw.line([(edge, up(percent / 100)), (width - edge, up(percent / 100))], '#dddddd')
    draw.text((edge - 34, up(percent / 100) - 8), f'{percent}', 'black', font)
  for layer in range(1, layers + 1):
    draw.text((across(layer) - 4, height - edge + 8), f'{layer}', 'black', font)
  draw.text((width // 2 - 130, height - 24), 'mean decoder layers per token', 'black', font)
  exits = sorted(
    (row for row in rows if row['setting'].endswith('/1')), key=lambda row: row['layers']
  )
  for name, color, top in (('name_top1', '#1f5fbf', 10), ('tone_right', '#c0392b', 28)):
    points = [(across(row['layers']), up(row[name][0])) for row in exits]
    draw.line(points, color, 2)
    for (x, y), row in zip(points, exits):
      draw.ellipse([x - 3, y - 3, x + 3, y + 3], color)
      draw.text((x - 10, y + 6), row['setting'].split('/')[0], color, font)
    draw.text((edge, top), f'{name.replace("_", " ")}, % (at each dot its threshold)', color, font)
  return picture


if __name__ == '__main__':
  main()

"""Speculative decoding: how many passes of the decoder pictures take, and how long.

  python benchmarks/speculative.py [--max_prompts N] [--json FILE]

Draws a picture for each of OpenMoji's prompts with the demo model, at its own settings and at
temperature 0, one token at a time and with windows of several sizes. Passes are means over the
pictures. Times are of single pictures: in every round all settings of a temperature take turns, and
the ratio to one token at a time is that of the fastest rounds.
"""

import argparse
import json
import pathlib
import time

import numpy as np

import parti_jax
from parti_jax.evaluation.openmoji import alignment

# Settings for each temperature; the first is one token at a time.
SEQUENTIAL = {'speculative_window': 0}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--split', default='unseen_combinations')
  parser.add_argument('--max_prompts', type=int, default=40)
  parser.add_argument('--windows', type=int, nargs='+', default=[2, 4, 8, 16])
  parser.add_argument('--drafts', nargs='+', default=['left'], metavar='NAME')
  parser.add_argument('--rules', nargs='+', default=['ratio', 'equal'], metavar='NAME')
  parser.add_argument('--timed', type=int, default=8, help='number of pictures in a round')
  parser.add_argument('--rounds', type=int, default=5, help='0 measures only passes')
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  prompts = alignment.OpenMojiAlignment(model.image_size, args.split, args.max_prompts).prompts
  print(f'{args.split}: {len(prompts)} prompts, a picture of each')
  rows = []
  for temperature in dict.fromkeys((model.sampling.temperature, 0.0)):
    # At temperature 0 the rules are the same.
    rules = args.rules if temperature else args.rules[:1]
    settings = [SEQUENTIAL] + [
      {'speculative_window': window, 'speculative_rule': rule, 'speculative_drafts': drafts}
      for rule in rules
      for drafts in args.drafts
      for window in args.windows
    ]
    settings = [values | {'temperature': temperature} for values in settings]
    found = [measured(model, prompts, values) for values in settings]
    for row, seconds in zip(found, timed(model, prompts[: args.timed], settings, args.rounds)):
      row['seconds'] = seconds
    for row in found:
      print(line(row, found[0]))
    rows += found
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n', encoding='utf-8')


def measured(model, prompts, values) -> dict:
  """Passes of the pictures, and the share of them that equal those drawn one token at a time."""
  result = model.generate(prompts, num_images=1, **values)
  expected = model.generate(prompts, num_images=1, **values | SEQUENTIAL)
  length = result.tokens.shape[-1]
  passes = np.full(len(prompts), length) if result.passes is None else result.passes.needed
  return values | {
    'passes': float(passes.mean()),
    'most': int(passes.max()),
    'share': float(passes.mean() / length),
    'same': float((result.tokens == expected.tokens).all(axis=-1).mean()),
  }


def timed(model, prompts, settings, rounds: int) -> list[float]:
  """Seconds for a single picture with each of the settings, of the fastest round."""
  fastest = [float('inf')] * len(settings)
  for turn in range(rounds + 1 if rounds else 0):  # The first one compiles.
    for index, values in enumerate(settings):
      begin = time.perf_counter()
      model.generate(prompts, num_images=1, batch_size=1, **values)
      if turn:
        seconds = (time.perf_counter() - begin) / len(prompts)
        fastest[index] = min(fastest[index], seconds)
  return fastest


def line(row, first) -> str:
  """A row of the table, in Markdown."""
  window = row['speculative_window']
  cells = [
    f'{row["temperature"]:g}',
    row.get('speculative_rule', '–'),
    row.get('speculative_drafts', '–'),
    str(window) if window else '–',
    f'{row["passes"]:.1f}',
    str(row['most']),
    f'{row["share"]:.2f}',
    f'{100 * row["same"]:.0f}%',
    f'{row["seconds"] / first["seconds"]:.2f}' if np.isfinite(row['seconds']) else '–',
  ]
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  main()

"""Guidance: its scale against how well pictures fit their prompts and how much they differ.

  python benchmarks/guidance.py [--ramps constant linear] [--json FILE] [--picture FILE]

Draws OpenMoji's prompts with the demo model at every scale, with and without a ramp over positions,
from the same seed. Alignment is OpenMoji's judge (tone right, name top 1); diversity is the mean
distance between the pictures of one prompt, the root mean squared difference of pixels in [0, 1].
"""

import argparse
import json
import pathlib

import numpy as np
from PIL import Image

import parti_jax
from parti_jax.evaluation.openmoji import alignment
from parti_jax.sampling import images as images_lib


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--split', default='unseen_combinations')
  parser.add_argument('--max_prompts', type=int)
  parser.add_argument('--num_images', type=int, default=4)
  parser.add_argument('--scales', type=float, nargs='+', default=[1, 1.25, 1.5, 2, 3, 5])
  parser.add_argument('--ramps', nargs='+', default=['constant', 'linear'])
  parser.add_argument('--json', metavar='FILE', help='also write the numbers there')
  parser.add_argument('--picture', metavar='FILE', help='a row of pictures for each setting')
  parser.add_argument('--shown', type=int, default=10, help='prompts in the picture')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  judge = alignment.OpenMojiAlignment(model.image_size, args.split, args.max_prompts)
  shown = np.linspace(0, len(judge.prompts) - 1, args.shown).astype(int)
  rows, strips = [], []
  print(f'{args.split}: {len(judge.prompts)} prompts, {args.num_images} pictures of each')
  for ramp in args.ramps:
    for scale in args.scales:
      if scale == 1 and ramp != args.ramps[0]:
        continue  # Unguided from the first position to the last, whatever the ramp.
      result = model.generate(
        judge.prompts, num_images=args.num_images, guidance_scale=scale, guidance_ramp=ramp
      )
      measured = judge.scores(result.images)
      measured['distance'] = alignment.pairwise_distance(result.images)
      rows.append(
        {'ramp': ramp, 'scale': scale}
        | {name: alignment.mean_and_error(values) for name, values in measured.items()}
      )
      print(_line(rows[-1]), flush=True)
      strips.append((f'scale {scale:g}, {ramp}', result.images[shown, 0]))
  if args.json:
    pathlib.Path(args.json).write_text(json.dumps(rows, indent=2) + '\n', encoding='utf-8')
  if args.picture:
    names, pictures = zip(*strips)
    sheet = images_lib.grid(np.stack(pictures), list(names), 64)
    sheet.quantize(128, dither=Image.Dither.NONE).save(args.picture, optimize=True)


def _line(row) -> str:
  """A row of the table, in Markdown."""
  mean, error = row['distance']
  cells = [
    f'{row["scale"]:g}',
    row['ramp'],
    *(
      '{:.1f} ± {:.1f}'.format(*(100 * value for value in row[name]))
      for name in alignment.OpenMojiAlignment.measures
    ),
    f'{mean:.3f} ± {error:.3f}',
  ]
  return f'| {" | ".join(cells)} |'


if __name__ == '__main__':
  main()

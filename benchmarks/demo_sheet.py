"""Draws the sheet of the README: one picture of the demo model for each prompt.

  python benchmarks/demo_sheet.py --output docs/demo.png

The model never saw the prompts of the first row, a name and a tone together, nor the requests of the other
rows. In the first row, each picture is the one that the ranker puts first of 16; the ranker was trained on
such captions. In the others it is the first one. All are of seed 0 and enlarged by super-resolution.
"""

import argparse

import numpy as np

import parti_jax
from parti_jax.sampling import sheets

UNSEEN_COMBINATIONS = [
  'man astronaut: dark skin tone',
  'woman farmer: light skin tone',
  'woman pilot: dark skin tone',
  'woman student: medium skin tone',
]
REQUESTS = [
  'a slice of watermelon for a hot day',
  "the old knight's shield",
  'a soccer ball on the grass',
  'some hot pancakes for breakfast',
  'a farm tractor',
  'the steam locomotive of grandpa',
  'a helicopter in the sky',
  'a sailboat on the lake',
  'a prickly hedgehog',
  'a potted plant for my windowsill',
  'a spooky jack-o-lantern for halloween',
  "a king's crown",
]


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--output', required=True, metavar='FILE', help='the sheet, a PNG')
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  ranked = model.generate(UNSEEN_COMBINATIONS, num_images=16, seed=0, rank=True, upscale=True)
  first = model.generate(REQUESTS, num_images=1, seed=0, upscale=True)
  pictures = np.concatenate([ranked.upscaled[:, :1], first.upscaled])
  prompts = UNSEEN_COMBINATIONS + REQUESTS
  sheets.sheet('', prompts, pictures, columns=4).save(args.output, optimize=True)


if __name__ == '__main__':
  main()

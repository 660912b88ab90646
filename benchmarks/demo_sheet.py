"""Draws the sheet of the README: one picture of the demo model for each prompt, enlarged.

  python benchmarks/demo_sheet.py --output docs/demo.png

Each is the first picture of seed 0. The model never saw the prompts of the first row, a name and a tone
together, nor the requests of the other rows.
"""

import argparse

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
  prompts = UNSEEN_COMBINATIONS + REQUESTS
  result = parti_jax.load(args.model).generate(prompts, num_images=1, seed=0, upscale=True)
  sheets.sheet('', prompts, result.images, columns=4).save(args.output, optimize=True)


if __name__ == '__main__':
  main()

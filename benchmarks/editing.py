"""Draws the pictures of docs/editing.md: OpenMoji's pictures, edited with the demo model.

  python benchmarks/editing.py --output_dir docs

Each sheet has the picture to edit first, with what is redrawn in gray, and then the results.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image

import parti_jax
from parti_jax.data import openmoji
from parti_jax.sampling import sheets
from parti_jax.sampling import slots

PATCH = 8


def find(caption, size):
  """Renders the picture of OpenMoji with this caption."""
  code = next(picture.code for picture in openmoji.pictures() if picture.caption == caption)
  return openmoji.render(code, size)


def shown(result, row=0):
  """The edited picture, gray where new tokens come."""
  rows, columns = (side // PATCH for side in result.edit.image.shape[:2])
  kept = result.kept[row, 0].reshape(rows, columns)
  return np.where(kept.repeat(PATCH, 0).repeat(PATCH, 1)[..., None], result.edit.image, slots.BLANK)


def completion(model):
  """The upper half of a face, completed for four prompts."""
  image = find('grinning face', model.image_size)
  prompts = [
    'grinning face',
    'face with tongue',
    'zipper-mouth face',
    'face with medical mask',
  ]
  result = model.generate(prompts, 1, seed=1, image=image, keep='top:0.5')
  cells = [[shown(result)], *([picture] for picture in result.images[:, 0])]
  return sheets.sheet('keep=top:0.5', ['kept of "grinning face"', *prompts], cells, 5)


def hat(model):
  """A hat, horns and a halo on a face, by a mask over its top."""
  image = find('slightly smiling face', model.image_size)
  mask = np.zeros(image.shape[:2], bool)
  mask[: 3 * PATCH] = True
  prompts = ['cowboy hat face', 'smiling face with horns', 'smiling face with halo']
  result = model.generate(prompts, 1, seed=0, image=image, mask=mask)
  cells = [[image], [shown(result)], *([picture] for picture in result.images[:, 0])]
  return sheets.sheet('mask over the top', ['the picture', 'outside the mask', *prompts], cells, 5)


def moved(model):
  """A ball moved to the other side: it is pasted there, and the mask clears where it was."""
  image = find('man bouncing ball: medium skin tone', model.image_size)
  red = (image[..., 0] > 150) & (image[..., 1:].max(axis=-1) < 100)
  near = [np.roll(red, (down, right), (0, 1)) for down in range(-2, 3) for right in range(-2, 3)]
  ball = np.any(near, axis=0)
  pasted = image.copy()
  pasted[np.roll(ball, 5 * PATCH, 1)] = image[ball]
  prompt = 'man walking: medium skin tone'
  first = model.generate(prompt, 1, seed=0, image=pasted, mask=ball)
  best = model.generate(prompt, 2, seed=0, image=pasted, mask=ball, best_of=8)
  pictures = [*first.images[0], *best.images[0]]
  cells = [[image], [shown(first)], *([picture] for picture in pictures)]
  ways = ['', ', best_of=8', ', best_of=8']
  texts = ['the picture', 'ball pasted, outside the mask', *(prompt + way for way in ways)]
  return sheets.sheet('a ball moved by a mask', texts, cells, 5)


def variations(model):
  """A picture with a share of its tokens redrawn."""
  image = find('woman firefighter: medium skin tone', model.image_size)
  prompts = ['woman firefighter: medium skin tone', 'woman astronaut: medium skin tone']
  texts, cells = ['the picture'], [[image]]
  for vary in (0.3, 0.6):
    result = model.generate(prompts, 1, seed=3, image=image, vary=vary)
    for prompt, pictures in zip(prompts, result.images):
      texts.append(f'vary={vary}: {prompt}')
      cells.append(list(pictures))
  return sheets.sheet('variations', texts, cells, 5)


SHEETS = {
  'completion': completion,
  'hat': hat,
  'moved': moved,
  'variations': variations,
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('--model', help='a model folder (default: the demo model)')
  parser.add_argument('--output_dir', default='docs', metavar='DIR')
  parser.add_argument('--sheets', nargs='+', choices=SHEETS, default=list(SHEETS))
  args = parser.parse_args()
  model = parti_jax.load(args.model)
  for name in args.sheets:
    sheet = SHEETS[name](model)
    path = pathlib.Path(args.output_dir) / f'editing_{name}.png'
    sheet.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    print(path, path.stat().st_size, flush=True)


if __name__ == '__main__':
  main()

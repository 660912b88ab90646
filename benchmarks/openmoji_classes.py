"""OpenMoji as classes, in the form of ImageNet: a folder of pictures for each name.

  python benchmarks/openmoji_classes.py OUTPUT_DIR [--classes 10] [--size 64]
  parti-jax evaluate --dataset=imagenet --classes=OUTPUT_DIR/classes.txt --output_dir=samples
  parti-jax train --gin_file=... --gin_file=gin_configs/tasks/imagenet.gin
    --gin.classes.path="'OUTPUT_DIR'" --gin.classes.names="'OUTPUT_DIR/classes.txt'"

Pictures of a class differ by their skin tones; most of OpenMoji's names have one. Pictures of held-out
combinations of name and tones are in val, the others in train. Names that have both come first, and among
these the ones with the most pictures.
"""

import argparse
import collections
import pathlib

from PIL import Image

from parti_jax.data import openmoji
from parti_jax.sampling import images as images_lib


def chosen(pictures, count):
  """Returns {name: its pictures} of names with held-out pictures, then of others, sorted by name."""
  of_name = collections.defaultdict(list)
  for picture in pictures:
    if picture.split != 'validation':
      of_name[picture.name].append(picture)

  def order(name):
    training = sum(picture.split == 'train' for picture in of_name[name])
    return len(of_name[name]) == training, -training

  trained = [name for name, found in of_name.items() if any(p.split == 'train' for p in found)]
  names = sorted(trained, key=order)[:count]
  if len(names) < count:
    raise SystemExit(f'OpenMoji has {len(names)} names outside of its split validation')
  return {name: of_name[name] for name in sorted(names)}


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  parser.add_argument('output_dir', type=pathlib.Path)
  parser.add_argument('--classes', type=int, default=10)
  parser.add_argument('--size', type=int, default=64, help='height and width of the pictures')
  args = parser.parse_args(argv)
  classes = chosen(openmoji.pictures(), args.classes)
  folders = images_lib.distinct_names(classes)
  for name, pictures in classes.items():
    for picture in pictures:
      split = 'train' if picture.split == 'train' else 'val'
      place = args.output_dir / split / folders[name]
      place.mkdir(parents=True, exist_ok=True)
      image = openmoji.render(picture.code, args.size)
      Image.fromarray(image).save(place / f'{picture.code}.png')
  # With a comma, the first word would be the name.
  lines = [f'{folders[name]}\t{name.replace(",", "")}\n' for name in classes]
  (args.output_dir / 'classes.txt').write_text(''.join(lines), encoding='utf-8')


if __name__ == '__main__':
  main()

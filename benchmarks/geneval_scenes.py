"""GenEval made of OpenMoji: its prompts and a judge in the forms of GenEval's own.

  python benchmarks/geneval_scenes.py prompts evaluation_metadata.jsonl [--splits validation]
  parti-jax prompts evaluation_metadata.jsonl --format=geneval --model=MODEL --output_dir=out
  python benchmarks/geneval_scenes.py judge out/images --outfile results.jsonl
  parti-jax prompts --results geneval=results.jsonl

The prompts are captions of scenes (`openmoji_scenes`). The judge is `scene_judge`, which sees only the
pixels. So the layout and the table can be checked without GenEval's detector; the numbers are those of
`parti-jax evaluate --dataset=openmoji_scenes`, and can't be compared with GenEval's.
"""

import argparse
import json
import pathlib
import re

import numpy as np
from PIL import Image

from parti_jax.data import openmoji_grammar
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation.openmoji import scene_judge

# GenEval's name of each task.
TAGS = dict(
  zip(
    openmoji_scenes.TASKS,
    ('single_object', 'two_object', 'counting', 'colors', 'position', 'color_attr'),
  )
)


def rows(splits, settings, number):
  """Yields the metadata of the first `number` scenes of each split."""
  for split in splits:
    for index in range(min(number, settings.count(split))):
      scene = settings.scene(split, index)
      yield {
        'tag': TAGS[scene.task],
        'include': [
          {'class': group.kind, 'count': group.count}
          | ({'color': group.color} if group.color else {})
          for group in scene.groups
        ],
        'prompt': openmoji_grammar.captions_of(settings, split, index)[0],
        'scene': json.loads(scene.to_json()),
      }


def judged(folder):
  """Yields a row of results.jsonl for each picture in GenEval's layout."""
  judges = {}
  for place in sorted(pathlib.Path(folder).iterdir()):
    if not place.is_dir() or not place.name.isdigit():
      continue
    metadata = json.loads((place / 'metadata.jsonl').read_text(encoding='utf-8'))
    scene = openmoji_scenes.Scene.from_json(json.dumps(metadata['scene']))
    for path in sorted((place / 'samples').iterdir()):
      if not re.match(r'\d+\.png', path.name):
        continue
      with Image.open(path) as picture:
        image = np.asarray(picture.convert('RGB'))
      size = image.shape[0]
      judges.setdefault(size, scene_judge.Judge(size))
      verdict = judges[size].judge(scene, image)
      wrong = [name for name in scene_judge.ASPECTS if getattr(verdict, name) is False]
      yield {
        'filename': str(path),
        'tag': metadata['tag'],
        'prompt': metadata['prompt'],
        'correct': bool(verdict.right),
        'reason': ', '.join(wrong),
        'metadata': json.dumps(metadata),
        'details': '{}',
      }


def main(argv=None):
  parser = argparse.ArgumentParser(description=__doc__.split('\n', maxsplit=1)[0])
  commands = parser.add_subparsers(dest='command', required=True)
  prompts = commands.add_parser('prompts', help='write evaluation_metadata.jsonl')
  prompts.add_argument('outfile')
  prompts.add_argument('--splits', nargs='+', default=['validation'], metavar='SPLIT')
  prompts.add_argument('--number', type=int, default=200, help='scenes of each split')
  prompts.add_argument('--of_seen_names', action='store_true')
  judge = commands.add_parser('judge', help='judge pictures in the layout of GenEval')
  judge.add_argument('folder')
  judge.add_argument('--outfile', default='results.jsonl')
  args = parser.parse_args(argv)
  if args.command == 'prompts':
    settings = openmoji_scenes.Settings(of_seen_names=args.of_seen_names)
    found = rows(args.splits, settings, args.number)
  else:
    found = judged(args.folder)
  lines = ''.join(json.dumps(row) + '\n' for row in found)
  pathlib.Path(args.outfile).write_text(lines, encoding='utf-8')


if __name__ == '__main__':
  main()

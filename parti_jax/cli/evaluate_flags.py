"""The flags of `parti-jax evaluate`."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from parti_jax.cli import evaluate_classes
from parti_jax.cli import evaluate_reference
from parti_jax.cli import evaluate_sweep
from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.data import openmoji_scenes
from parti_jax.evaluation.metrics import features

DATASETS = ('openmoji', 'openmoji_scenes', 'coco', 'localized_narratives', 'imagenet')
_SPLITS = {'openmoji': openmoji.SPLITS, 'openmoji_scenes': openmoji_scenes.SPLITS}

# Flags that only apply to some data sets, with their defaults.
_OF_DATASETS: dict[tuple[str, ...], dict[str, Any]] = {
  ('openmoji', 'openmoji_scenes'): {
    'splits': [],  # All.
    'max_prompts': None,
    'train_prompts': 200,
    'rank': False,
  },
  ('openmoji_scenes',): {'of_seen_names': False},
  ('coco', 'localized_narratives'): {'annotations': None, 'pictures': None, 'num_captions': 30_000},
  ('coco',): {'tfds_dir': None},
  ('imagenet',): evaluate_classes.DEFAULTS,
  evaluate_reference.DATASETS: {'reference': None},
}
_NUM_IMAGES = {
  'openmoji': 4,
  'openmoji_scenes': 4,
  'coco': 1,
  'localized_narratives': 1,
  'imagenet': 1,
}
# Size at which Inception compares pictures, in pixels.
_IMAGE_SIZE = 256
# Data sets whose pictures are compared with real ones as a set.
_AS_SETS = ('openmoji', 'coco', 'localized_narratives', 'imagenet')


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  model_flags.add_model(parser)
  model_flags.add_replacement(parser, 'ranker')
  parser.add_argument(
    '--dataset', default='openmoji', help=f'one of {", ".join(DATASETS)} (default: %(default)s)'
  )
  parser.add_argument(
    '--output_dir',
    default='evaluation',
    metavar='DIR',
    help='output folder of report.json, report.md, contact sheets and, for captions, the '
    'generated pictures (default: %(default)s)',
  )
  parser.add_argument(
    '--num_images',
    type=int,
    help='number of pictures for each prompt (default: 4 for openmoji and openmoji_scenes, else 1; '
    "with more, captions and imagenet use the one that the model's ranker prefers)",
  )
  parser.add_argument(
    '--seed',
    type=int,
    default=0,
    help='seed of the choice of prompts and of the pictures (default: %(default)s)',
  )
  parser.add_argument(
    '--inception_weights',
    metavar='FILE',
    help="Inception's weights for the FID and the inception score, "
    f"{features.INCEPTION_FILE} (default: none; then the features of the model's "
    'ranker are used to compare pictures)',
  )
  parser.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='size at which Inception compares pictures; a ranker has a fixed one, and imagenet has '
    f'--sample_size (default: {_IMAGE_SIZE})',
  )
  parser.add_argument(
    '--batch_size',
    type=int,
    help='number of pictures to generate at once; affects memory, not the pictures',
  )
  sampling_flags.add_arguments(parser)
  sampling_flags.add_precision(parser)
  evaluate_sweep.add_arguments(parser)
  _add_emoji(parser.add_argument_group('openmoji, openmoji_scenes'))
  _add_captions(parser.add_argument_group('coco, localized_narratives'))
  evaluate_classes.add_arguments(parser)
  evaluate_reference.add_arguments(parser)


def _add_emoji(group: argparse._ArgumentGroup):
  """Adds the flags of OpenMoji and of scenes made of it."""
  group.add_argument(
    '--rank',
    action='store_true',
    default=None,
    help="also judge the picture of each prompt that the model's ranker prefers",
  )
  group.add_argument(
    '--of_seen_names',
    action='store_true',
    default=None,
    help="scenes without the things that OpenMoji's split `validation` holds out, for a model that "
    'trained with openmoji_scenes.of_seen_names=True',
  )
  group.add_argument(
    '--splits',
    nargs='+',
    metavar='SPLIT',
    help='splits among '
    + ', or '.join(', '.join(splits) for splits in _SPLITS.values())
    + ' (default: all)',
  )
  group.add_argument(
    '--max_prompts',
    type=int,
    metavar='N',
    help='maximum number of prompts of a split, chosen at random (default: all)',
  )
  group.add_argument(
    '--train_prompts',
    type=int,
    metavar='N',
    help='number of prompts of the train split, chosen at random (default: 200)',
  )


def _add_captions(group: argparse._ArgumentGroup):
  """Adds the flags of data sets of pictures with captions."""
  group.add_argument(
    '--annotations',
    metavar='FILE',
    help='captions_val2014.json, or coco_val_localized_narratives.jsonl (default for coco: '
    'coco_captions of tensorflow-datasets)',
  )
  group.add_argument('--pictures', metavar='DIR', help='folder with the picture files')
  group.add_argument(
    '--tfds_dir',
    metavar='DIR',
    help='folder where tensorflow-datasets has prepared coco_captions (default: its own folder)',
  )
  group.add_argument(
    '--num_captions',
    type=int,
    metavar='N',
    help='maximum number of captions, chosen at random (default: 30000)',
  )


def check(args: argparse.Namespace) -> None:
  """Raises UserError for invalid flags, before loading a model, and fills in defaults."""
  if args.dataset not in DATASETS:
    raise UserError(
      f'--dataset: unknown data set {args.dataset!r}; choose from {", ".join(DATASETS)}'
    )
  for datasets, defaults in _OF_DATASETS.items():
    for flag, default in defaults.items():
      if getattr(args, flag) is None:
        setattr(args, flag, default)
      elif args.dataset not in datasets:
        *others, last = datasets
        names = f'{", ".join(others)} and {last}' if others else last
        raise UserError(f'--{flag} only applies to --dataset={names}, not to {args.dataset}')
  if args.num_images is None:
    args.num_images = _NUM_IMAGES[args.dataset]
  counts = (
    'num_images',
    'max_prompts',
    'train_prompts',
    'num_captions',
    'per_class',
    'sample_size',
    'image_size',
    'batch_size',
  )
  for flag in counts:
    value = getattr(args, flag)
    if value is not None and value < 1:
      raise UserError(f'--{flag} must be a positive number, not {value}')
  if args.seed < 0:
    raise UserError(f'--seed={args.seed} must not be negative')
  sampling_flags.check_numbers(args, *counts)
  _check_inception(args)
  sampling_flags.given(args)
  sampling_flags.given_precision(args)
  if args.dataset == 'openmoji_scenes' and args.inception_weights is not None:
    raise UserError(
      '--inception_weights does not apply to --dataset=openmoji_scenes, whose pictures are judged one '
      'by one'
    )
  _check_sets(args)
  evaluate_sweep.check(args)
  if args.dataset == 'imagenet':
    evaluate_classes.check(args)
  elif args.dataset in evaluate_reference.DATASETS:
    _check_captions(args)
  known = _SPLITS.get(args.dataset, ())
  args.splits = args.splits or list(known)
  for split in args.splits:
    if split not in known:
      raise UserError(f'--splits: unknown split {split!r}; choose from {", ".join(known)}')


def _check_inception(args: argparse.Namespace) -> None:
  """Raises UserError for flags of Inception that do not apply, and fills in defaults."""
  if args.image_size is None:
    args.image_size = _IMAGE_SIZE
  else:
    checks.whole_number('--image_size', args.image_size, 1, features.LARGEST_SIZE)
    if args.dataset == 'imagenet':
      raise UserError(
        '--image_size does not apply to --dataset=imagenet, whose pictures have --sample_size'
      )
    if args.inception_weights is None:
      raise UserError(
        '--image_size is the size at which Inception compares pictures, and needs --inception_weights '
        'FILE; a ranker compares them at its own size'
      )
  if args.inception_weights is not None and not pathlib.Path(args.inception_weights).is_file():
    raise UserError(
      f"--inception_weights {args.inception_weights} isn't a file; give "
      f'{features.INCEPTION_FILE} of pytorch-fid or torch-fidelity'
    )


def _check_sets(args: argparse.Namespace) -> None:
  """Raises UserError for --sweep and --rejection without sets of pictures to compare."""
  for flag in ('sweep', 'rejection'):
    if getattr(args, flag) is None:
      continue
    if args.dataset not in _AS_SETS:
      raise UserError(
        f'--{flag} compares sets of pictures with real ones; it applies to --dataset='
        f'{", ".join(_AS_SETS)}, not to {args.dataset}'
      )
    if args.dataset == 'imagenet' and args.reference is None:
      raise UserError(
        f'--{flag} compares sets of pictures with real ones, for which --dataset=imagenet needs '
        '--reference PATH'
      )


def _check_captions(args: argparse.Namespace):
  """Raises UserError for flags that don't say which captions and pictures to read."""
  if args.annotations is None:
    if args.dataset == 'coco' and args.pictures is None:
      return  # From tensorflow-datasets.
    raise UserError(
      f'--dataset={args.dataset} needs --annotations FILE, and --pictures DIR or --reference PATH'
    )
  if args.tfds_dir is not None:
    raise UserError('--annotations FILE excludes --tfds_dir')
  if (args.pictures is None) == (args.reference is None):
    raise UserError(
      '--annotations FILE needs either --pictures DIR, the pictures of these captions, or --reference '
      'PATH, what all generated pictures are compared with'
    )

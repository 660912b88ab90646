"""`parti-jax evaluate_samples`: compares samples with a reference, as ADM's evaluator does."""

from __future__ import annotations

import argparse
import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any

from parti_jax.cli import model_flags
from parti_jax.core import checks
from parti_jax.core import start_cache
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import features
from parti_jax.runs import distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  parser.add_argument(
    'samples',
    metavar='SAMPLES',
    help='an .npz with the samples as arr_0, uint8 [pictures, height, width, 3], or a folder of pictures',
  )
  parser.add_argument(
    '--reference',
    metavar='PATH',
    help="what to compare with: an .npz of pictures, one of ADM's with mu, sigma, mu_s and sigma_s, or "
    'a folder of pictures',
  )
  parser.add_argument(
    '--inception_weights',
    metavar='FILE',
    help=f"Inception's weights, {features.INCEPTION_FILE} (default: none; then the features of a ranker "
    'are compared, which gives other numbers than published ones)',
  )
  parser.add_argument(
    '--model',
    metavar='PATH',
    help='without --inception_weights: the model whose ranker to use (default: the demo model)',
  )
  parser.add_argument(
    '--ranker', metavar='PATH', help="without --inception_weights: a ranker in place of the model's"
  )
  parser.add_argument(
    '--image_size',
    type=int,
    metavar='PIXELS',
    help='crop the central square and resize to this size first (bicubic, with antialiasing); needed if '
    'samples and reference have different sizes (default: pictures stay as they are)',
  )
  parser.add_argument(
    '--resize',
    choices=tuple(features.RESIZES),
    help="how pictures get Inception's 299 pixels: tensorflow1 as the FID is defined and ADM's evaluator "
    'computes it, clean as clean-fid does (default: tensorflow1)',
  )
  parser.add_argument(
    '--statistics',
    metavar='FILE',
    help="also write the samples' mu, sigma, mu_s and sigma_s to this .npz, for use as a reference",
  )
  parser.add_argument(
    '--output_dir',
    default='evaluation_samples',
    metavar='DIR',
    help='output folder of measurement.json and measurement.md, and of the features, with which an '
    'interrupted command resumes (default: %(default)s)',
  )
  distributed.add_arguments(parser)
  distributed.add_worker(parser)


def run(args: argparse.Namespace) -> int:
  """Measures, prints the table and writes it.

  Returns:
    0, the exit status, or that of a process of a multi-host run that failed.

  Raises:
    UserError: bad flags, files that can't be read, or a folder that can't be written or holds another
      run.
  """
  _check_flags(args)
  return distributed.share(args, functools.partial(_run, args))


def _run(args: argparse.Namespace, connect: Callable[[], tuple[int, int]], together: bool) -> int:
  samples = picture_sets.open_path(args.samples, 'SAMPLES')
  reference = samples_evaluation.open_reference(args.reference) if args.reference else None
  if args.image_size is None and reference is not None and reference.pictures is not None:
    samples_evaluation.check_sizes(
      (samples.place, samples.size()), (reference.place, reference.pictures.size())
    )
  worker = connect()
  extractor, of_features = network(args)
  if reference is not None:
    size = args.image_size or (samples.size() or (extractor.image_size,))[0]
    samples_evaluation.check_network(reference, extractor, size)
  folder = output_folder.make(args.output_dir)
  output_folder.claim(
    folder,
    {
      'samples': samples.identity(),
      'reference': None if reference is None else reference.identity(),
      'features': of_features,
      'image_size': args.image_size,
    },
  )
  stores = tuple(feature_blocks.Store(folder, name) for name in ('samples', 'reference'))
  parts = [(samples, stores[0], 'samples')]
  if reference is not None and reference.pictures is not None:
    parts.append((reference.pictures, stores[1], 'reference'))
  for pictures, store, name in parts:
    samples_evaluation.compute(pictures, extractor, store, args.image_size, worker, progress=name)
  if together:
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices('features')
    if worker[0]:
      return 0
  missing = sum(len(store.missing()) for _, store, _ in parts)
  if missing:
    print(
      f'{missing:,} blocks of {picture_sets.BLOCK} pictures are left to other workers; the one that '
      'finishes last reports the numbers'
    )
    return 0
  if args.statistics:
    content = samples_evaluation.statistics_file(stores[0], samples.place)
    output_folder.write(pathlib.Path(args.statistics), content)
    print(args.statistics)
  if reference is None:
    return 0
  measured = samples_evaluation.evaluate(
    samples, reference, extractor, of_features, (stores[0], stores[1])
  )
  print(measured.text())
  for path in samples_evaluation.write(folder, measured):
    print(path)
  return 0


def network(
  args: argparse.Namespace, spatial: bool = True, model=None
) -> tuple[features.Extractor, dict[str, Any]]:
  """Returns the network that computes features, and what the protocol says of it.

  Args:
    args: with the flags --inception_weights, --model and --ranker, and possibly --resize.
    spatial: whether to compute the features for sFID.
    model: the model that --model and --ranker name, if it is loaded.

  Raises:
    UserError: its weights can't be read, or the model has no ranker.
  """
  start_cache.enable()
  if args.inception_weights is not None:
    resize = getattr(args, 'resize', None) or 'tensorflow1'
    inception = features.Inception(args.inception_weights, None, spatial, resize=resize)
    return inception, {
      'network': 'Inception v3 of 2015-12-05',
      'weights': inception.digest,
      'resize': features.RESIZES[resize],
      'pixels': 'uint8',
    }
  if model is None:
    model = model_flags.load(args)
  if model.ranker is None:
    raise UserError(
      f'the model {model.model_name} has no ranker; give --inception_weights or --ranker'
    )
  ranker = features.RankerFeatures(model.ranker, model.model_name)
  return ranker, {
    'network': f'ranker ({model.ranker.kind})',
    'weights': output_folder.ranker_weights(args.ranker or args.model),
    'resize': f'to {ranker.image_size} pixels, '
    + ('as its authors' if ranker.resizes else picture_sets.RESIZE_FILTER),
    'pixels': 'uint8',
  }


def _check_flags(args: argparse.Namespace) -> None:
  """Raises UserError for invalid flags, before anything is loaded."""
  if args.reference is None and args.statistics is None:
    raise UserError('give --reference PATH to compare with, or --statistics FILE to write, or both')
  if args.image_size is not None:
    checks.whole_number('--image_size', args.image_size, 1, features.LARGEST_SIZE)
  if args.statistics is not None:
    storage.check_local(args.statistics)
    storage.check_can_write(f'--statistics={args.statistics}', args.statistics)
    if pathlib.Path(args.statistics).suffix != '.npz':
      raise UserError(f'--statistics {args.statistics} must end in .npz')
    if not pathlib.Path(args.statistics).absolute().parent.is_dir():
      raise UserError(f'--statistics {args.statistics}: its folder does not exist; create it first')
    for name, path in (('SAMPLES', args.samples), ('--reference', args.reference)):
      if path is not None and os.path.realpath(path) == os.path.realpath(args.statistics):
        raise UserError(
          f'--statistics {args.statistics} would replace {name}, the same file; choose another name'
        )
  check_network(args)


def check_network(args: argparse.Namespace) -> None:
  """Raises UserError for flags of networks that exclude each other or name no file."""
  if args.inception_weights is None:
    if args.resize is not None:
      raise UserError('--resize is of Inception, and needs --inception_weights FILE')
    return
  for flag in ('model', 'ranker'):
    if getattr(args, flag, None) is not None:
      raise UserError(f'--{flag} gives the ranker, which --inception_weights replaces; drop one')
  if not pathlib.Path(args.inception_weights).is_file():
    raise UserError(
      f"--inception_weights {args.inception_weights} isn't a file; give {features.INCEPTION_FILE} of "
      'pytorch-fid or torch-fidelity'
    )

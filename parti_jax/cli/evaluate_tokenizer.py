"""`parti-jax evaluate_tokenizer`: measures how well an image tokenizer reconstructs pictures."""

from __future__ import annotations

import argparse

from parti_jax.cli import evaluate_samples
from parti_jax.core import checks
from parti_jax.core import gin_config
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation import feature_blocks
from parti_jax.evaluation import output_folder
from parti_jax.evaluation import samples_evaluation
from parti_jax.evaluation import tokenizer_evaluation
from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.metrics import features
from parti_jax.importers import files
from parti_jax.importers import lpips_files
from parti_jax.models import image_tokenizers
from parti_jax.models import lpips


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds the command's flags."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--tokenizer',
    required=True,
    metavar='PATH',
    help="the tokenizer's run, an exported model or a folder of `parti-jax import tokenizer`",
  )
  parser.add_argument(
    '--pictures',
    metavar='PATH',
    help='an .npz with arr_0, uint8 [pictures, height, width, 3], or a folder of pictures (default: the '
    'source that the gin files choose)',
  )
  parser.add_argument(
    '--tfds', metavar='NAME', help='pictures of a data set that tensorflow-datasets has prepared'
  )
  parser.add_argument(
    '--tfds_dir',
    metavar='DIR',
    help='where tensorflow-datasets prepared it (default: its own folder)',
  )
  parser.add_argument(
    '--source', metavar='NAME', help="source of pictures, if not that of gin's data.source"
  )
  parser.add_argument(
    '--split', help='split of the source or of --tfds (default: validation)', metavar='NAME'
  )
  parser.add_argument(
    '--max_pictures',
    type=int,
    metavar='N',
    help=f'use only the first N pictures, rounded up to blocks of {picture_sets.BLOCK} (default: all)',
  )
  parser.add_argument(
    '--inception_weights',
    metavar='FILE',
    help=f"Inception's weights for the rFID, {features.INCEPTION_FILE} (default: none; then a Fréchet "
    'distance over the features of a ranker, which is another number)',
  )
  parser.add_argument(
    '--resize',
    choices=tuple(features.RESIZES),
    help="how pictures get Inception's 299 pixels: tensorflow1 as the FID is defined, clean as clean-fid "
    'does (default: tensorflow1)',
  )
  parser.add_argument(
    '--ranker',
    metavar='PATH',
    help="without --inception_weights: folder of a ranker (default: the demo model's)",
  )
  for network in lpips.NETWORKS:
    parser.add_argument(
      f'--{network}_weights',
      metavar='FILE',
      help=f"torchvision's file of {network}, for LPIPS over its features",
    )
  parser.add_argument(
    '--lpips_weights',
    metavar='FILE',
    help='file of the `lpips` package, weights/v0.1/vgg.pth or alex.pth (docs/tokenizer.md)',
  )
  parser.add_argument(
    '--output_dir',
    default='evaluation_tokenizer',
    metavar='DIR',
    help='output folder of measurement.json and measurement.md, and of the features, with which an '
    'interrupted command resumes (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  """Measures, prints the table and writes it.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, files that can't be read, or a folder that can't be written or holds another
      run.
  """
  network = _check_flags(args)
  if not storage.exists(args.tokenizer):
    raise UserError(
      f'--tokenizer {args.tokenizer} does not exist; give the folder of a run, of an exported model or of '
      'an imported tokenizer'
    )
  from parti_jax.training.objectives import frozen_tokenizer

  tokenizer = frozen_tokenizer.load(args.tokenizer)
  size = image_sizes.square(tokenizer.config.image_size, 'parti-jax evaluate_tokenizer compares')
  pictures = _open(args, size)
  perceptual = _perceptual(args, network)
  args.model = None
  extractor, of_features = evaluate_samples.network(args, spatial=False)
  reconstructor = tokenizer_evaluation.Reconstructor(tokenizer.config, tokenizer.params, perceptual)
  weights = tokenizer_evaluation.params_digest(tokenizer.params)
  folder = output_folder.make(args.output_dir)
  output_folder.claim(
    folder,
    {
      'pictures': pictures.identity(),
      'max_pictures': args.max_pictures,
      'tokenizer': weights,
      'features': of_features,
      'lpips': None if perceptual is None else [perceptual.network, *perceptual.digests],
    },
  )
  stores = (
    feature_blocks.Store(folder, 'pictures'),
    feature_blocks.Store(folder, 'reconstructions'),
  )
  tokenizer_evaluation.compute(
    pictures, reconstructor, tokenizer.config, extractor, stores, args.max_pictures, progress=True
  )
  config = tokenizer.config
  measured = tokenizer_evaluation.evaluate(
    pictures,
    config,
    {
      'path': str(args.tokenizer),
      'kind': image_tokenizers.CONFIGS.name_of(config),
      'weights': weights,
      'codes': config.codebook_size,
      'grid': list(config.grid),
    },
    extractor,
    of_features,
    stores,
    perceptual,
  )
  print(measured.text())
  for path in samples_evaluation.write(folder, measured):
    print(path)
  return 0


def _open(args: argparse.Namespace, image_size: int) -> picture_sets.PictureSet:
  """Opens the pictures that the flags select."""
  if args.pictures is not None:
    return picture_sets.open_path(args.pictures, '--pictures')
  split = args.split or 'validation'
  if args.tfds is not None:
    return picture_sets.TfdsSet(args.tfds, split, args.tfds_dir)
  # Registers everything that gin files may name.
  from parti_jax.data import datasets
  from parti_jax.data import sources

  gin_config.parse(args.gin_file, args.gin_bindings)
  name = datasets.source_name(args.source)
  return picture_sets.SourceSet(sources.configured(name, image_size), split)


def _perceptual(
  args: argparse.Namespace, network: str | None
) -> tokenizer_evaluation.Perceptual | None:
  """Reads the weights of LPIPS; None if there are none."""
  if network is None:
    return None
  paths = (getattr(args, f'{network}_weights'), args.lpips_weights)
  params = lpips_files.read(*paths, network)
  digests = [files.open_weights([path]).digest() for path in paths]
  return tokenizer_evaluation.Perceptual(network, params, (digests[0], digests[1]))


def _check_flags(args: argparse.Namespace) -> str | None:
  """Raises UserError for invalid flags, before anything is loaded; returns LPIPS' network."""
  chosen = [flag for flag in ('pictures', 'tfds', 'source') if getattr(args, flag) is not None]
  if len(chosen) > 1:
    raise UserError(f'--{chosen[0]} and --{chosen[1]} both give the pictures; drop one')
  if args.pictures is not None:
    for flag in ('split', 'gin_file', 'gin_bindings'):
      if getattr(args, flag):
        name = 'gin' if flag == 'gin_bindings' else flag
        raise UserError(f'--{name} is of a source, but --pictures gives the pictures; drop one')
  if args.tfds_dir is not None and args.tfds is None:
    raise UserError('--tfds_dir needs --tfds NAME')
  if args.max_pictures is not None:
    checks.count('--max_pictures', args.max_pictures)
  evaluate_samples.check_network(args)
  networks = [name for name in lpips.NETWORKS if getattr(args, f'{name}_weights') is not None]
  if len(networks) > 1:
    raise UserError('--vgg16_weights and --alexnet_weights give LPIPS in two forms; drop one')
  if bool(networks) != (args.lpips_weights is not None):
    raise UserError(
      'LPIPS needs --lpips_weights FILE and one of --vgg16_weights FILE and --alexnet_weights FILE; give '
      'both or neither'
    )
  return networks[0] if networks else None

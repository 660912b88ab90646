"""`parti-jax import`: turns public weights of a part into a folder that all commands can use."""

from __future__ import annotations

import argparse
import math
import os

import flax.traverse_util
import tqdm

from parti_jax.exported_model import model_folder
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import vqgan


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument('part', choices=['tokenizer'], help='what the weights are of')
  parser.add_argument(
    'files',
    nargs='+',
    metavar='FILE',
    help='the weights: safetensors, Flax msgpack, npz or torch; a file, its shards or their folder',
  )
  parser.add_argument(
    '--format',
    required=True,
    choices=vqgan.FORMATS,
    help='the family of the weights, see docs/import.md; the files do not record it',
  )
  parser.add_argument('--output_dir', required=True, metavar='FOLDER', help='the folder to write')
  parser.add_argument(
    '--overwrite', action='store_true', help='replace an existing tokenizer folder there'
  )
  parser.add_argument(
    '--image_size',
    type=int,
    default=256,
    metavar='PIXELS',
    help='height and width of the images to encode and decode (default: %(default)s)',
  )
  parser.add_argument(
    '--pixel_range',
    type=float,
    nargs=2,
    metavar=('BLACK', 'WHITE'),
    help="what black and white are to the network (default: the format's)",
  )
  parser.add_argument(
    '--dtype',
    choices=sorted(model_folder.STORED_DTYPES),
    default='float32',
    help='dtype of the stored parameters (default: %(default)s)',
  )
  parser.add_argument(
    '--source',
    metavar='TEXT',
    help='where the weights come from, such as a URL; kept in the folder',
  )
  parser.add_argument('--licence', metavar='TEXT', help='their licence; kept in the folder')


def run(args: argparse.Namespace) -> int:
  """Writes the folder; returns the exit status."""
  model_folder.check_target(args.output_dir, args.overwrite)
  weights = files.open_weights(args.files)
  pixel_range = tuple(args.pixel_range) if args.pixel_range else None
  config = vqgan.config_of(weights.arrays, args.format, args.image_size, pixel_range)
  sources = vqgan.key_map(config, weights.arrays, args.format)
  expected = vqgan.expected(config)
  key_map.check(
    sources,
    weights.arrays,
    expected,
    ', '.join(args.files),
    vqgan.ignored(weights.arrays, args.format),
  )
  converted = key_map.convert(sources, weights.arrays)
  params = dict(tqdm.tqdm(converted, 'reading', len(sources), unit='array', disable=None))
  provenance = {
    'source': args.source,
    'licence': args.licence,
    'format': args.format,
    'files': [os.path.basename(file) for file in weights.files],
    'sha256': weights.digest(),
  }
  folder = model_folder.save_tokenizer(
    args.output_dir,
    config,
    flax.traverse_util.unflatten_dict(params, sep='/'),
    {'tokenizer': {name: value for name, value in provenance.items() if value}},
    dtype=args.dtype,
    overwrite=args.overwrite,
  )
  rows, columns = config.grid
  count = sum(math.prod(shape) for shape in expected.values())
  print(
    f'{folder}: an image tokenizer of {count:,} parameters, {config.codebook_size:,} codes, '
    f'{rows}×{columns} tokens for images of {config.image_size}×{config.image_size} pixels; '
    f'use it as --tokenizer={folder} of `parti-jax tokenize` and `parti-jax export`'
  )
  return 0

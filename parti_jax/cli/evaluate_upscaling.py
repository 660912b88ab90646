"""`parti-jax evaluate_upscaling`: compares super-resolution with bicubic enlargement."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pathlib
import sys
from typing import Any

import tqdm

from parti_jax.cli import model_flags
from parti_jax.cli import sampling_flags
from parti_jax.core import gin_config
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.evaluation import upscaling_report


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  gin_config.add_gin_arguments(parser)
  model_flags.add_model(parser)
  model_flags.add_replacement(parser, 'upscaler')
  parser.add_argument(
    '--source',
    metavar='NAME',
    help='source of the pictures: openmoji, folder, tfrecord or webdataset (default: '
    'the one in the gin files, or openmoji without any)',
  )
  parser.add_argument(
    '--split', default='validation', help='split of the source (default: %(default)s)'
  )
  parser.add_argument(
    '--max_pictures', type=int, metavar='N', help='use only the first N pictures (default: all)'
  )
  parser.add_argument(
    '--output_dir',
    default='evaluation_upscaling',
    metavar='DIR',
    help='output folder of report.json and sheet.png (default: %(default)s)',
  )


def run(args: argparse.Namespace) -> int:
  """Measures, prints the table, and writes it and a sheet of pictures.

  Returns:
    0, the exit status.

  Raises:
    UserError: bad flags, a model without super-resolution, data that can't be read, or a folder
      that can't be written.
  """
  # Registers everything that gin files may name.
  from parti_jax.data import datasets
  from parti_jax.sampling import text_to_image  # noqa: F401

  sampling_flags.check_numbers(args, 'max_pictures')
  gin_config.parse(args.gin_file, args.gin_bindings)
  source = args.source or (None if args.gin_file else 'openmoji')
  model = model_flags.load(args)
  if model.upscaler is None:
    raise UserError(
      f'the model {model.model_name} has no super-resolution; '
      '`parti-jax export --base=FOLDER --super_resolution=RUN` adds it, and --upscaler=FOLDER '
      'measures another'
    )
  size = image_sizes.square(model.image_size, 'parti-jax evaluate_upscaling compares')
  size *= model.upscaler.factor
  examples: Any = datasets.pictures_and_captions(source, args.split, size)
  with contextlib.closing(examples):
    pictures = itertools.islice((picture for _, picture in examples), args.max_pictures)
    bar = tqdm.tqdm(pictures, desc=args.split, unit='picture', disable=not sys.stderr.isatty())
    report, sample = upscaling_report.evaluate(model, iter(bar))
  print(report.text())
  for path in _write(pathlib.Path(args.output_dir), report, sample):
    print(path)
  return 0


def _write(folder: pathlib.Path, report, sample) -> list[pathlib.Path]:
  """Writes the report and the sheet; returns the files."""
  paths = [folder / 'report.json', folder / 'sheet.png']
  try:
    folder.mkdir(parents=True, exist_ok=True)
    paths[0].write_text(json.dumps(report.json(), indent=2) + '\n', encoding='utf-8')
    upscaling_report.sheet(sample).save(paths[1], optimize=True)
  except OSError as error:
    raise UserError(
      f'--output_dir {folder}: cannot be written ({error.strerror or error})'
    ) from error
  return paths

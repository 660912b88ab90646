"""`parti-jax batch`: shows a batch that a run's log names, such as that of a skipped step."""

from __future__ import annotations

import argparse
import pathlib

import numpy as np

from parti_jax.core import errors
from parti_jax.core import gin_config


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax batch`."""
  gin_config.add_gin_arguments(parser)
  parser.add_argument(
    '--model_dir',
    metavar='RUN',
    help="the run's folder; its gin values are used unless --gin_file is given",
  )
  parser.add_argument(
    '--place',
    required=True,
    nargs='+',
    metavar='PLACE',
    help='the batches, in the form SHARE/SHARES:EPOCH:TAKEN+COUNT of the log',
  )
  parser.add_argument(
    '--output_dir',
    metavar='FOLDER',
    help='folder to write each batch to as PLACE.npz, and its pictures as PLACE.png',
  )


def run(args: argparse.Namespace) -> int:
  """Prints the captions and arrays of batches, and writes them; returns the exit status."""
  if not args.gin_file and not args.model_dir:
    raise errors.UserError("give --model_dir=RUN or the run's --gin_file")
  from parti_jax.data import shared_batches
  from parti_jax.training import config as config_lib
  from parti_jax.training import configurables  # noqa: F401

  places = [shared_batches.Place.parse(place) for place in args.place]
  gin_config.parse(args.gin_file or [f'{args.model_dir}/config.gin'], args.gin_bindings)
  config = config_lib.configured()
  lengths = config.objective.feature_lengths()
  for place in places:
    batch = shared_batches.read(place, config.task, config.split, lengths, config.seed)
    print(f'{place} of {config.task}, {config.split}')
    for line in describe(batch, config.task, lengths):
      print(f'  {line}')
    if args.output_dir:
      print(f'  written: {", ".join(map(str, write(batch, place, args.output_dir)))}')
  return 0


def describe(batch: dict[str, np.ndarray], task: str, lengths: dict[str, int]) -> list[str]:
  """Returns lines about a batch's arrays and captions.

  Args:
    batch: the result of `shared_batches.read`.
    task: name of its seqio task.
    lengths: lengths of the task's features.
  """
  from parti_jax.data import datasets
  from parti_jax.data import mixtures

  lines = [
    f'{name}: {values.dtype} {list(values.shape)}, {values.min():g} to {values.max():g}'
    for name, values in batch.items()
  ]
  if 'encoder_input_tokens' not in batch:
    return lines
  if datasets.is_ours(task) or mixtures.is_one(task):
    decode = datasets.get_vocabulary().decode
  else:
    from parti_jax.data import tasks

    decode = tasks.get_task(task).output_features['inputs'].vocabulary.decode
  return lines + [
    f'example {index}: {decode(ids)!r}'
    for index, ids in enumerate(batch['encoder_input_tokens'].tolist())
  ]


def write(batch: dict[str, np.ndarray], place, folder) -> list[pathlib.Path]:
  """Writes a batch's arrays and, if it has pictures, a grid of them.

  Args:
    batch: the result of `shared_batches.read`.
    place: the batch's Place, for the names of the files.
    folder: the output folder, created if it does not exist.

  Returns:
    The paths of the files.

  Raises:
    UserError: if the folder can't be written.
  """
  from PIL import Image

  from parti_jax.training import reporting

  name = str(place).translate(str.maketrans('/:', '__'))
  file = pathlib.Path(folder) / f'{name}.npz'
  try:
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **batch)  # type: ignore[arg-type]  # None is named allow_pickle.
    if 'images' not in batch:
      return [file]
    Image.fromarray(reporting.tile(batch['images'])).save(file.with_suffix('.png'))
  except OSError as error:
    raise errors.UserError(
      f'--output_dir {folder}: cannot be written ({error.strerror or error}); choose another folder'
    ) from error
  return [file, file.with_suffix('.png')]

"""`parti-jax upscale`: enlarges picture files with a super-resolution network."""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
from collections.abc import Iterable

import numpy as np
import tqdm
from jaxtyping import UInt8

from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.sampling import images as images_lib

# Other programs, and Pillow, refuse to open pictures of many more pixels.
_MOST_PIXELS = 1 << 27
_DIGITS = 16


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the command's flags."""
  parser.add_argument(
    'files', nargs='+', metavar='FILE', help='a picture: PNG, JPEG, WebP or the first one of a GIF'
  )
  parser.add_argument(
    '--output_dir',
    required=True,
    metavar='DIR',
    help='output folder; a.jpg becomes a_x4.png there, unless that already exists',
  )
  which = parser.add_mutually_exclusive_group()
  which.add_argument(
    '--model',
    metavar='PATH',
    help='an exported model whose super-resolution to use (default: the demo model in the package)',
  )
  which.add_argument(
    '--upscaler',
    metavar='PATH',
    help='a folder with a super-resolution alone, such as a Real-ESRGAN that `parti-jax import` wrote',
  )


def run(args: argparse.Namespace) -> int:
  """Enlarges the pictures that the folder lacks, and prints the file names.

  All files are checked before the first one is enlarged. After an interruption, the same command
  resumes with the picture at which it stopped.

  Returns:
    0, the exit status.

  Raises:
    UserError: a file that is missing, no picture or too large; two files with the same name; a
      folder that has another file of that name or can't be written; no super-resolution.
  """
  folder = images_lib.local_folder(args.output_dir)
  if folder.exists() and not folder.is_dir():
    raise UserError(f'--output_dir {folder} is a file; choose a folder')
  # Imports JAX, which takes a moment, so only after checking the flags.
  from parti_jax.core import compilation_cache
  from parti_jax.exported_model import model_folder
  from parti_jax.sampling import placement
  from parti_jax.sampling import text_to_image
  from parti_jax.sampling import upscaling

  names = _names(args.files)
  source = args.upscaler or args.model or text_to_image.DEMO_FOLDER
  part = model_folder.load_part('super_resolution', source)
  of_network = {
    'upscaled': str(part.config.factor),
    'upscaler': fingerprints.of_parameters(part.params),
  }
  missing, finished = [], 0
  for file, name in names.items():
    _, metadata = _read(file, part.config.factor)
    path = folder / f'{name}_x{part.config.factor}.png'
    if not os.path.lexists(path):
      missing.append(file)
    elif images_lib.is_saved(path, metadata | of_network):
      finished += 1
    else:
      raise UserError(
        f'{path} exists, and is not {file} enlarged by this network; choose another --output_dir'
      )
  if finished:
    print(f'{finished:,} of {len(names):,} pictures are in {folder} already')
  if not missing:
    return 0
  compilation_cache.enable()
  upscaler = upscaling.Upscaler(part.config, part.params, placement.Placement())
  for file in tqdm.tqdm(missing, desc='enlarging', unit='picture', disable=None):
    picture, metadata = _read(file, upscaler.factor)
    enlarged = images_lib.to_pil(upscaler(picture[None])[0])
    path = images_lib.save(folder, names[file], enlarged, metadata | of_network)
    tqdm.tqdm.write(str(path))  # Prints above the bar.
  return 0


def _names(files: Iterable[str]) -> dict[str, str]:
  """Returns {file: name of its result}; raises UserError if two files have the same."""
  owners: dict[str, str] = {}
  names = {}
  for file in dict.fromkeys(files):
    storage.check_local(file)
    if os.path.isdir(file):
      raise UserError(f'{file} is a folder; give picture files, such as {file}/*.png')
    name = names[file] = pathlib.Path(file).stem
    # Some file systems compare names without their case.
    other = owners.setdefault(name.casefold(), file)
    if other != file:
      raise UserError(
        f'{other} and {file} would both be written as {name}; enlarge them into two folders'
      )
  return names


def _read(file: str, factor: int) -> tuple[UInt8[np.ndarray, 'height width 3'], dict[str, str]]:
  """Reads a picture; returns it, and the text chunks of its own file with what identifies it.

  Raises:
    UserError: if it is missing, no picture, or too large.
  """
  from parti_jax.data import image_decoding
  from parti_jax.data.undecodable import UndecodablePicture

  try:
    image, _ = image_decoding.decode_whole(storage.read(file, image_decoding.MAX_BYTES))
  except OSError as error:
    raise UserError(f'{file}: cannot read it ({error.strerror or error})') from error
  except UndecodablePicture as error:
    raise UserError(f'{file}: {error}; give PNG, JPEG, WebP or GIF files') from error
  width, height = (factor * side for side in image.size)
  if width * height > _MOST_PIXELS:
    raise UserError(
      f'{file}: {width:,}×{height:,} pixels would be more than the {_MOST_PIXELS:,} of a file; cut '
      'the picture into parts'
    )
  picture = np.asarray(image)
  kept = images_lib.read_metadata(file) or {}
  digest = hashlib.sha256(f'{picture.shape}'.encode() + picture.tobytes()).hexdigest()[:_DIGITS]
  return picture, kept | {'picture': os.path.basename(file), 'picture_pixels': digest}

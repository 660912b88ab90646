"""The parts whose public weights `parti-jax import` reads, and how their files are opened.

PARTS is the table of them. A new part or format is one entry of a module of `import_formats`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import flax.traverse_util

from parti_jax.cli.import_formats import formats
from parti_jax.cli.import_formats import generators
from parti_jax.cli.import_formats import rankers
from parti_jax.cli.import_formats import text_encoders
from parti_jax.cli.import_formats import tokenizers
from parti_jax.cli.import_formats import upscalers
from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.models import image_tokenizers

# Share of the first file in an interpolation; the default of Real-ESRGAN's script.
DENOISE_STRENGTH = 0.5
PARTS: Mapping[str, formats.Part] = {
  'generator': generators.PART,
  'tokenizer': tokenizers.PART,
  'ranker': rankers.PART,
  'text_encoder': text_encoders.PART,
  'super_resolution': upscalers.PART,
}
FORMATS = tuple(dict.fromkeys(name for part in PARTS.values() for name in part.formats))


def find(args: argparse.Namespace) -> formats.Format:
  """Returns the format that the flags name.

  Raises:
    UserError: if the format is of another part, or a flag doesn't apply to it.
  """
  choices, name = PARTS[args.part].formats, args.part.replace('_', ' ')
  if args.format not in choices:
    raise UserError(
      f'--format={args.format} is not a format of a {name}: choose from {", ".join(choices)}'
    )
  found = choices[args.format]
  for flag in formats.FLAGS:
    if getattr(args, flag) is not None and flag not in found.flags:
      raise UserError(f'--{flag} does not apply to --format={args.format}')
  if found.tokenizer and found.tokenizer.default is None and args.vocabulary is None:
    raise UserError(
      f"--vocabulary is required: the file of the {name}'s text tokenizer, {found.tokenizer.files}"
    )
  if 'tokenizer' in found.flags and args.tokenizer is None:
    raise UserError(
      "--tokenizer is required: the generator's image tokenizer, a folder that `parti-jax import "
      f'tokenizer` wrote, or its weights of the format {found.image_tokenizer}'
    )
  return found


def open_files(args: argparse.Namespace, found: formats.Format) -> formats.Given:
  """Opens the files that the flags name.

  Raises:
    UserError: if a file is missing, damaged or of another format.
  """
  weights = found.open(args.files)
  if args.interpolate_with is not None:
    share = DENOISE_STRENGTH if args.denoise_strength is None else args.denoise_strength
    if not 0 <= share <= 1:
      raise UserError(f'--denoise_strength={share} must lie in [0, 1]')
    weights = files.interpolated(weights, files.open_weights([args.interpolate_with]), share)
  elif args.denoise_strength is not None:
    raise UserError('--denoise_strength needs --interpolate_with=FILE, the weights for 0')
  config = _json_file(args.config, found.config_file, weights)
  name = 'preprocessor_config.json' if 'preprocessor' in found.flags else None
  preprocessor = _json_file(args.preprocessor, name, weights)
  flags = {flag: getattr(args, flag) for flag in formats.FLAGS}
  given = formats.Given(weights, args.format, flags, config, preprocessor)
  if args.tokenizer is None:
    return given
  return dataclasses.replace(given, image_tokenizer=_image_tokenizer(args.tokenizer, found, given))


def _image_tokenizer(
  path: str, found: formats.Format, generator: formats.Given
) -> formats.ImageTokenizer:
  """Opens the image tokenizer of a generator: of our folder, or weights of its format."""
  if storage.exists(storage.join(path, model_folder.parameter_file('tokenizer'))):
    if generator.flags['image_size'] is not None:
      raise UserError(f'--image_size is for weights; {path} says it for itself')
    part = model_folder.load_part('tokenizer', path)
    # The arrays don't show how many rows and columns their tokens fill.
    image_sizes.square(part.config.image_size, f'--tokenizer={path}: published generators draw')
    origin = model_folder.part_provenance('tokenizer', path)
    fingerprint = part.made_with.get('tokenizer') or _fingerprint(part.config, part.params)
    return formats.ImageTokenizer(part.config, part.params, origin, fingerprint)
  storage.check_local(path)
  assert found.image_tokenizer is not None
  weights = files.open_weights([path])
  given = dataclasses.replace(
    generator, weights=weights, file_format=found.image_tokenizer, config=None
  )
  network = opened('tokenizer', PARTS['tokenizer'].formats[given.file_format], given)
  params, origin = network.params(), {'tokenizer': origin_of(given)}
  return formats.ImageTokenizer(
    network.config, params, origin, _fingerprint(network.config, params)
  )


def _fingerprint(config: Any, params: Any) -> str:
  return fingerprints.of_tokenizer(params, image_tokenizers.token_settings(config))


class Opened(NamedTuple):
  """A network in files of weights, of which the names and shapes of all arrays are checked.

  Attributes:
    config: its config.
    sources: {path of a parameter: the arrays that make it}.
    stored: {name: array in the files}.
    size: number of values of its parameters.
    others: the result of `Format.others`.
  """

  config: Any
  sources: key_map.KeyMap
  stored: Mapping[str, key_map.StoredArray]
  size: int
  others: Mapping[str, Any] = {}

  def params(self, progress: Callable[[], object] = lambda: None) -> dict[str, Any]:
    """Returns the tree of parameters, each of which is read when it is used.

    Memory then holds one at a time.

    Args:
      progress: is called when a parameter has been read.
    """
    found = key_map.convert(self.sources, self.stored, progress)
    return flax.traverse_util.unflatten_dict(found, sep='/') | dict(self.others)


def opened(part: str, found: formats.Format, given: formats.Given) -> Opened:
  """Finds a network in files of weights.

  Args:
    part: its name in `model_folder.NETWORKS`.
    found: the format of the files.
    given: the files.

  Raises:
    UserError: if the files don't hold such a network, naming what is missing or left over.
  """
  config = found.config_of(given)
  sources = found.key_map(given, config)
  shapes = parameter_files.shapes(model_folder.abstract(part, config))
  where, others = ', '.join(map(str, given.weights.files)), found.others(given, config)
  own = {path: shape for path, shape in shapes.items() if path.partition('/')[0] not in others}
  key_map.check(sources, given.arrays, own, where, tuple(found.ignored(given)))
  count = sum(map(math.prod, shapes.values()))
  return Opened(config, sources, given.arrays, count, others)


def origin_of(given: formats.Given) -> dict[str, Any]:
  """Returns what a folder keeps about files of weights."""
  return {
    'format': given.file_format,
    'files': [os.path.basename(file) for file in given.weights.files],
    'sha256': given.weights.digest(),
  }


def _json_file(
  path: str | None, name: str | None, weights: files.Weights
) -> Mapping[str, Any] | None:
  """Reads a JSON file: the given one, or the one of this name next to the weights."""
  if path is None and name is not None:
    path = os.path.join(os.path.dirname(weights.files[0]), name)
    if not os.path.isfile(path):
      return None
    print(f'parti-jax: using {path}', file=sys.stderr)
  if path is None:
    return None
  try:
    found = storage.read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(f'{path} cannot be read ({error})') from error
  if not isinstance(found, dict):
    raise UserError(f'{path} is {checks.shown_as_json(found)} instead of a JSON object')
  return found

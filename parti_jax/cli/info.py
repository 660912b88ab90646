"""`parti-jax info`: describes a folder, a run with its history or an exported model."""

from __future__ import annotations

import argparse
import json
import math
from typing import Any

from parti_jax.cli import info_text
from parti_jax.core import checks
from parti_jax.core import image_sizes
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names
from parti_jax.runs import run_summary

_LARGEST = 1 << 24
# A run's folder has at least one of these from its first minute on.
_OF_A_RUN = ('checkpoints', 'journal', 'config.gin')


def add_arguments(parser: argparse.ArgumentParser):
  """Adds the flags of `parti-jax info`."""
  parser.add_argument(
    'folder',
    help='folder of a run (the --model_dir of `train`) or of an '
    'exported model (the --model of `generate`), a path or a URL',
  )
  parser.add_argument(
    '--verify',
    action='store_true',
    help='read all files of the checkpoints to check that they are whole, instead of only '
    'comparing their sizes',
  )
  parser.add_argument('--json', action='store_true', help='print everything as JSON')


def run(args: argparse.Namespace) -> int:
  """Prints a description of a folder; returns the exit status."""
  found = describe(args.folder, args.verify)
  if args.json:
    print(json.dumps(found, indent=2, ensure_ascii=False))
  else:
    print('\n'.join(info_text.run(found) if found['kind'] == 'run' else info_text.model(found)))
  return 0


def describe(folder: str, verify: bool = False) -> dict[str, Any]:
  """Returns a description of a folder as a JSON-compatible dict.

  Args:
    folder: a path or a URL.
    verify: whether to read a run's checkpoints.

  Returns:
    For a run, the result of `run_summary.summarize`. For a model: kind, 'model'; folder; parts,
    {name of a network: {'parameters', 'bytes', 'sizes'}}; alone, the name of the network of a
    folder that `parti-jax import` wrote, else None; picture_size and upscaled_size in
    pixels, a pair of height and width if the pictures aren't square, the latter None without
    super-resolution; image_tokens of a picture, None if unknown; vocabulary, {'ids', 'bytes'}, where
    ids is None if the config doesn't state it; stored_as, the parameters' dtype; sampling, the defaults
    of `generate`; provenance; missing, the missing files. What a network alone doesn't have is None.

  Raises:
    UserError: if the folder can't be read, or is neither; says what it is instead, if known.
  """
  if not storage.is_folder(folder):
    what = 'a file' if storage.exists(folder) else 'does not exist'
    raise UserError(f'{folder}: {what}; give the folder of a run or of an exported model')
  names = storage.names(folder)
  if any(name in names for name in _OF_A_RUN):
    return run_summary.summarize(folder, verify)
  if file_names.CONFIG_FILE in names:
    return _model(folder, names)
  raise UserError(f'{folder}: {_what_else(folder, names)}')


def _what_else(folder: str, names: list[str]) -> str:
  """Returns a text that says what a folder is instead of a run or a model, and what to give."""
  if 'state' in names and 'model' in names:
    return 'one checkpoint; give the folder of its run, two above'
  if storage.name(folder) == 'checkpoints' and all(name[:1].isdigit() for name in names):
    return 'the checkpoints of a run; give the folder above'
  if 'info.json' in names and any(name.endswith(('.array_record', '.tfrecord')) for name in names):
    what = 'image tokens' + _text_features(storage.join(folder, 'info.json'))
    return f"{what}, for --gin.token_cache.path, not a run; give a run's folder or a model's"
  return (
    f'neither a run ({", ".join(_OF_A_RUN)}) nor an exported model ({file_names.CONFIG_FILE}); '
    'give the --model_dir of `parti-jax train` or the folder that `parti-jax export` wrote'
  )


def _text_features(path: str) -> str:
  """Returns a text about the text features of a token cache; '' if it has none."""
  try:
    found = storage.read_json(path, _LARGEST).get('text_features')
    return (
      f' with text features ({found["width"]} in {found["dtype"]} for each of at most '
      f'{found["text_length"]} text tokens)'
    )
  except (ValueError, AttributeError, LookupError, TypeError):
    return ''


def _model(folder: str, names: list[str]) -> dict[str, Any]:
  path = storage.join(folder, file_names.CONFIG_FILE)
  config = _ModelConfig(path)
  counts = dict(config.entries('parameters'))
  stored_as = counts.pop('stored_as', None)
  bytes_of = storage.sizes(folder)
  parts = {
    name: {
      'parameters': config.number('parameters', name, least=0),
      'bytes': bytes_of.get(file_names.parameter_file(name)),
      'sizes': config.entries(name),
    }
    for name in counts
  }
  alone = next(iter(parts)) if len(parts) == 1 else None
  files = {name: file_names.parameter_file(name) for name in parts}
  own = {name: file_names.vocabulary_file(name) for name in parts if config.own_tokenizer(name)}
  pictured = 'tokenizer' if 'tokenizer' in parts else alone
  size = factor = tokens = None
  if pictured and 'image_size' in config.entries(pictured):
    size = config.image_size(pictured)
  if size and 'tokenizer' in parts:
    tokens = config.image_tokens()
  if 'super_resolution' in parts:
    factor = config.factor()
  reader = alone or config.stored_name('generator')
  text_file = own.get(alone) if alone else file_names.VOCABULARY_FILE
  vocabulary = text_file and {
    'ids': config.text_ids(reader),
    'bytes': bytes_of.get(text_file),
  }
  needed = dict.fromkeys([*files.values(), *([text_file] if text_file else []), *own.values()])
  return {
    'kind': 'model',
    'folder': str(folder),
    'parts': parts,
    'alone': alone,
    'picture_size': size,
    'upscaled_size': image_sizes.times(size, factor) if size and factor else None,
    'image_tokens': tokens,
    'vocabulary': vocabulary,
    'stored_as': stored_as,
    'sampling': config.entries('sampling', {}),
    'provenance': config.entries('provenance', {}),
    'missing': [name for name in needed if name not in names],
  }


class _ModelConfig:
  """The shown entries of a model's config.json; reading all of it would need JAX.

  All methods raise UserError if an entry is missing or has another type.
  """

  def __init__(self, path: str):
    self._path = path
    try:
      self._config = storage.read_json(path, _LARGEST)
    except ValueError as error:
      raise self._damaged(f'({error})') from error
    if not isinstance(self._config, dict):
      raise self._damaged('(not an object)')

  def image_tokens(self) -> int | None:
    """Returns the number of tokens of a picture; None if nothing here says it."""
    sizes = self.entries('tokenizer')
    kind = sizes.get('kind', 'vit_vqgan')
    if kind in ('vit_vqgan', 'enhancing_vit_vqgan'):
      side = self.number('tokenizer', 'patch_size')
    elif kind == 'vqgan':
      if not isinstance(levels := sizes.get('multipliers'), list):
        raise self._damaged("(no list 'multipliers' in 'tokenizer')")
      side = 2 ** (len(levels) - 1)
    else:  # A user's kind, whose generator has the same grid.
      grid = self.entries(self.stored_name('generator'), {}).get('grid')
      if grid is not None and not (
        isinstance(grid, list) and all(isinstance(sides, int) for sides in grid)
      ):
        raise self._damaged("('grid' of the generator is not a list of numbers)")
      return math.prod(grid) if grid else None
    return math.prod(whole // side for whole in image_sizes.sides(self.image_size('tokenizer')))

  def factor(self) -> int | None:
    """Returns the factor of upscaling; None if a user's kind of network doesn't state it."""
    sizes = self.entries('super_resolution')
    stated = 'factor' in sizes or 'kind' not in sizes
    return self.number('super_resolution', 'factor') if stated else None

  def text_ids(self, name: str) -> int | None:
    """Returns the number of text token ids of a network; None if its config doesn't state it."""
    sizes = self.entries(name)
    if isinstance(sizes.get('text_encoder'), dict):  # Of the generator; it replaces the field.
      sizes = sizes['text_encoder']
    if 'text_vocabulary' not in sizes and 'kind' in sizes:  # Such as a generator of classes.
      return None
    return checks.whole_number(
      f'{self._path}: {name}.text_vocabulary',
      sizes.get('text_vocabulary'),
      1,
      show=checks.shown_as_json,
    )

  def own_tokenizer(self, name: str) -> bool:
    """Returns whether a network has a text tokenizer of its own."""
    return 'lower_case' in self.entries(file_names.inputs_entry(name), {})

  def stored_name(self, name: str) -> str:
    """Returns the name of a network in this file."""
    return file_names.stored_name(name, self._config)

  def entries(self, name: str, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns the object with a name."""
    if name not in self._config and default is not None:
      return default
    found = self._config.get(name)
    if not isinstance(found, dict):
      raise self._damaged(f'({name!r} is {checks.shown_as_json(found)}, which is not an object)')
    return found

  def image_size(self, name: str) -> image_sizes.ImageSize:
    """Returns the size of the pictures of a network."""
    return checks.typed(
      f'{self._path}: {name}.image_size',
      self.entries(name).get('image_size'),
      image_sizes.ImageSize,
      1,
      show=checks.shown_as_json,
    )

  def number(self, name: str, key: str, least: int = 1) -> int:
    """Returns a whole number from the object with a name."""
    return checks.whole_number(
      f'{self._path}: {name}.{key}', self.entries(name).get(key), least, show=checks.shown_as_json
    )

  def _damaged(self, why: str) -> UserError:
    return UserError(
      f'{self._path}: damaged, or not from an exported model {why}; give the folder '
      'that `parti-jax export` wrote'
    )

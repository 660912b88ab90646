"""The flags that name a model and what replaces its parts, shared by all commands that sample."""

from __future__ import annotations

import argparse
from typing import Any

import parti_jax
from parti_jax.cli import sampling_flags
from parti_jax.core import start_cache
from parti_jax.core.errors import UserError

# Flags that replace parts of the model -> what they give.
_REPLACEMENTS = {
  'ranker': "folder of a ranker to use instead of the model's, such as a CLIP that `parti-jax import` "
  'wrote',
  'upscaler': "folder of a super-resolution to use instead of the model's, such as a Real-ESRGAN that "
  '`parti-jax import` wrote',
}
# These flags -> the network that they replace, by its name in a model folder.
_NETWORKS = {'ranker': 'ranker', 'upscaler': 'super_resolution'}


def add_model(parser: argparse.ArgumentParser) -> None:
  """Adds --model; the default is None."""
  parser.add_argument(
    '--model', metavar='PATH', help='an exported model (default: the demo model in the package)'
  )


def add_replacement(parser: argparse.ArgumentParser, name: str) -> None:
  """Adds --ranker or --upscaler, as `name` says; the default is None."""
  parser.add_argument(f'--{name}', metavar='PATH', help=_REPLACEMENTS[name])


def add_arguments(parser: argparse.ArgumentParser) -> None:
  """Adds --model, --lora, --ranker and --upscaler."""
  add_model(parser)
  parser.add_argument(
    '--lora',
    action='append',
    default=[],
    metavar='FILE[:FACTOR]',
    help='adapters to add to the model that they were trained on, as `parti-jax export --no-merge` '
    'writes them; may be given several times',
  )
  for name in _REPLACEMENTS:
    add_replacement(parser, name)


def load(args: argparse.Namespace):
  """Loads the model that the flags name, with the cache that makes the next start faster.

  Args:
    args: the flags. Those that the command doesn't have keep their defaults.

  Raises:
    UserError: if the model or a replacement can't be loaded; names the flag of a replacement that its
      folder doesn't have.
  """
  for name in _REPLACEMENTS:
    if (folder := getattr(args, name, None)) is not None:
      _check_replacement(name, folder)
  start_cache.enable()
  given: dict[str, Any] = {
    name: getattr(args, name) for name in ('lora', *_REPLACEMENTS) if hasattr(args, name)
  }
  if hasattr(args, 'weights'):
    given |= sampling_flags.given_precision(args)
  # Imports JAX, which takes a moment; commands check their other flags first.
  return parti_jax.load(args.model, **given)


def _check_replacement(name: str, folder: str) -> None:
  """Raises UserError, with the flag, unless a folder has the network; reads only its config.json."""
  from parti_jax.exported_model import model_folder

  try:
    model_folder.part_config(_NETWORKS[name], folder)
  except UserError as error:
    raise UserError(f'--{name}={folder}: {error}') from error

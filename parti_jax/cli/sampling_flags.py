"""The flags of SamplingSettings, shared by all commands that sample."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

from parti_jax.core import checks
from parti_jax.exported_model import sampling_settings

_DEFAULTS = sampling_settings.SamplingSettings()
_DEFAULT_PRECISION = 'float'


def add_arguments(
  parser: argparse.ArgumentParser | argparse._ArgumentGroup, default: str = "the model's"
):
  """Adds a flag for each field of SamplingSettings; the default is None.

  Args:
    parser: parser of a command, or a group of its arguments.
    default: description of the default, for the help.
  """

  def add(name, kind, text, **more):
    parser.add_argument(f'--{name}', type=kind, help=f'{text} (default: {default})', **more)

  add('guidance_scale', float, 'how closely to follow the prompt; 1 disables guidance')
  add(
    'guidance_ramp',
    str,
    'how the scale changes from the first image token to the last: '
    + ', '.join(sampling_settings.GUIDANCE_RAMPS),
    metavar='NAME',
  )
  add('guidance_start', float, 'the scale at the first token of a ramp')
  add(
    'exit_threshold',
    float,
    'skip the remaining decoder layers at this confidence in a token; 1 skips none',
  )
  add(
    'guidance_skip_threshold',
    float,
    "skip guidance's pass without text at this confidence in a token; 1 never skips it",
  )
  add(
    'speculative_window',
    int,
    'number of drafted tokens that a pass of the decoder checks; 0 samples one token at a time',
  )
  add(
    'speculative_drafts',
    str,
    'drafts at new positions: ' + ', '.join(sampling_settings.SPECULATIVE_DRAFTS),
    metavar='NAME',
  )
  add(
    'speculative_rule',
    str,
    "accept drafts by the paper's ratio of probabilities, or only those that equal the tokens of "
    'sampling one at a time: ' + ', '.join(sampling_settings.SPECULATIVE_RULES),
    metavar='NAME',
  )
  add(
    'temperature',
    float,
    '1 samples from the learned distribution, lower values are safer, 0 selects the likeliest',
  )
  add('top_k', int, 'sample from this many of the likeliest tokens; 0 disables the limit')
  add(
    'top_p',
    float,
    'sample from the likeliest tokens that together have this probability; 1 disables the limit',
  )


def check_numbers(args: argparse.Namespace, *counts: str):
  """Checks numeric flags that commands have in common, before anything slow happens.

  Args:
    args: the flags. `seed` is checked if it exists.
    *counts: names of flags with counts; their value is None if not given.

  Raises:
    UserError: if a value is invalid; the message names the flag.
  """
  for name in counts:
    if getattr(args, name) is not None:
      checks.count(f'--{name}', getattr(args, name))
  if hasattr(args, 'seed'):
    checks.whole_number('--seed', args.seed, 0, sampling_settings.LARGEST_SEED)


def given(args: argparse.Namespace) -> dict:
  """Returns the fields of SamplingSettings by name, None if their flag was not given.

  Raises:
    UserError: if a value is invalid; the message names it.
  """
  values = {field.name: getattr(args, field.name) for field in dataclasses.fields(_DEFAULTS)}
  _DEFAULTS.replace(**values)
  return values


def overriding(args: argparse.Namespace) -> dict[str, Any]:
  """Returns the fields of SamplingSettings whose flags were given, by name.

  Raises:
    UserError: if a value is invalid; the message names it.
  """
  return {name: value for name, value in given(args).items() if value is not None}


def add_precision(parser: argparse.ArgumentParser):
  """Adds --weights and --cache, which `parti_jax.load` takes; the defaults are None."""
  parser.add_argument(
    '--weights',
    metavar='NAME',
    help="how to hold the decoder's weights: float, or int8, which takes half of their memory on a "
    'GPU or TPU (default: float)',
  )
  parser.add_argument(
    '--cache',
    metavar='NAME',
    help='how to hold the keys and values of the text and of earlier image tokens: float, or int8, '
    'which takes half of their memory on a GPU or TPU (default: float)',
  )


def given_precision(args: argparse.Namespace) -> dict[str, Any]:
  """Returns the names that --weights and --cache give, without those of the defaults.

  Raises:
    UserError: if a name is unknown.
  """
  checks_of = {'weights': sampling_settings.check_weights, 'cache': sampling_settings.check_cache}
  given_names = {
    name: check(getattr(args, name))
    for name, check in checks_of.items()
    if getattr(args, name) is not None
  }
  return {name: value for name, value in given_names.items() if value != _DEFAULT_PRECISION}

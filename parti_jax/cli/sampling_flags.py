"""The flags of SamplingSettings, the same for every command that draws."""

from __future__ import annotations

import argparse
import dataclasses

from parti_jax.core import checks
from parti_jax.exported_model import sampling_settings as settings_lib

_DEFAULTS = settings_lib.SamplingSettings()


def add_arguments(parser: argparse.ArgumentParser, default: str = "the model's"):
  """Adds a flag for each field of SamplingSettings; None where it is not given.

  Args:
    parser: of a command.
    default: what the help says of a flag that is left out.
  """

  def add(name, kind, text, **more):
    parser.add_argument(f'--{name}', type=kind, help=f'{text} (default: {default})', **more)

  add('guidance_scale', float, 'how closely to follow the prompt; 1 is no guidance')
  add(
    'guidance_ramp',
    str,
    'how the scale gets there from the first image token to the last: '
    + ', '.join(settings_lib.GUIDANCE_RAMPS),
    metavar='NAME',
  )
  add('guidance_start', float, 'the scale at the first token, where there is a ramp')
  add(
    'exit_threshold',
    float,
    'skip the decoder layers that follow one that is as sure of a token as this; 1 skips none',
  )
  add(
    'guidance_skip_threshold',
    float,
    'skip the pass without text where the one with it is as sure of a token as this; 1 never does',
  )
  add(
    'temperature',
    float,
    '1 draws as the model has learned, less is safer, 0 is always the likeliest',
  )
  add('top_k', int, 'draw among this many of the likeliest tokens; 0 is no limit')
  add(
    'top_p', float, 'draw among the likeliest tokens with together this probability; 1 is no limit'
  )


def check_numbers(args: argparse.Namespace, *counts: str):
  """Checks the numbers of flags that commands have in common, before anything slow happens.

  Args:
    args: the flags. `seed` is checked where there is one.
    *counts: names of flags that say how many of something; None where they are not given.

  Raises:
    UserError: if a value is invalid; the message names the flag.
  """
  for name in counts:
    if getattr(args, name) is not None:
      checks.count(f'--{name}', getattr(args, name))
  if hasattr(args, 'seed'):
    checks.whole_number('--seed', args.seed, 0, settings_lib.LARGEST_SEED)


def given(args: argparse.Namespace) -> dict:
  """The fields of SamplingSettings by name, None where their flag was not given.

  Raises:
    UserError: if a value can't be; the message names it.
  """
  values = {field.name: getattr(args, field.name) for field in dataclasses.fields(_DEFAULTS)}
  _DEFAULTS.replace(**values)
  return values

"""Checks that the sizes in gin make a network, before anything is built from them."""

from __future__ import annotations

import dataclasses

from parti_jax import errors
from parti_jax.models import layer_stack

DTYPES = ('float32', 'bfloat16', 'float16')


def check(config):
  """Checks what every network's sizes have in common.

  Args:
    config: a dataclass of sizes, most with `dtype` and `remat`.

  Raises:
    UserError: if a number of something is not a whole number from 1, or if there is no such dtype
      or remat policy.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if field.type == 'int' and (not isinstance(value, int) or value < 1):
      raise errors.UserError(
          f'{_key(config, field.name)}={value!r} must be a whole number from 1')
  choices = {'dtype': DTYPES, 'remat': tuple(layer_stack.REMAT_POLICIES)}
  for name, known in choices.items():
    value = getattr(config, name, known[0])
    if value not in known:
      raise errors.UserError(f'{_key(config, name)}={value!r} is not one of {", ".join(known)}')


def check_divides(config, name: str, whole: str):
  """Raises UserError unless the value of `name` divides that of `whole`."""
  part, value = getattr(config, name), getattr(config, whole)
  if value % part:
    raise errors.UserError(f'{_key(config, name)}={part} does not divide {whole}={value}')


def _key(config, name: str) -> str:
  return f'{type(config).__name__}.{name}'

"""Checks the sizes of networks before anything is built from them.

A config states a network completely, so None doesn't stand for a default, and a null in a damaged
config.json is an error. Only a field whose type includes None takes it; its docstring says what it
means.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

import gin

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import image_sizes
from parti_jax.models.nn import layer_stack

# Settings of a network that may change while it keeps its parameters, since these keep their shapes
# and their meaning.
FREE_SETTINGS = ('dropout', 'dtype', 'remat', 'unroll', 'commitment', 'entropy_weight')
DTYPES = ('float32', 'bfloat16', 'float16')

# Upper limits; the 20B model has 64 layers and a width of 4096. Larger values are typing errors or
# come from a damaged file, and would only fail in the middle of a compilation.
MAX_LAYERS = 1024
MAX_SIZE = 2**20
_LAYERS = ('layers', 'blocks', 'heads')
_WHOLE_NUMBERS = (int, int | None, tuple[int, int], tuple[int, ...], image_sizes.ImageSize)

_Kind = TypeVar('_Kind', bound=type)


def configurable(kind: _Kind, name: str | None = None) -> _Kind:
  """Makes a dataclass configurable with gin, like `gin.configurable`.

  gin appends its chain of calls to the message of an error. Here, a UserError of the dataclass
  keeps its single line.

  Args:
    kind: the dataclass.
    name: its name in gin; the name of the class by default.
  """
  # Modules of users may be imported after gin files were read.
  with gin.unlock_config():
    wrapped: Any = gin.configurable(name)(kind)
  init = wrapped.__init__

  @functools.wraps(init)
  def with_own_errors(self, *args, **kwargs):
    message = None
    try:
      init(self, *args, **kwargs)
    except errors.UserError as error:
      message = gin_config.without_call_chain(error)
    if message is not None:
      raise errors.UserError(message)

  wrapped.__init__ = with_own_errors
  return wrapped


def check(config: Any) -> None:
  """Checks the sizes of a network against the types of their fields and against `bounds`.

  Converts lists to tuples, and NumPy scalars to Python numbers.

  Args:
    config: a dataclass of sizes; most have the fields `dtype` and `remat`.

  Raises:
    UserError: if a value has the wrong type or is out of bounds, or if the dtype or the remat
      policy is unknown.
  """
  check_fields(config, **bounds(type(config)))
  choices = {'dtype': DTYPES, 'remat': tuple(layer_stack.REMAT_POLICIES)}
  for name, known in choices.items():
    value = getattr(config, name, known[0])
    if value not in known:
      raise errors.UserError(
        f'{_key(config, name)}={checks.shown(value)} is not one of {", ".join(known)}'
      )


def kind_name(kinds: Mapping[str, type], config: Any) -> str | None:
  """Returns the name of the class of a config in {name: class}; None if it is not among them."""
  return next((name for name, kind in kinds.items() if type(config) is kind), None)


def bounds(kind: type) -> dict[str, tuple[float, float | None]]:
  """Returns the minimum and maximum of each numeric field of a dataclass of sizes.

  Integers lie between 1 and `most`. The dataclass defines the limits of other fields in BOUNDS.
  """
  return {
    name: (1, most(name))
    for name, annotation in checks.field_types(kind).items()
    if annotation in _WHOLE_NUMBERS
  } | getattr(kind, 'BOUNDS', {})


def most(name: str) -> int:
  """Returns the maximum of a size with this name."""
  return MAX_LAYERS if name.endswith(_LAYERS) else MAX_SIZE


def check_fields(config: Any, **limits: tuple[float | None, float | None]) -> None:
  """Checks and converts the fields of any dataclass that gin fills, like `check`.

  Args:
    config: the dataclass. Fields with a type that `checks.typed` doesn't support are not checked.
    **limits: minimum and maximum of a field; None for those of int32 or float32.

  Raises:
    UserError: if a value has the wrong type or is out of bounds.
  """
  of: type = type(config)
  for name, kind in checks.field_types(of).items():
    if kind in _WHOLE_NUMBERS:
      low, high = limits.get(name, (None, None))
      limits[name] = (
        -checks.LARGEST_INT32 - 1 if low is None else low,
        checks.LARGEST_INT32 if high is None else high,
      )
  checks.check_fields(config, _key(config, ''), limits)


def check_dropout(config: Any) -> None:
  """Raises UserError unless `dropout` lies in [0, 1)."""
  if not 0 <= config.dropout < 1:
    raise errors.UserError(f'{_key(config, "dropout")}={config.dropout} must lie in [0, 1)')


def check_image_length(config: Any, name: str) -> None:
  """Raises UserError if the field `name` leads to too many image tokens."""
  if config.image_length > MAX_SIZE:
    raise errors.UserError(
      f'{_key(config, name)}={getattr(config, name)} gives {config.image_length:,} image tokens; '
      f'the maximum is {MAX_SIZE:,}'
    )


def check_divides(config: Any, name: str, whole: str) -> None:
  """Raises UserError unless the field `name` divides the field `whole`, or each number of a pair."""
  part, value = getattr(config, name), getattr(config, whole)
  if any(number % part for number in image_sizes.sides(value)):
    raise errors.UserError(f'{_key(config, name)}={part} does not divide {whole}={value}')


def _key(config: Any, name: str) -> str:
  return f'{type(config).__name__}.{name}'

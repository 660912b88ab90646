"""Checks that the sizes in gin make a network, before anything is built from them."""

from __future__ import annotations

import functools

import gin

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.models.nn import layer_stack

DTYPES = ('float32', 'bfloat16', 'float16')

# The most that a network may have; the 20B model has 64 layers and a width of 4096. More is a slip,
# or a damaged file, and would only fail in the middle of a compilation.
MAX_LAYERS = 1024
MAX_SIZE = 2**20
_LAYERS = ('layers', 'blocks', 'heads')
_WHOLE_NUMBERS = (int, int | None, tuple[int, int], tuple[int, ...])


def configurable(kind: type, name: str | None = None) -> type:
  """Lets gin set the fields of a dataclass, as `gin.configurable` does.

  gin adds the calls it went through to the message of an error. A UserError of the dataclass keeps
  its one line.

  Args:
    kind: the dataclass.
    name: its name in gin; by default that of the class.
  """
  kind = gin.configurable(name)(kind)
  init = kind.__init__

  @functools.wraps(init)
  def with_own_errors(self, *args, **kwargs):
    message = None
    try:
      init(self, *args, **kwargs)
    except errors.UserError as error:
      message = gin_config.without_call_chain(error)
    if message is not None:
      raise errors.UserError(message)

  kind.__init__ = with_own_errors
  return kind


def check(config):
  """Checks the sizes of a network against the annotations of their fields and their `bounds`.

  Lists become tuples, and NumPy's numbers Python's.

  Args:
    config: a dataclass of sizes, most with `dtype` and `remat`.

  Raises:
    UserError: if a value is of another type than its field, or out of bounds, or if there is no
      such dtype or remat policy.
  """
  check_fields(config, **bounds(type(config)))
  choices = {'dtype': DTYPES, 'remat': tuple(layer_stack.REMAT_POLICIES)}
  for name, known in choices.items():
    value = getattr(config, name, known[0])
    if value not in known:
      raise errors.UserError(
        f'{_key(config, name)}={checks.shown(value)} is not one of {", ".join(known)}'
      )


def bounds(kind: type) -> dict[str, tuple[float, float | None]]:
  """Field -> the least and the most that its numbers may be, of a dataclass of sizes.

  Whole numbers are from 1 to `most`; for others the dataclass has BOUNDS.
  """
  return {
    name: (1, most(name))
    for name, annotation in checks.field_types(kind).items()
    if annotation in _WHOLE_NUMBERS
  } | getattr(kind, 'BOUNDS', {})


def most(name: str) -> int:
  """The most that a size of this name may be."""
  return MAX_LAYERS if name.endswith(_LAYERS) else MAX_SIZE


def check_fields(config, **limits: tuple[float | None, float | None]):
  """Checks the fields of any dataclass that gin fills, see `check`.

  Args:
    config: the dataclass. Fields whose annotation says no type that `checks.typed` knows are left
      as they are.
    **limits: field -> the least and the most that its numbers may be; None for those of an int32,
      or of a float32.

  Raises:
    UserError: if a value is of another type than its field, or out of bounds.
  """
  for name, kind in checks.field_types(type(config)).items():
    if kind in _WHOLE_NUMBERS:
      low, high = limits.get(name, (None, None))
      limits[name] = (
        -checks.LARGEST_INT32 - 1 if low is None else low,
        checks.LARGEST_INT32 if high is None else high,
      )
  checks.check_fields(config, _key(config, ''), limits)


def check_dropout(config):
  """Raises UserError unless `dropout` is a rate."""
  if not 0 <= config.dropout < 1:
    raise errors.UserError(f'{_key(config, "dropout")}={config.dropout} must lie in [0, 1)')


def check_image_length(config, name: str):
  """Raises UserError if the value of `name` gives more image tokens than there can be."""
  if config.image_length > MAX_SIZE:
    raise errors.UserError(
      f'{_key(config, name)}={getattr(config, name)} gives {config.image_length:,} image tokens, '
      f'and {MAX_SIZE:,} are the most'
    )


def check_divides(config, name: str, whole: str):
  """Raises UserError unless the value of `name` divides that of `whole`."""
  part, value = getattr(config, name), getattr(config, whole)
  if value % part:
    raise errors.UserError(f'{_key(config, name)}={part} does not divide {whole}={value}')


def _key(config, name: str) -> str:
  return f'{type(config).__name__}.{name}'

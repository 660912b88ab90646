"""Checks values that a user gives by flags, in gin, in a file or through Python.

Each function returns the value as the plain Python type requested, or raises UserError with one
line that begins with 'NAME=VALUE' and says what is expected.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
import os
import reprlib
import types
import typing
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError

# Largest finite values of the dtypes that accelerators use.
LARGEST_INT32 = 2**31 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38

_SEVERAL = {int: 'whole numbers', float: 'numbers', str: 'strings'}
_IN_WORDS = {2: 'two', 3: 'three', 4: 'four'}
# A float64 represents all integers up to this one.
_EXACT = 2**53
# NumPy's dtype kinds that aren't real numbers.
_NOT_REAL = 'cbmMOSU'
_LONGEST_SHOWN = 80


class _Repr(reprlib.Repr):
  """Shortens representations."""

  def __init__(self):
    super().__init__()
    self.maxlevel = 3
    self.maxstring = self.maxother = self.maxlong = 60


class _JsonRepr(_Repr):
  """Shortens representations and writes constants as JSON does."""

  def repr_NoneType(self, value, level):
    del value, level
    return 'null'

  def repr_bool(self, value, level):
    del level
    return 'true' if value else 'false'


_SHORT = _Repr()


def shown(value: Any, how: reprlib.Repr = _SHORT) -> str:
  """Returns a value's `repr` for a message: one line, truncated if it is long."""
  try:
    line = ' '.join(how.repr(value).split())
  except Exception:
    # The value may be anything; so may its __repr__. Python also refuses very long integers.
    line = f'<{type(value).__name__}>'
  return line if len(line) <= _LONGEST_SHOWN else f'{line[: _LONGEST_SHOWN - 3]}...'


def shown_as_json(value: Any) -> str:
  """Like `shown`, but writes None, True and False as JSON does."""
  return shown(value, _JsonRepr())


def whole_number(
  name: str,
  value: Any,
  least: float | None = None,
  most: float | None = None,
  *,
  show: Callable[[Any], str] = shown,
) -> int:
  """Checks an integer.

  Args:
    name: name of the argument, for the message.
    value: the value given. NumPy and JAX integers are accepted; booleans and floats aren't, even
      if they are whole.
    least: smallest number allowed, if any.
    most: largest number allowed, if any.
    show: formats the value for the message.

  Returns:
    The number.

  Raises:
    UserError: if the value is not a whole number, or is out of bounds.
  """
  try:
    whole = None if is_boolean(value) else operator.index(value)
  except TypeError:
    whole = None
  if whole is None or not _within(whole, least, most):
    hint = ''
    if (
      isinstance(value, float)
      and _within(value, least, most)
      and (abs(value) < _EXACT and value.is_integer())
    ):
      hint = f', such as {int(value)}'
    raise UserError(f'{name}={show(value)} must be a whole number{bounds_text(least, most)}{hint}')
  return whole


def count(name: str, value: Any) -> int:
  """Checks a number of things to make or read: from 1 to the largest int32."""
  return whole_number(name, value, 1, LARGEST_INT32)


def number(
  name: str,
  value: Any,
  least: float | None = None,
  most: float | None = None,
  *,
  show: Callable[[Any], str] = shown,
) -> float:
  """Checks a real number that is finite as a float32.

  Args:
    name: name of the argument, for the message.
    value: the value given. NumPy and JAX numbers are accepted; booleans and strings aren't.
    least: smallest number allowed, if any.
    most: largest number allowed, if any.
    show: formats the value for the message.

  Returns:
    The number.

  Raises:
    UserError: if the value is not a finite number, or is out of bounds.
  """
  real = _as_float(value)
  bounds = bounds_text(least, most)
  if real is None:
    raise UserError(f'{name}={show(value)} must be a number{bounds}')
  if not abs(real) <= LARGEST_FLOAT32:
    raise UserError(
      f'{name}={show(value)} is not a finite number in float32; it must be a number{bounds}'
    )
  if not _within(real, least, most):
    raise UserError(f'{name}={show(value)} must be a number{bounds}')
  return real


def boolean(name: str, value: Any, *, show: Callable[[Any], str] = shown) -> bool:
  """Checks a boolean, Python's or NumPy's."""
  if not is_boolean(value):
    raise UserError(f'{name}={show(value)} must be true or false')
  return bool(value)


def text(name: str, value: Any, *, show: Callable[[Any], str] = shown) -> str:
  """Checks a string; converts a path to one."""
  if isinstance(value, os.PathLike):
    value = os.fspath(value)
  if not isinstance(value, str):
    raise UserError(f'{name}={show(value)} must be a string')
  return str(value)


def texts(name: str, value: Any) -> list[str]:
  """Checks one string or several, such as prompts.

  Args:
    name: name of a single string, for the message, such as 'prompt'.
    value: a string, or any iterable of strings.

  Returns:
    The strings.

  Raises:
    UserError: if the value is something else, or a string can't be encoded as UTF-8.
  """
  if isinstance(value, str):
    value = [value]
  elif (
    isinstance(value, (bytes, Mapping))
    or not hasattr(value, '__iter__')
    or (getattr(value, 'shape', None) == ())
  ):
    raise UserError(f'{name}s={shown(value)} must be a string or a list of strings')
  found = []
  for position, item in enumerate(value, 1):
    if not isinstance(item, str):
      raise UserError(f'{name} {position} is {shown(item)}, which is not a string')
    try:
      item.encode()
    except UnicodeEncodeError:
      raise UserError(
        f'{name} {position} has characters that are not Unicode: {shown(item)}'
      ) from None
    found.append(str(item))
  return found


def bounded(**bounds: tuple[float | None, float | None]) -> Callable[[Any], Any]:
  """Returns a decorator that attaches bounds to a function, for `bounds_of` to return.

  Args:
    **bounds: parameter -> the smallest and largest value allowed, None for no bound.
  """

  def decorate(function):
    function.parameter_bounds = bounds
    return function

  return decorate


def bounds_of(function: Any) -> dict[str, tuple[float | None, float | None]]:
  """Returns the bounds that `bounded` attached to a function; {} for any other function."""
  return getattr(function, 'parameter_bounds', {})


def typed(
  name: str,
  value: Any,
  kind: Any,
  least: float | None = None,
  most: float | None = None,
  *,
  show: Callable[[Any], str] = shown,
) -> Any:
  """Checks a value against the type annotation of a dataclass field or a parameter.

  Args:
    name: name of the value, for the message.
    value: the value given.
    kind: int, float, bool, str; tuple[...] of these, for which lists are accepted too;
      `image_sizes.ImageSize`; Mapping[str, str]; a dataclass; or `kind | None`. Values of any other
      annotation are not checked.
    least: smallest number allowed, also within tuples.
    most: largest number allowed, also within tuples.
    show: formats a value for the message.

  Returns:
    The value, with lists converted to tuples, NumPy numbers to Python numbers, and the size of
    square pictures to one number.

  Raises:
    UserError: if the value is of another type, not finite or out of bounds.
  """
  if kind is int:
    return whole_number(name, value, least, most, show=show)
  if kind is float:
    return number(name, value, least, most, show=show)
  if kind is bool:
    return boolean(name, value, show=show)
  if kind == image_sizes.ImageSize:
    return _image_size(name, value, least, most, show)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    others = [argument for argument in arguments if argument is not type(None)]
    if (value is None and len(others) < len(arguments)) or len(others) != 1:
      return value
    return typed(name, value, others[0], least, most, show=show)
  if origin is tuple:
    return _typed_tuple(name, value, arguments, least, most, show)
  if origin is Mapping and arguments == (str, str):
    if not isinstance(value, Mapping) or not all(
      isinstance(word, str) for pair in value.items() for word in pair
    ):
      raise UserError(f"{name}={show(value)} must be of the form {{'string': 'string'}}")
    return value
  if kind is str:
    return text(name, value, show=show)
  if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
    raise UserError(
      f'{name}={show(value)} must be a {kind.__name__}; in gin, write @{kind.__name__}()'
    )
  return value


def _image_size(name, value, least, most, show) -> image_sizes.ImageSize:
  """Checks the size of pictures; a pair of equal numbers becomes one number."""
  pair = isinstance(value, (tuple, list))
  try:
    if pair:
      return image_sizes.of_sides(*_typed_tuple(name, value, (int, int), least, most, show))
    return whole_number(name, value, least, most, show=show)
  except UserError as error:
    raise UserError(f'{error}{"," if pair else ", or a pair of"} height and width') from None


def _typed_tuple(name, value, arguments, least, most, show) -> tuple:
  """Checks a tuple, or a list instead; `arguments` are those of its annotation."""
  kind, length = arguments[0], None if arguments[-1] is Ellipsis else len(arguments)
  several = _SEVERAL.get(kind, 'values')
  if length is not None:
    several = f'{_IN_WORDS.get(length, length)} {several}'
  right = isinstance(value, (tuple, list)) and length in (None, len(value))
  try:
    if right:
      return tuple(typed(name, item, kind, least, most, show=show) for item in value)
  except UserError:
    pass
  bounds = bounds_text(least, most) if kind in (int, float) else ''
  raise UserError(f'{name}={show(value)} must be a list of {several}{bounds}')


def check_fields(
  config: Any,
  prefix: str = '',
  bounds: Mapping[str, tuple[float | None, float | None]] | None = None,
):
  """Checks the fields of a dataclass, frozen or not, and sets them to the converted values.

  Args:
    config: the dataclass.
    prefix: prefix of the field names in messages.
    bounds: field -> the smallest and largest value allowed.

  Raises:
    UserError: if a value is of another type than its field, not finite or out of bounds.
  """
  owner: type = type(config)
  for name, kind in field_types(owner).items():
    least, most = (bounds or {}).get(name, (None, None))
    value = typed(prefix + name, getattr(config, name), kind, least, most)
    object.__setattr__(config, name, value)


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
  """Returns {field: its annotated type} of a dataclass."""
  hints = typing.get_type_hints(kind)
  return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def number_text(value: float) -> str:
  """Returns a short text for a number, unique to it, for a name or for metadata."""
  short = f'{value:g}'
  return short if float(short) == value else repr(value)


def bounds_text(least: float | None, most: float | None) -> str:
  """Returns ' from 1 to 5' and the like, to follow 'a number'."""
  lower = '' if least is None else f' from {_bound(least)}'
  if most is None:
    return lower
  return f'{lower} to {_bound(most)}' if lower else f' of at most {_bound(most)}'


def is_boolean(value: Any) -> bool:
  """Returns whether a value is a boolean, Python's or NumPy's."""
  return isinstance(value, bool) or (
    getattr(value, 'dtype', None) == 'bool' and getattr(value, 'shape', None) == ()
  )


def _as_float(value: Any) -> float | None:
  """Returns a real number as a float, infinite if it overflows float64; None for other values."""
  if isinstance(value, (bool, complex, str, bytes, bytearray)):
    return None
  if getattr(value, 'shape', ()) != () or (
    getattr(getattr(value, 'dtype', None), 'kind', 'f') in _NOT_REAL
  ):
    return None
  try:
    return float(value)
  except OverflowError:
    return math.inf
  except (TypeError, ValueError):
    return None


def _within(value: float, least: float | None, most: float | None) -> bool:
  return (least is None or value >= least) and (most is None or value <= most)


def _bound(value: float) -> str:
  return f'{value}' if isinstance(value, int) else f'{value:g}'

"""Checks of values that a user gives: by flags, in gin, in a file or through Python.

Every function returns the value as the plain Python type that is asked for, or raises UserError with
one line that begins with 'NAME=VALUE' and says what is needed.
"""

from __future__ import annotations

import math
import operator
import reprlib
import types
import typing
from collections.abc import Callable
from typing import Any

from parti_jax.errors import UserError

# The largest numbers of the dtypes that accelerators compute with.
LARGEST_INT32 = 2**31 - 1
LARGEST_FLOAT32 = 3.4028234663852886e38

_SEVERAL = {int: 'whole numbers', float: 'numbers', str: 'texts'}
_IN_WORDS = {2: 'two', 3: 'three', 4: 'four'}
# Up to here every whole number is a float64.
_EXACT = 2**53
# NumPy's kinds of dtypes that are not real numbers.
_NOT_REAL = 'cbmMOSU'
_LONGEST_SHOWN = 80

_REPR = reprlib.Repr()
_REPR.maxlevel = 3
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def shown(value: Any) -> str:
  """A value for a message: its `repr` in one line, cut where it is long."""
  try:
    text = ' '.join(_REPR.repr(value).split())
  except Exception:  # pylint: disable=broad-except
    # The value may be anything; so may its __repr__. Python also refuses very long integers.
    text = f'<{type(value).__name__}>'
  return text if len(text) <= _LONGEST_SHOWN else f'{text[:_LONGEST_SHOWN - 3]}...'


def shown_as_json(value: Any) -> str:
  """As `shown`, by the names that JSON has for None, True and False."""
  if value is None or isinstance(value, bool):
    return {None: 'null', True: 'true', False: 'false'}[value]
  return shown(value)


def whole_number(name: str, value: Any, least: int | None = None, most: int | None = None, *,
                 show: Callable[[Any], str] = shown) -> int:
  """Checks a whole number.

  Args:
    name: of the argument, for the message.
    value: what was given. NumPy's and JAX's integers are fine; booleans and floats are not, whole
      ones included.
    least: smallest number allowed, if there is one.
    most: largest number allowed, if there is one.
    show: turns the value into text for the message.

  Returns:
    The number.

  Raises:
    UserError: if the value is no whole number or out of bounds.
  """
  try:
    number = None if is_boolean(value) else operator.index(value)
  except TypeError:
    number = None
  if number is None or not _within(number, least, most):
    hint = ''
    if isinstance(value, float) and _within(value, least, most) and (
        abs(value) < _EXACT and value.is_integer()):
      hint = f', such as {int(value)}'
    raise UserError(
        f'{name}={show(value)} must be a whole number{bounds_text(least, most)}{hint}')
  return number


def count(name: str, value: Any) -> int:
  """Checks a number of things that are made or read: from 1 to what an int32 can index."""
  return whole_number(name, value, 1, LARGEST_INT32)


def number(name: str, value: Any, least: float | None = None, most: float | None = None, *,
           show: Callable[[Any], str] = shown) -> float:
  """Checks a real number that is finite as a float32.

  Args:
    name: of the argument, for the message.
    value: what was given. NumPy's and JAX's numbers are fine; booleans and texts are not.
    least: smallest number allowed, if there is one.
    most: largest number allowed, if there is one.
    show: turns the value into text for the message.

  Returns:
    The number.

  Raises:
    UserError: if the value is no number, not finite or out of bounds.
  """
  real = _as_float(value)
  bounds = bounds_text(least, most)
  if real is None:
    raise UserError(f'{name}={show(value)} must be a number{bounds}')
  if not abs(real) <= LARGEST_FLOAT32:
    raise UserError(f'{name}={show(value)} is not a finite number in float32; it must be a '
                    f'number{bounds}')
  if not _within(real, least, most):
    raise UserError(f'{name}={show(value)} must be a number{bounds}')
  return real


def boolean(name: str, value: Any, *, show: Callable[[Any], str] = shown) -> bool:
  """Checks a value that is True or False, or NumPy's."""
  if not is_boolean(value):
    raise UserError(f'{name}={show(value)} must be true or false')
  return bool(value)


def typed(name: str, value: Any, kind: Any, least: float | None = None,
          most: float | None = None, *, show: Callable[[Any], str] = shown) -> Any:
  """Checks a value against a type annotation, as of a dataclass field or of a parameter.

  Args:
    name: of the value, for the message.
    value: what was given.
    kind: int, float, bool, str; tuple[...] of these, for which a list is fine too; a dataclass; or
      `kind | None`. Values of any other annotation are not checked.
    least: smallest number allowed, within tuples too.
    most: largest number allowed, within tuples too.
    show: turns a value into text for the message.

  Returns:
    The value, a list as a tuple and NumPy's numbers as Python's.

  Raises:
    UserError: if the value is of another type, not finite or out of bounds.
  """
  if kind is int:
    return whole_number(name, value, least, most, show=show)
  if kind is float:
    return number(name, value, least, most, show=show)
  if kind is bool:
    return boolean(name, value, show=show)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    others = [argument for argument in arguments if argument is not type(None)]
    if (value is None and len(others) < len(arguments)) or len(others) != 1:
      return value
    return typed(name, value, others[0], least, most, show=show)
  if origin is tuple:
    return _typed_tuple(name, value, arguments, least, most, show)
  if kind is str and not isinstance(value, str):
    raise UserError(f'{name}={show(value)} must be a text')
  if isinstance(kind, type) and hasattr(kind, '__dataclass_fields__') and not isinstance(
      value, kind):
    raise UserError(f'{name}={show(value)} must be a {kind.__name__}; in gin, write '
                    f'@{kind.__name__}()')
  return value


def _typed_tuple(name, value, arguments, least, most, show) -> tuple:
  """Checks a tuple, or a list in its place; `arguments` are those of its annotation."""
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


def bounds_text(least: float | None, most: float | None) -> str:
  """Returns ' from 1 to 5' and the like, to follow 'a number'."""
  lower = '' if least is None else f' from {_text(least)}'
  if most is None:
    return lower
  return f'{lower} to {_text(most)}' if lower else f' of at most {_text(most)}'


def is_boolean(value: Any) -> bool:
  """Whether a value is True or False, or NumPy's."""
  return isinstance(value, bool) or (
      getattr(value, 'dtype', None) == 'bool' and getattr(value, 'shape', None) == ())


def _as_float(value: Any) -> float | None:
  """The value of a real number, infinite where a float64 overflows; None of anything else."""
  if isinstance(value, (bool, complex, str, bytes, bytearray)):
    return None
  if getattr(value, 'shape', ()) != () or (
      getattr(getattr(value, 'dtype', None), 'kind', 'f') in _NOT_REAL):
    return None
  try:
    return float(value)
  except OverflowError:
    return math.inf
  except (TypeError, ValueError):
    return None


def _within(value: float, least: float | None, most: float | None) -> bool:
  return (least is None or value >= least) and (most is None or value <= most)


def _text(bound: float) -> str:
  return f'{bound}' if isinstance(bound, int) else f'{bound:g}'

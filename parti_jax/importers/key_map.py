"""Maps the arrays of a foreign file to our parameters, and checks them before reading any.

A reader of a foreign format makes a key map: for each of our parameters, the names of the arrays
that it is made of, and their conversion. `check` compares names and shapes and reads nothing.
`convert` then reads one parameter after another, so that memory stays near the largest of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple
from typing import Protocol

import jax.numpy as jnp
import numpy as np

from parti_jax.core.errors import UserError

# Maximum number of names of one kind in an error message.
_SHOWN = 5


class StoredArray(Protocol):
  """An array in a file."""

  @property
  def shape(self) -> tuple[int, ...]: ...

  @property
  def dtype(self) -> np.dtype: ...

  def read(self) -> np.ndarray:
    """Reads the array from the file."""


def unchanged(array: np.ndarray) -> np.ndarray:
  """Returns the array unchanged."""
  return array


class Source(NamedTuple):
  """The arrays that one of our parameters is made of.

  Attributes:
    names: names of the foreign arrays. Several are stacked along a new axis, after `change`, like
      the parameters of scanned layers.
    change: conversion of one foreign array, such as a transpose. It may only permute, split, merge
      or cut axes, because `check` calls it with an array that takes no memory.
    stacked: whether an axis stacks the arrays, even if there is only one.
    axis: the axis that does.
  """

  names: tuple[str, ...]
  change: Callable[[np.ndarray], np.ndarray] = unchanged
  stacked: bool = False
  axis: int = 0

  def without_stack(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one changed array, given the parameter's."""
    return shape[: self.axis] + shape[self.axis + 1 :] if self.stacked else shape


KeyMap = Mapping[str, Source]


def one(name: str, change: Callable[[np.ndarray], np.ndarray] = unchanged) -> Source:
  """Returns the source of a parameter made of one array."""
  return Source((name,), change)


def layers(
  template: str, count: int, change: Callable[[np.ndarray], np.ndarray] = unchanged
) -> Source:
  """Returns the source of scanned layers, one array each; `template` has {} for the layer."""
  return Source(tuple(template.format(layer) for layer in range(count)), change, stacked=True)


def together(
  names: Iterable[str], axis: int, change: Callable[[np.ndarray], np.ndarray] = unchanged
) -> Source:
  """Returns the source of a parameter of several arrays, such as queries, keys and values."""
  return Source(tuple(names), change, stacked=True, axis=axis)


def linear(array: np.ndarray) -> np.ndarray:
  """Returns the kernel [in, out] of a torch Linear's weight [out, in]."""
  return array.T


def convolution(array: np.ndarray) -> np.ndarray:
  """Returns the kernel [height, width, in, out] of a torch Conv2d's [out, in, height, width]."""
  return array.transpose(2, 3, 1, 0)


def count(has: Callable[[int], bool]) -> int:
  """Counts the successive numbers from 0 on for which `has` is True, such as those of layers."""
  place = 0
  while has(place):
    place += 1
  return place


def prefixes(names: Iterable[str], marker: str) -> list[str]:
  """Returns the prefixes of a name in files that hold several networks, such as 'state_dict.'.

  Args:
    names: names of the arrays.
    marker: a name that the network always has.
  """
  found = [name.removesuffix(marker) for name in names if name.endswith(marker)]
  return [prefix for prefix in found if prefix == '' or prefix[-1] in './']


def check(
  key_map: KeyMap,
  stored: Mapping[str, StoredArray],
  expected: Mapping[str, tuple[int, ...]],
  where: str,
  ignored: Iterable[str] = (),
) -> None:
  """Checks that a file has all arrays, of the right shapes, and no others; reads none.

  Args:
    key_map: {path of our parameter: its source}.
    stored: {name: array in the file}.
    expected: {path of our parameter: its shape}.
    where: the file or folder, for messages.
    ignored: regular expressions of names that the network does not need, such as those of a loss.

  Raises:
    UserError: naming what is missing, left over, of another shape or not floating-point.
  """
  if set(key_map) != set(expected):
    raise AssertionError(f'the key map is not that of the network: {set(key_map) ^ set(expected)}')
  used = {name for source in key_map.values() for name in source.names}
  patterns = [re.compile(pattern) for pattern in ignored]
  problems = [
    _listed('missing', sorted(used - set(stored))),
    _listed(
      'not part of this network',
      sorted(
        name
        for name in set(stored) - used
        if not any(pattern.fullmatch(name) for pattern in patterns)
      ),
    ),
    _listed('of another shape', _other_shapes(key_map, stored, expected)),
    _listed(
      'not floating-point numbers',
      sorted(
        f'{name} ({np.dtype(stored[name].dtype)})'
        for name in used & set(stored)
        if not jnp.issubdtype(stored[name].dtype, jnp.floating)
      ),
    ),
  ]
  if any(problems):
    raise UserError(
      f'{where} does not hold the parameters of this network: {"; ".join(filter(None, problems))}'
    )


def _listed(words: str, names: list[str]) -> str:
  if not names:
    return ''
  more = f', and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''
  return f'{words}: {", ".join(names[:_SHOWN])}{more}'


def _other_shapes(key_map: KeyMap, stored, expected) -> list[str]:
  found = []
  for path, source in key_map.items():
    wanted = tuple(expected[path])
    if source.stacked and wanted[source.axis] != len(source.names):
      raise AssertionError(f'{path}: {len(source.names)} sources for {wanted}')
    for name in source.names:
      if name not in stored:
        continue
      shape = tuple(stored[name].shape)
      try:
        changed = _changed(source, shape)
      except (ValueError, IndexError):  # It lacks the axes that would be permuted, split or cut.
        changed = None
      if changed != source.without_stack(wanted):
        found.append(f'{name} {list(shape)}, which would be {path} {list(wanted)}')
  return found


def _changed(source: Source, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the shape of a foreign array after `Source.change`, which sees no memory."""
  return source.change(np.broadcast_to(np.float32(0), shape)).shape


def convert(
  key_map: KeyMap,
  stored: Mapping[str, StoredArray],
  progress: Callable[[], object] = lambda: None,
) -> dict[str, ConvertedArray]:
  """Returns our parameters, which are read one after another when they are used.

  Args:
    key_map: {path of our parameter: its source}, which `check` has accepted.
    stored: {name: array in the file}.
    progress: is called when a parameter has been read.
  """
  return {path: ConvertedArray(source, stored, progress) for path, source in key_map.items()}


def _finite(name: str, stored: Mapping[str, StoredArray]) -> np.ndarray:
  """Reads an array as float32; raises UserError if it has values that are not finite."""
  with np.errstate(over='ignore'):
    found = np.asarray(stored[name].read(), np.float32)
  if not np.all(np.isfinite(found)):
    raise UserError(
      f'the array {name} has values that are not finite; download the file again, and give other '
      'weights if it still has them'
    )
  return found


class ConvertedArray:
  """One of our parameters, which is read and converted when it is used."""

  def __init__(
    self,
    source: Source,
    stored: Mapping[str, StoredArray],
    progress: Callable[[], object],
  ):
    """Refers to a parameter.

    Args:
      source: which arrays make it.
      stored: {name: array in the file}.
      progress: is called when it has been read.
    """
    self._source, self._stored, self._progress = source, stored, progress

  @property
  def shape(self) -> tuple[int, ...]:
    names = self._source.names
    shape = _changed(self._source, self._stored[names[0]].shape)
    axis = self._source.axis
    return (*shape[:axis], len(names), *shape[axis:]) if self._source.stacked else shape

  def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
    """Reads the parameter as float32, with at most one more array of the file in memory."""
    del copy  # It is always one.
    source, stored = self._source, self._stored
    first, *others = source.names
    found = np.asarray(source.change(_finite(first, stored)), np.float32, order='C')
    if source.stacked:
      stack = np.empty(self.shape, np.float32)
      parts = np.moveaxis(stack, source.axis, 0)
      parts[0] = found
      for place, name in enumerate(others, 1):
        parts[place] = source.change(_finite(name, stored))
      found = stack
    self._progress()
    return found if dtype is None else found.astype(dtype, copy=False)

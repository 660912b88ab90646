"""Traces a program once for all starts: later ones read it from the cache and trace nothing.

XLA's cache has compiled programs, but to find one there takes the program in StableHLO. Tracing it
takes longer than sampling a few pictures. `jax.export` writes and reads it, without pickles.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

import flax.linen as nn
import jax
import numpy as np
from jax import export

from parti_jax.core import start_cache

_Jitted = TypeVar('_Jitted', bound=Callable[..., Any])

# The functions whose programs are kept.
_functions: set[Callable[..., Any]] = set()
# The programs of this process, by function, static arguments, and shapes.
_programs: dict[Any, Callable[..., Any]] = {}


def keep(function: _Jitted) -> _Jitted:
  """Marks a jitted function, so that `call` keeps its programs; a decorator.

  Args:
    function: the result of `jax.jit` for a function of this package, without other options than
      static arguments. Its result depends on nothing but its arguments and the package's sources.
  """
  _functions.add(function)
  return function


def call(function: Callable[..., Any], args: Sequence[Any], statics: Mapping[str, Any]) -> Any:
  """Calls a jitted function on one device.

  On a CPU, the program of a function with `keep` is read from `start_cache`, or traced and kept
  there. Otherwise this is the same as calling the function. The result is the same in any case.

  Args:
    function: the function.
    args: trees of arrays.
    statics: static arguments: configs, and linen modules that their configs determine.
  """
  if function not in _functions or jax.default_backend() != 'cpu':
    return function(*args, **statics)
  leaves, structure = jax.tree.flatten(tuple(args))
  if not all(isinstance(leaf, (np.ndarray, np.generic, jax.Array)) for leaf in leaves):
    return function(*args, **statics)
  avals = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
  identity = (function, structure, avals, tuple(sorted(statics.items(), key=lambda item: item[0])))
  program = _programs.get(identity)
  if program is None:
    key = _key(function, structure, avals, statics)
    if key is None:
      return function(*args, **statics)
    program = _program(key, function, structure, leaves, statics)
    _programs[identity] = program
  return program(*leaves)


def _key(function: Any, structure: Any, avals: Any, statics: Mapping[str, Any]) -> str | None:
  """Returns the name of a program in the cache; None if it is not to be kept."""
  named = []
  for name, value in sorted(statics.items(), key=lambda item: item[0]):
    kind, config = type(value), getattr(value, 'config', value)
    if not kind.__module__.startswith('parti_jax.') or not start_cache.is_package_code(config):
      return None
    if isinstance(value, nn.Module) and value != kind(config):  # It has more than its config.
      return None
    named.append((name, kind, type(config), config))
  return start_cache.key(
    'program', function.__module__, function.__qualname__, str(structure), repr(avals), named
  )


def _program(
  key: str, function: Any, structure: Any, leaves: Sequence[Any], statics: Mapping[str, Any]
) -> Callable[..., Any]:
  """Returns a function of the leaves, from the cache or newly traced."""

  def flat(*leaves):
    return function.__wrapped__(*jax.tree.unflatten(structure, leaves), **statics)

  exported = _read(key, leaves)
  if exported is None:
    try:
      exported = export.export(jax.jit(flat))(*leaves)
      start_cache.write(key, bytes(exported.serialize()))
    except Exception:  # noqa: BLE001  # It can't be kept, or the call raises the error too.
      return lambda *leaves: function(*jax.tree.unflatten(structure, leaves), **statics)
  return jax.jit(_without_lapack(exported).call)


def _without_lapack(exported: export.Exported) -> export.Exported:
  """Returns the program such that a call doesn't load LAPACK, unless the program uses it.

  JAX loads LAPACK for each exported program of CPUs, and with it SciPy's linear algebra, which takes a
  tenth of a later start. It does not if the program is for no platform that it knows.
  """
  if b'lapack_' in exported.mlir_module_serialized:
    return exported
  checks = (*exported.disabled_safety_checks, export.DisabledSafetyCheck.platform())
  return dataclasses.replace(exported, platforms=('any',), disabled_safety_checks=checks)


def _read(key: str, leaves: Sequence[Any]) -> export.Exported | None:
  """Returns the program of a name in the cache, if it takes these arguments."""
  content = start_cache.read(key)
  if content is None:
    return None
  try:
    exported = export.deserialize(bytearray(content))
  except Exception:  # noqa: BLE001  # Whatever is wrong with it, a new one replaces it.
    return None
  taken = [(aval.shape, aval.dtype) for aval in exported.in_avals]
  fits = taken == [(leaf.shape, leaf.dtype) for leaf in leaves]
  return exported if fits and jax.default_backend() in exported.platforms else None

"""config.json of a model folder: sizes of the networks, sampling defaults and provenance, checked.

People edit the file by hand, so its errors name the file and the entry, in JSON's words.
"""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import ml_dtypes
import numpy as np

from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings as settings_lib
from parti_jax.models import config_checks
from parti_jax.models import parti_config

FORMAT_VERSION = 1

# What parameters may be stored as; they are computed with in the configs' dtype.
STORED_DTYPES = {'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16, 'float32': np.float32}


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads the file.

  Raises:
    UserError: if it is not JSON or of another format version.
  """
  try:
    config = storage.read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} is damaged or unfinished ({error}); export or download the model again'
    ) from error
  version = config.get('format_version') if isinstance(config, dict) else None
  if type(version) is not int or version != FORMAT_VERSION:
    raise UserError(
      f'{path}: format_version is {checks.shown(version)}, this parti_jax reads '
      f'{FORMAT_VERSION}; install the version that wrote it, or export it again'
    )
  return config


def sizes(kind: type, config: dict[str, Any], key: str, dtype: str, where) -> Any:
  """Makes the sizes of a network.

  Args:
    kind: their dataclass.
    config: of `read`.
    key: of the network in the file.
    dtype: name of the dtype to compute in, in place of the file's.
    where: the file, for messages.

  Raises:
    UserError: if they are missing or have other fields, or if a value is invalid.
  """
  values = dict(_object(config, key, where))
  if kind is parti_config.PartiConfig:
    try:
      values = parti_config.by_todays_names(values)
    except UserError as error:
      raise UserError(f'{where}: {key!r}: {error}') from error
  kinds = checks.field_types(kind)
  if values.keys() != kinds.keys():
    different = ', '.join(map(_shown_name, sorted(values.keys() ^ kinds.keys())))
    raise UserError(f'{where}: {key!r} has other fields than {kind.__name__}: {different}')
  bounds = config_checks.bounds(kind)
  for name, annotation in kinds.items():
    least, most = bounds.get(name, (None, None))
    # Of the most that a size may be, `_check_size` says why.
    most = most if annotation is float else None
    values[name] = checks.typed(
      f'{where}: {key}.{name}', values[name], annotation, least, most, show=checks.shown_as_json
    )
    _check_size(name, values[name], key, where)
  try:
    return dataclasses.replace(kind(**values), dtype=dtype)
  except UserError as error:
    raise UserError(f'{where}: {str(error).replace(f"{kind.__name__}.", f"{key}.")}') from error


def sampling(config: dict[str, Any], where) -> settings_lib.SamplingSettings:
  """Returns the sampling defaults; what the file does not name is as in SamplingSettings.

  Raises:
    UserError: if a name is unknown or a value is invalid.
  """
  values = _object(config, 'sampling', where, {})
  kinds = checks.field_types(settings_lib.SamplingSettings)
  if unknown := ', '.join(map(_shown_name, sorted(values.keys() - kinds.keys()))):
    raise UserError(
      f"{where}: 'sampling' has other fields than SamplingSettings: {unknown}; they "
      f'are {", ".join(kinds)}'
    )
  for name, value in values.items():
    bounds = (0, checks.LARGEST_INT32) if kinds[name] is int else (None, None)
    checks.typed(
      f'{where}: sampling.{name}', value, kinds[name], *bounds, show=checks.shown_as_json
    )
  try:
    return settings_lib.SamplingSettings(**values)
  except UserError as error:
    raise UserError(f'{where}: sampling.{error}') from error


def stored_as(config: dict[str, Any], where) -> str:
  """Returns the name of the dtype that the parameters were stored as, in STORED_DTYPES.

  Raises:
    UserError: if what the file says of the parameters is invalid.
  """
  values = dict(_object(config, 'parameters', where, {}))
  name = values.pop('stored_as', 'float16')
  if not isinstance(name, str) or name not in STORED_DTYPES:
    raise UserError(
      f'{where}: parameters.stored_as={checks.shown_as_json(name)} is not one of '
      f'{", ".join(STORED_DTYPES)}'
    )
  for network, count in values.items():
    checks.whole_number(
      f'{where}: parameters.{_shown_name(network)}', count, 0, show=checks.shown_as_json
    )
  return name


def mismatch_allowed(config: dict[str, Any], where) -> bool:
  """Whether networks may have been trained with another vocabulary or tokenizer.

  Raises:
    UserError: if the entry is not a boolean.
  """
  return checks.boolean(
    f'{where}: mismatch_allowed', config.get('mismatch_allowed', False), show=checks.shown_as_json
  )


def provenance(config: dict[str, Any], where) -> dict[str, Any]:
  """Returns what the file says of the model's training."""
  return _object(config, 'provenance', where, {})


def _object(config: dict[str, Any], key: str, where, default=None) -> dict[str, Any]:
  """Returns an entry that is a JSON object, or the default where it is missing."""
  values = config.get(key, default)
  if not isinstance(values, dict):
    if key not in config:
      raise UserError(f'{where}: {key!r} is missing')
    wrong = 'must be' if default is not None else 'is missing; it must be'
    raise UserError(
      f'{where}: {key!r} {wrong} an object, such as {{"name": "value"}}, and not '
      f'{checks.shown_as_json(values)}'
    )
  return values


def _shown_name(name: str) -> str:
  """A name that may be anything, for a message."""
  return checks.shown(name)[1:-1]


def _check_size(name: str, value: Any, key: str, where):
  """Raises UserError for a size that no model has, before anything is made of it."""
  most = config_checks.most(name)
  for number in value if isinstance(value, tuple) else [value]:
    if isinstance(number, (int, float)) and abs(number) > most:
      raise UserError(
        f'{where}: {key!r}: {name}={checks.shown(number)} is more than {most:,}, the most that '
        'is read; is the file damaged?'
      )

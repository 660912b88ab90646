"""Reads and checks a model folder's config.json: network configs, sampling defaults, provenance.

People edit the file by hand, so errors name the file and the entry, and show values as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import ml_dtypes
import numpy as np

from parti_jax.core import checks
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import file_names
from parti_jax.exported_model import preprocessing
from parti_jax.exported_model import sampling_settings
from parti_jax.models import config_checks
from parti_jax.models import generators
from parti_jax.models import kinds as kinds_lib
from parti_jax.models import parti_config

FORMAT_VERSION = 2
_READABLE_VERSIONS = (1, FORMAT_VERSION)

# Dtypes in which parameters may be stored; the networks compute in the configs' dtype.
STORED_DTYPES = {'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16, 'float32': np.float32}


_LOWER_CASE = 'lower_case'


class Inputs(NamedTuple):
  """How the inputs of a network are made, where that is its own way.

  Attributes:
    preprocessing: how pictures become its input; None for the way of the code that uses it.
    own_tokenizer: whether it has a text tokenizer of its own; otherwise it uses the model's.
    lower_case: whether texts become lower case before its own tokenizer sees them.
  """

  preprocessing: preprocessing.Preprocessing | None = None
  own_tokenizer: bool = False
  lower_case: bool = False


def read(path: pathlib.Path) -> dict[str, Any]:
  """Reads config.json.

  Raises:
    UserError: if the file isn't JSON or has another format version.
  """
  try:
    config = storage.read_json(path)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} is damaged or unfinished ({error}); export or download the model again'
    ) from error
  version = config.get('format_version') if isinstance(config, dict) else None
  if type(version) is not int or version not in _READABLE_VERSIONS:
    raise UserError(
      f'{path}: format_version is {checks.shown(version)}, but this parti_jax reads '
      f'{" and ".join(map(str, _READABLE_VERSIONS))}; install the version that wrote it, or export '
      'it again'
    )
  return config


def entry(kinds: Mapping[str, type], config, unnamed: str | None = None) -> dict[str, Any]:
  """Returns what config.json has of a network: the name of its kind, and its config.

  Args:
    kinds: the dataclasses of the network's configs by the names of their kinds.
    config: the config.
    unnamed: the kind whose name is left out.

  Raises:
    UserError: if `sizes` would read another config.
  """
  name = config_checks.kind_name(kinds, config)
  # Every field is written, also one at its default, so that a default may change. Left out are only
  # Parti's `text_encoder` without one, and the kind `unnamed`, which the first files didn't have.
  values = parti_config.as_dict(config)
  if isinstance(config, parti_config.PartiConfig) and config.text_encoder is None:
    del values['text_encoder']
  found = ({} if name == unnamed else {'kind': name}) | values
  _check_readable(kinds, config, found)
  return found


def _check_readable(kinds: Mapping[str, type], config, found: Mapping[str, Any]) -> None:
  """Raises UserError unless a config stays the same when it is written and read."""
  where = type(config).__name__
  try:
    again = json.loads(json.dumps(found))
  except (TypeError, ValueError) as error:
    raise UserError(f'{where}: its fields cannot be written as JSON: {error}') from error
  read_config = sizes(kinds, {where: again}, where, config.dtype, 'config.json')
  for field in dataclasses.fields(config):
    kept, read_value = getattr(config, field.name), getattr(read_config, field.name)
    if kept != read_value:
      raise UserError(
        f'{where}.{field.name}={checks.shown(kept)} is read as {checks.shown(read_value)} from '
        'config.json; make it a number, a string, a boolean or a tuple of them, and annotate the '
        'field with that type'
      )


def inputs_entry(inputs: Inputs) -> dict[str, Any]:
  """Returns what config.json has of a network's inputs; empty if nothing is its own."""
  how = {} if inputs.preprocessing is None else dataclasses.asdict(inputs.preprocessing)
  return how | ({_LOWER_CASE: inputs.lower_case} if inputs.own_tokenizer else {})


def inputs(config: dict[str, Any], name: str, where) -> Inputs:
  """Returns how the inputs of a network are made.

  Args:
    config: the result of `read`.
    name: name of the network.
    where: the file, for messages.

  Raises:
    UserError: if the entry has other fields, or an invalid value.
  """
  key = file_names.inputs_entry(name)
  values = dict(_object(config, key, where, {}))
  own_tokenizer = _LOWER_CASE in values
  lower_case = checks.boolean(
    f'{where}: {key}.{_LOWER_CASE}', values.pop(_LOWER_CASE, False), show=checks.shown_as_json
  )
  if not values:
    return Inputs(None, own_tokenizer, lower_case)
  types = checks.field_types(preprocessing.Preprocessing)
  if values.keys() != types.keys():
    different = ', '.join(map(_shown_name, sorted(values.keys() ^ types.keys())))
    raise UserError(f'{where}: {key!r} has other fields than Preprocessing: {different}')
  for field, value in values.items():
    checks.typed(f'{where}: {key}.{field}', value, types[field], show=checks.shown_as_json)
  try:
    how = preprocessing.Preprocessing(**values)
  except UserError as error:
    raise UserError(f'{where}: {str(error).replace("Preprocessing.", f"{key}.")}') from error
  return Inputs(how, own_tokenizer, lower_case)


def sizes(kinds: Mapping[str, type], config: dict[str, Any], key: str, dtype: str, where) -> Any:
  """Returns the config of a network.

  Args:
    kinds: the dataclasses of the network's configs by the names of their kinds.
    config: the result of `read`.
    key: the network's key in the file.
    dtype: name of the dtype to compute in, which replaces the file's.
    where: the file, for messages.

  Raises:
    UserError: if the entry is missing, has other fields, or has an invalid value.
  """
  values = dict(_object(config, key, where))
  kind = _kind(kinds, values, key, where)
  try:
    values = generators.upgrade(kind, values)
  except UserError as error:
    raise UserError(f'{where}: {key!r}: {error}') from error
  types = checks.field_types(kind)
  if values.keys() != types.keys():
    different = ', '.join(map(_shown_name, sorted(values.keys() ^ types.keys())))
    raise UserError(f'{where}: {key!r} has other fields than {kind.__name__}: {different}')
  bounds = config_checks.bounds(kind)
  for name, annotation in types.items():
    least, most = bounds.get(name, (None, None))
    # `_check_size` checks the maximum of the other types and says why it exists.
    most = most if annotation is float else None
    values[name] = checks.typed(
      f'{where}: {key}.{name}', values[name], annotation, least, most, show=checks.shown_as_json
    )
    _check_size(name, values[name], key, where)
  try:
    return dataclasses.replace(kind(**values), dtype=dtype)
  except UserError as error:
    raise UserError(f'{where}: {str(error).replace(f"{kind.__name__}.", f"{key}.")}') from error


def _kind(kinds: Mapping[str, type], values: dict[str, Any], key: str, where) -> type:
  """Takes the kind out of the entry of a network, and returns its dataclass."""
  name = values.pop('kind', next(iter(kinds)))
  if not isinstance(name, str) or name not in kinds:
    raise UserError(
      f'{where}: {key}.kind={checks.shown_as_json(name)} is not one of {", ".join(kinds)}'
      f'{kinds_lib.remedy(kinds)}'
    )
  return kinds[name]


def sampling(config: dict[str, Any], where) -> sampling_settings.SamplingSettings:
  """Returns the sampling defaults; entries missing in the file have SamplingSettings' defaults.

  Raises:
    UserError: if a name is unknown or a value is invalid.
  """
  values = _object(config, 'sampling', where, {})
  types = checks.field_types(sampling_settings.SamplingSettings)
  if unknown := ', '.join(map(_shown_name, sorted(values.keys() - types.keys()))):
    raise UserError(
      f"{where}: 'sampling' has other fields than SamplingSettings: {unknown}; choose "
      f'from {", ".join(types)}'
    )
  for name, value in values.items():
    bounds = (0, checks.LARGEST_INT32) if types[name] is int else (None, None)
    checks.typed(
      f'{where}: sampling.{name}', value, types[name], *bounds, show=checks.shown_as_json
    )
  try:
    return sampling_settings.SamplingSettings(**values)
  except UserError as error:
    raise UserError(f'{where}: sampling.{error}') from error


def stored_as(config: dict[str, Any], where) -> str:
  """Returns the name, in STORED_DTYPES, of the dtype of the stored parameters.

  Raises:
    UserError: if the file's entry about the parameters is invalid.
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
  """Returns whether networks may have been trained with another vocabulary or tokenizer.

  Raises:
    UserError: if the entry is not a boolean.
  """
  return checks.boolean(
    f'{where}: mismatch_allowed', config.get('mismatch_allowed', False), show=checks.shown_as_json
  )


def provenance(config: dict[str, Any], where) -> dict[str, Any]:
  """Returns the file's entry about the model's training."""
  return _object(config, 'provenance', where, {})


def _object(config: dict[str, Any], key: str, where, default=None) -> dict[str, Any]:
  """Returns an entry that must be a JSON object, or the default if it is missing."""
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
  """Returns an arbitrary name in a form that is safe to show in a message."""
  return checks.shown(name)[1:-1]


def _check_size(name: str, value: Any, key: str, where):
  """Raises UserError for an implausibly large size, before anything is allocated from it."""
  most = config_checks.most(name)
  for number in value if isinstance(value, tuple) else [value]:
    if isinstance(number, (int, float)) and abs(number) > most:
      raise UserError(
        f'{where}: {key!r}: {name}={checks.shown(number)} is more than the maximum of {most:,}; '
        'is the file damaged?'
      )

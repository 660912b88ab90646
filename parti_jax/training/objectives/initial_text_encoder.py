"""Takes a text encoder from another run (Parti, section 2.2) or from elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gin

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.models import config_checks
from parti_jax.models import generators
from parti_jax.models import parti_config
from parti_jax.models import text_encoders
from parti_jax.training import inputs as inputs_lib

# The fields of PartiConfig that determine the text encoder.
_SIZES = (
  'encoder_layers',
  'width',
  'mlp_width',
  'heads',
  'text_vocabulary',
  'text_length',
  'text_encoder',
  'norm',
  'mlp',
  'qk_norm',
)
_OBJECTIVES = ('text_encoder', 'generator')


@gin.configurable
def imported_text_encoder(
  folder: str = gin.REQUIRED, text_length: int | None = None, dropout: float = 0.0
) -> parti_config.TextEncoderConfig:
  """Returns the config of an imported text encoder, for `PartiConfig.text_encoder`.

  Args:
    folder: a folder that `parti-jax import text_encoder` wrote.
    text_length: maximum number of text tokens; None for the folder's. Only kinds with
      `text_encoders.Kind.any_length`, such as T5, take another one.
    dropout: dropout rate in training, of kinds that have dropout.

  Raises:
    UserError: if the folder has no text encoder, or a value is invalid.
  """
  folder = checks.text('imported_text_encoder.folder', folder)
  config = model_folder.part_config('text_encoder', folder)
  any_length = text_encoders.KINDS.of(config).any_length
  if text_length not in (None, config.text_length) and not any_length:
    raise errors.UserError(
      f'imported_text_encoder.text_length={text_length}: the text encoder in {folder} has '
      f'{config.text_length} positions; set it to None'
    )
  given = {'text_length': text_length, 'dropout': dropout}
  fields = {field.name for field in dataclasses.fields(config)}
  return dataclasses.replace(
    config,
    **{name: value for name, value in given.items() if value is not None and name in fields},
  )


def parts(
  source: str | None,
  model: generators.Config,
  abstract: Mapping[str, Any],
  inputs: inputs_lib.Inputs,
  key: str,
) -> dict[str, Any]:
  """Reads the text encoder's parameters.

  Args:
    source: folder of a run of TextEncoderObjective or GeneratorObjective, or of an imported text
      encoder; None for neither.
    model: config of the new model.
    abstract: shapes and shardings of the new model's parameters.
    inputs: fingerprints of the new run's vocabulary and tokenizer.
    key: the gin key with the value `source`, for messages.

  Returns:
    {'text_encoder': the parameters, on the mesh}; {} if `source` is None.

  Raises:
    UserError: if there is no finished checkpoint, or if it has another objective, another config or
      another text vocabulary.
  """
  if source is None:
    return {}
  if storage.exists(storage.join(source, model_folder.CONFIG_FILE)):
    part = model_folder.load_part('text_encoder', source)
    _check_same(part.config, model, f'{key}={source!r}')
    inputs.check(f'{key}={source!r}', part.made_with, f'or start without {key}')
    return run_checkpoints.put_like(
      {'text_encoder': part.params}, {'text_encoder': abstract['text_encoder']}
    )
  path = run_checkpoints.latest_checkpoint(source)
  saved = run_checkpoints.read_model(path)
  if saved['stage'] not in _OBJECTIVES:
    raise errors.UserError(
      f'{key}={source!r} is a run of the objective {saved["stage"]!r}, which '
      'has no text encoder; give one of TextEncoderObjective or GeneratorObjective'
    )
  if saved['stage'] == 'generator':
    theirs = run_checkpoints.read_config(path, 'generator')
  else:
    theirs = parti_config.PartiConfig(**parti_config.upgrade_config(saved['config']))
  if theirs.text_encoder is None:
    if type(theirs) is not type(model):
      raise errors.UserError(
        f'{key}={source!r} has the text encoder of {type(theirs).__name__}, not that of '
        f'{type(model).__name__}; give another one'
      )
    own = {name: (getattr(theirs, name), getattr(model, name)) for name in _SIZES}
    _refuse_differing(f'{key}={source!r}', own)
  else:
    _check_same(theirs.text_encoder, model, f'{key}={source!r}')
  # The text encoder sees no image tokens.
  vocabulary = {'vocabulary': run_checkpoints.read_place(path).get('vocabulary')}
  inputs.check(f'{key}={source!r}', vocabulary, f'or start without {key}')
  return run_checkpoints.read_parts(path, {'text_encoder': abstract['text_encoder']})


def sources(source: str | None, key: str) -> dict[str, fingerprints.Fingerprint]:
  """Returns the fingerprint of an imported text encoder.

  Args:
    source: as `parts`.
    key: as `parts`.

  Returns:
    {'text_encoder': fingerprint of the files that it was imported from}; {} if it is unknown, as
    that of a run is.
  """
  if source is None or not storage.exists(storage.join(source, model_folder.CONFIG_FILE)):
    return {}
  origin = model_folder.part_provenance('text_encoder', source).get('text_encoder')
  digits = fingerprints.of_origin(origin)
  return {'text_encoder': fingerprints.Fingerprint(digits, f'{key}={source!r}')} if digits else {}


def _check_same(
  theirs: parti_config.TextEncoderConfig, model: generators.Config, where: str
) -> None:
  """Raises UserError unless an imported text encoder is the one of a generator's config."""
  ours = model.text_encoder
  if type(ours) is not type(theirs):
    shown = 'its own' if ours is None else f'a {type(ours).__name__}'
    raise errors.UserError(
      f'{where} is a {type(theirs).__name__}, but the text encoder of {type(model).__name__} is {shown}; '
      'include gin_configs/models/imported_text_encoder.gin'
    )
  free = set(config_checks.FREE_SETTINGS)
  if text_encoders.KINDS.of(theirs).any_length:
    free.add('text_length')
  _refuse_differing(
    where,
    {
      field.name: (getattr(theirs, field.name), getattr(ours, field.name))
      for field in dataclasses.fields(theirs)
      if field.name not in free
    },
  )


def _refuse_differing(where: str, values: Mapping[str, tuple[Any, Any]]) -> None:
  """Raises UserError, naming the fields, unless both values of each field are the same."""
  differing = [
    f'{name} is {theirs} there and {ours} here'
    for name, (theirs, ours) in values.items()
    if theirs != ours
  ]
  if differing:
    raise errors.UserError(
      f'{where} has a text encoder with another configuration: '
      f'{"; ".join(differing)}; give another one, or change PartiConfig'
    )

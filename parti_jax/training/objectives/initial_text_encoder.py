"""Initializes a text encoder from another run (Parti, section 2.2)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.models import parti_config
from parti_jax.training import inputs as inputs_lib

# The fields of PartiConfig that determine the text encoder.
_SIZES = ('encoder_layers', 'width', 'mlp_width', 'heads', 'text_vocabulary', 'text_length')
_OBJECTIVES = ('text_encoder', 'generator')


def parts(
  model_dir: str | None,
  model: parti_config.PartiConfig,
  abstract: Mapping[str, Any],
  inputs: inputs_lib.Inputs,
  key: str,
) -> dict[str, Any]:
  """Reads the text encoder's parameters from another run.

  Args:
    model_dir: folder of a run of TextEncoderObjective or GeneratorObjective; None for no run.
    model: config of the new model.
    abstract: shapes and shardings of the new model's parameters.
    inputs: fingerprints of the new run's vocabulary and tokenizer.
    key: the gin key with the value `model_dir`, for messages.

  Returns:
    {'text_encoder': the parameters, on the mesh}; {} if `model_dir` is None.

  Raises:
    UserError: if there is no finished checkpoint, or if it has another objective, another config or
      another text vocabulary.
  """
  if model_dir is None:
    return {}
  path = run_checkpoints.latest_checkpoint(model_dir)
  saved = run_checkpoints.read_model(path)
  if saved['stage'] not in _OBJECTIVES:
    raise errors.UserError(
      f'{key}={model_dir!r} is a run of the objective {saved["stage"]!r}, which '
      'has no text encoder; give one of TextEncoderObjective or GeneratorObjective'
    )
  differing = [
    f'{name} is {saved["config"][name]} there and {getattr(model, name)} here'
    for name in _SIZES
    if saved['config'][name] != getattr(model, name)
  ]
  if differing:
    raise errors.UserError(
      f'{key}={model_dir!r} has a text encoder with another configuration: '
      f'{"; ".join(differing)}; give another run, or change PartiConfig'
    )
  # The text encoder sees no image tokens.
  vocabulary = {'vocabulary': run_checkpoints.read_place(path).get('vocabulary')}
  inputs.check(f'{key}={model_dir!r}', vocabulary, f'or start without {key}')
  return run_checkpoints.read_parts(path, {'text_encoder': abstract['text_encoder']})

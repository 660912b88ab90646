"""A text encoder that another run trained, to start with (Parti, section 2.2)."""

from __future__ import annotations

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.models import parti_config

# What of Parti's sizes makes the text encoder.
_SIZES = ('encoder_layers', 'width', 'mlp_width', 'heads', 'text_vocabulary', 'text_length')
_OBJECTIVES = ('text_encoder', 'generator')


def parts(model_dir: str | None, model: parti_config.PartiConfig, abstract, inputs, key: str):
  """Parameters of the text encoder of another run.

  Args:
    model_dir: that run's folder: one of the objective TextEncoderObjective or GeneratorObjective; None for no
      run.
    model: sizes of the model that is to start with them.
    abstract: shapes and shardings of that model's parameters.
    inputs: what that model is trained with, an `Inputs`.
    key: the gin key that names the run, for messages.

  Returns:
    {'text_encoder': the parameters, on the mesh}; nothing if `model_dir` is None.

  Raises:
    UserError: if there is no finished checkpoint, or it is of another objective, of other sizes or of
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
      f'{key}={model_dir!r} has a text encoder of other sizes: '
      f'{"; ".join(differing)}; give another run, or set PartiConfig alike'
    )
  # The text encoder sees no image tokens.
  vocabulary = {'vocabulary': run_checkpoints.read_place(path).get('vocabulary')}
  inputs.check(f'{key}={model_dir!r}', vocabulary, f'or start without {key}')
  return run_checkpoints.read_parts(path, {'text_encoder': abstract['text_encoder']})

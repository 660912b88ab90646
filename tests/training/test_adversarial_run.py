"""A run with a discriminator and an average of weights, killed and resumed."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from parti_jax.core import gin_config
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import run as run_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer


@pytest.mark.slow
def test_a_killed_adversarial_run_goes_on_as_if_it_had_not_been(
  tmp_path, monkeypatch, tokenizer_bindings
):
  bindings = [
    *tokenizer_bindings,
    'train.steps = 5',
    'train.checkpoint_every = 3',
    'train.log_every = 1',
    'train.evaluate_every = 5',
    'train.pictures_every = 0',
  ]
  evaluated, dies_at = [], None
  advance, evaluate = run_lib.Run.advance, trainer_lib.Trainer.evaluate

  def dying(run):
    if run.step == dies_at:
      raise KeyboardInterrupt
    return advance(run)

  def watched(trainer, params, batches):
    evaluated.append(jax.device_get(params))
    return evaluate(trainer, params, batches)

  monkeypatch.setattr(run_lib.Run, 'advance', dying)
  monkeypatch.setattr(trainer_lib.Trainer, 'evaluate', watched)

  def train(name):
    gin_config.parse(['gin_configs/runs/tiny_adversarial_tokenizer.gin'], bindings)
    return train_loop.train(str(tmp_path / name))

  whole, dies_at = train('whole'), 4
  with pytest.raises(KeyboardInterrupt):
    train('killed')
  dies_at = None
  resumed = train('killed')
  state, other = (
    ocp.StandardCheckpointer().restore((tmp_path / name / 'checkpoints' / '5' / 'state').absolute())
    for name in ('whole', 'killed')
  )
  assert {'discriminator', 'encoder'} < state['params'].keys()
  jax.tree.map(np.testing.assert_array_equal, state, other)
  for name in (
    'loss',
    'adversarial',
    'adversarial_weight',
    'discriminator',
    'r1',
    'validation/psnr',
    'validation/code_perplexity',
  ):
    assert whole[name] == resumed[name] and np.isfinite(whole[name]), name
  assert whole['adversarial_weight'] > 0
  # What is evaluated, and what `tokenize` and `export` read, is the average.
  average = state['statistics']['average']
  params = frozen_tokenizer.load(tmp_path / 'whole').params
  jax.tree.map(np.testing.assert_array_equal, params, average)
  jax.tree.map(
    np.testing.assert_array_equal, {name: evaluated[0][name] for name in average}, average
  )
  assert np.any(
    average['decoder']['project_patches']['kernel']
    != state['params']['decoder']['project_patches']['kernel']
  )

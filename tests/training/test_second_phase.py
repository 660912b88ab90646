"""The tokenizer's second phase: its decoder learns, its tokens stay (Parti, section 2.1)."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny_configs

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.partitioning import mesh
from parti_jax.training import inputs
from parti_jax.training import optimizers
from parti_jax.training import state as state_lib
from parti_jax.training import train_loop
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import tokenizer_objective

CONFIG = dataclasses.replace(tiny_configs.TOKENIZER, codebook_size=16, code_dim=4)
PICTURES = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
FROZEN = ('encoder', 'quantizer')


def _trainer(objective):
  one_device = mesh.make_mesh(devices=jax.devices()[:1])
  return trainer_lib.Trainer(objective, optimizers.adamw(lambda step: 1e-2), one_device)


def _trained(trainer, state):
  for _ in range(3):
    state, _ = trainer.step(state, trainer.put({'images': PICTURES}))
  return state


def _tokens(trainer, params):
  return np.asarray(jax.jit(trainer.objective.evaluate)(params, {'images': PICTURES})['tokens'])


def _assert_only_the_decoder_moved(before, after):
  for part in FROZEN:
    jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before['decoder'], after['decoder'])
  assert all(jax.tree.leaves(moved))


@pytest.fixture(scope='module')
def first_phase(tmp_path_factory):
  """A run of a first phase, with an average of its weights: its folder, trainer and last state."""
  folder = tmp_path_factory.mktemp('first')
  trainer = _trainer(
    tokenizer_objective.TokenizerObjective(CONFIG, revive_every=2, revive_until=100, ema=0.9)
  )
  state = _trained(trainer, trainer.create_state())
  run = checkpoint_manager.Checkpoints(folder)
  run.save(3, state, {}, run_checkpoints.describe(trainer.objective))
  run.close()
  return folder, trainer, jax.device_get(state)


def test_frozen_parts_do_not_move_when_the_same_run_goes_on(first_phase):
  # Momentum that is left behind must not move them either.
  _, trainer, state = first_phase
  second = _trainer(dataclasses.replace(trainer.objective, frozen=FROZEN))
  before = state.params
  state = jax.device_get(_trained(second, jax.device_put(state, second.shardings)))
  _assert_only_the_decoder_moved(before, state.params)
  np.testing.assert_array_equal(_tokens(second, before), _tokens(second, state.params))
  assert fingerprints.of_tokenizer(before) == fingerprints.of_tokenizer(state.params)


def test_a_larger_decoder_learns_the_tokens_of_a_first_phase(first_phase, tmp_path):
  folder, trainer, first = first_phase
  objective = tokenizer_objective.TokenizerObjective(
    dataclasses.replace(CONFIG, decoder_layers=2, decoder_width=16),
    frozen=FROZEN,
    first_phase=str(folder),
    ema=0.9,
  )
  second = _trainer(objective)
  parts = train_loop.initial_parts(second, tmp_path, inputs.Inputs(second.objective, {}, False))
  # The average of the first phase, which is what `tokenize` used.
  averaged = state_lib.averaged(first)
  assert parts.keys() == set(FROZEN)
  for part in FROZEN:
    jax.tree.map(np.testing.assert_array_equal, parts[part], averaged[part])
  begun = second.create_state()
  begun = begun.replace(params=begun.params | parts)
  before = jax.device_get(begun.params)
  after = jax.device_get(_trained(second, begun))
  for params in (after.params, state_lib.averaged(after)):
    _assert_only_the_decoder_moved(before, params)
    np.testing.assert_array_equal(_tokens(second, params), _tokens(trainer, averaged))
    assert fingerprints.of_tokenizer(params) == fingerprints.of_tokenizer(averaged)

  # What draws finds the average.
  run = checkpoint_manager.Checkpoints(tmp_path)
  run.save(3, after, {}, run_checkpoints.describe(objective))
  run.close()
  found = frozen_tokenizer.load(tmp_path)
  assert found.config == objective.model and found.params.keys() == set(tokenizer_objective.PARTS)
  jax.tree.map(np.testing.assert_array_equal, found.params, after.statistics['average'])


def test_a_decoder_of_the_same_size_goes_on_from_the_first_phase(first_phase, tmp_path):
  folder, _, first = first_phase
  second = _trainer(tokenizer_objective.TokenizerObjective(CONFIG, first_phase=str(folder)))
  parts = train_loop.initial_parts(second, tmp_path, inputs.Inputs(second.objective, {}, False))
  jax.tree.map(np.testing.assert_array_equal, parts, dict(state_lib.averaged(first)))


def test_a_first_phase_of_other_sizes_is_named(first_phase, tmp_path):
  folder, _, _ = first_phase
  other = dataclasses.replace(CONFIG, codebook_size=32)
  second = _trainer(tokenizer_objective.TokenizerObjective(other, first_phase=str(folder)))
  with pytest.raises(UserError, match='first_phase=.*codebook_size is 16 there and 32 here'):
    train_loop.initial_parts(second, tmp_path, inputs.Inputs(second.objective, {}, False))
  nowhere = dataclasses.replace(second.objective, first_phase=str(tmp_path / 'nowhere'))
  with pytest.raises(UserError, match='nowhere: no training run there'):
    train_loop.initial_parts(_trainer(nowhere), tmp_path, inputs.Inputs(nowhere, {}, False))


def test_part_that_does_not_exist_is_named():
  with pytest.raises(UserError, match='encodr.*encoder, quantizer and decoder'):
    tokenizer_objective.TokenizerObjective(CONFIG, frozen=('encodr',))

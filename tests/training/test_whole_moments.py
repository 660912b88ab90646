"""Tests checkpoints of earlier versions with whole second moments of attention kernels.

The tests make those versions' optimizer from plain optax.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.checkpoints import whole_moments
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import optimizers
from parti_jax.training import run as run_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective

OBJECTIVE = generator_objective.GeneratorObjective(
  parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=2,
    width=128,
    mlp_width=256,
    heads=4,
    text_vocabulary=192,
    text_length=4,
    codebook_size=160,
    grid=(2, 2),
    dtype='float32',
  )
)
# Two of self-attention, three more of cross-attention.
KERNELS = 7
STEPS = 3


def _adafactor(moment):
  """Parti's optimizer around a transformation that divides by the second moment."""
  return optax.chain(
    optax.clip_by_global_norm(4.0),
    moment,
    optax.ema(0.9, debias=False, accumulator_dtype=jnp.bfloat16),
    optax.add_decayed_weights(4.5e-2, optimizers.decayed),
    optax.scale_by_learning_rate(1e-3),
  )


OLD = _adafactor(
  optax.scale_by_factored_rms(
    decay_rate=0.96, decay_rate_fn=lambda step, rate: jnp.where(step == 0, 0.0, rate)
  )
)
NEW = optimizers.adafactor(1e-3)


def _trainer(optimizer, *sizes, **kwargs):
  sizes = sizes or (1, 1, 1, 1, tuple(jax.devices()[:1]))
  return trainer_lib.Trainer(OBJECTIVE, optimizer, mesh_lib.make_mesh(*sizes), **kwargs)


def _gradients(params, seed):
  draw = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: (
      0.1
      * draw.normal(size=leaf.shape).astype(np.float32)
      * draw.uniform(0.5, 2.0, leaf.shape[-1]).astype(np.float32)
    ),
    params,
  )


@pytest.fixture(scope='module', name='states')
def _states():
  """Returns today's trainer, and states after the same gradients of the old and today's optimizer."""
  trainer = _trainer(NEW)
  first = trainer.create_state()
  found = []
  for optimizer in (OLD, NEW):
    update, state = jax.jit(optimizer.update), optimizer.init(first.params)
    for step in range(STEPS):
      _, state = update(_gradients(first.params, step), state, first.params)
    found.append(first.replace(step=first.step + STEPS, optimizer_state=state))
  return trainer, *found


@pytest.fixture(scope='module', name='folder')
def _folder(states, tmp_path_factory):
  """Makes a run's folder with a checkpoint of the old form."""
  folder = tmp_path_factory.mktemp('run')
  manager = checkpoint_manager.Checkpoints(folder)
  manager.save(STEPS, states[1], {}, run_checkpoints.describe(OBJECTIVE))
  manager.close()
  return folder


def _moment(state):
  return next(part for part in state.optimizer_state if hasattr(part, 'v_row'))


def _restored(folder, trainer):
  manager = checkpoint_manager.Checkpoints(folder)
  state, _ = manager.restore(STEPS, trainer.abstract, run_checkpoints.describe(OBJECTIVE))
  manager.close()
  assert manager.factored == KERNELS
  return state


@pytest.mark.parametrize('sizes, offload', [((), False), ((1, 2, 4), False), ((2, 2, 2), True)])
def test_an_old_checkpoint_is_restored_as_if_it_had_always_been_factored(
  states, folder, sizes, offload
):
  _, old, new = states
  trainer = _trainer(NEW, *sizes, offload_optimizer=offload)
  state = _restored(folder, trainer)
  jax.tree.map(
    lambda leaf, plan: np.testing.assert_equal(
      (leaf.shape, leaf.dtype, leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)),
      (plan.shape, plan.dtype, True),
    ),
    state,
    trainer.abstract,
  )
  state = jax.device_get(state)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), _moment(state), _moment(new)
  )
  # Everything except those moments is bit for bit the same.
  found, saved = run_checkpoints.by_path(state), run_checkpoints.by_path(old)
  changed = [
    name for name in found if np.asarray(found[name]).tobytes() != np.asarray(saved[name]).tobytes()
  ]
  assert len(changed) == 3 * KERNELS
  assert all('attention/project' in name and '/v' in name for name in changed)


class _Examples:
  """Fake data of a run that repeats one batch."""

  batch_size, skipped = 8, {}

  def __init__(self):
    draw = np.random.default_rng(0)
    self._batch = {
      'encoder_input_tokens': draw.integers(3, 192, (8, 4)).astype(np.int32),
      'decoder_target_tokens': draw.integers(0, 160, (8, 4)).astype(np.int32),
      'decoder_loss_weights': np.ones((8, 4), np.float32),
    }

  def restore(self, place):
    del place

  def places(self):
    return []

  def __iter__(self):
    while True:
      yield self._batch


def test_the_run_reports_it_and_continues_as_if_it_had_always_factored(states, folder):
  trainer, old, new = states
  run = run_lib.Run(
    trainer, folder, 2, _Examples(), inputs_lib.Inputs(trainer.objective, {}, False)
  )
  assert f'resuming at step {STEPS}; {whole_moments.line(KERNELS)}' in run.beginning()
  metrics = run.advance()
  # The first moment differed: earlier versions multiplied it in bfloat16.
  optimizer_state = tuple(
    _moment(new) if hasattr(part, 'v_row') else part for part in old.optimizer_state
  )
  right, right_metrics = trainer.step(
    jax.tree.map(jnp.copy, old.replace(optimizer_state=optimizer_state)),
    trainer.put(next(iter(_Examples()))),
  )
  assert float(metrics['loss']) == float(right_metrics['loss'])
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), run.state.params, right.params
  )
  run.close()


def test_a_checkpoint_of_today_is_unchanged(states, tmp_path):
  trainer, _, new = states
  manager = checkpoint_manager.Checkpoints(tmp_path)
  manager.save(STEPS, new, {}, run_checkpoints.describe(OBJECTIVE))
  manager.close()
  manager = checkpoint_manager.Checkpoints(tmp_path)
  state, _ = manager.restore(STEPS, trainer.abstract, run_checkpoints.describe(OBJECTIVE))
  manager.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(new))
  assert manager.factored == 0


def test_a_custom_optimizer_may_keep_them_whole(states, folder):
  trainer = _trainer(OLD)
  manager = checkpoint_manager.Checkpoints(folder)
  state, _ = manager.restore(STEPS, trainer.abstract, run_checkpoints.describe(OBJECTIVE))
  manager.close()
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), jax.device_get(states[1]))
  assert manager.factored == 0

"""t5x.train and our own trainer are the same training."""

import functools

import flax.core
import flax.linen
import jax
import numpy as np
import pytest
import require_t5x  # noqa: F401
import seqio
import tensorflow as tf
from t5x import partitioning
from t5x import train as t5x_train
from t5x import trainer as t5x_trainer
from t5x import utils

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.t5x import models
from parti_jax.t5x import optimizers
from parti_jax.training import optimizers as our_optimizers
from parti_jax.training import trainer as our_trainer
from parti_jax.training.objectives import generator_objective

# Wide enough for Adafactor to factor the moments of the decoder's MLPs.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=2,
  width=128,
  mlp_width=256,
  heads=4,
  text_vocabulary=160,
  text_length=6,
  codebook_size=32,
  grid=(2, 3),
  dropout=0.1,
  dtype='float32',
)
STEPS, BATCH, SEED = 20, 8, 3
OPTIMIZERS = {
  'adafactor': (
    our_optimizers.adafactor,
    our_optimizers.parti_schedule(peak=3e-3, warmup_steps=5, decay_start=10, decay_end=30),
  ),
  'adamw': (our_optimizers.adamw, our_optimizers.warmup_cosine(3e-3, 5, 30)),
}


def _batches():
  """Texts and image tokens, STEPS batches of them; int32 [STEPS, BATCH, length] each."""
  draw = np.random.default_rng(0)
  return {
    'encoder_input_tokens': draw.integers(1, 160, (STEPS, BATCH, 6)).astype(np.int32),
    'decoder_target_tokens': draw.integers(0, 32, (STEPS, BATCH, 6)).astype(np.int32),
    'decoder_loss_weights': np.ones((STEPS, BATCH, 6), np.float32),
  }


class _Losses(t5x_trainer.BaseAction):
  """Keeps the losses that t5x reports of each step."""

  def __init__(self):
    self.found = []

  def run(self, train_state, metrics_by_task):
    self.found.append(metrics_by_task['train']['loss'].value)
    return False


class _OurDropout(t5x_trainer.Trainer):
  """Gives dropout the key of our trainer's step in place of t5x's own."""

  def _get_step_rng(self, step):
    key = jax.random.split(jax.random.fold_in(jax.random.key(SEED), step))[0]
    return jax.random.key_data(key)


def _train_with_t5x(optimizer, schedule, weights, folder):
  """Losses of t5x.train, and its last state; parameters are split two ways along 'model'."""
  model = models.PartiModel(
    parti.Parti(CONFIG), optimizers.OptaxWrapper(optimizer), depth_loss_weights=weights
  )
  losses = _Losses()
  dataset = utils.DatasetConfig(
    'same_batches',
    task_feature_lengths={'inputs': 6, 'targets': 6},
    split='train',
    batch_size=BATCH,
    shuffle=False,
    seed=0,
  )
  step, state = t5x_train.train(
    model=model,
    train_dataset_cfg=dataset,
    train_eval_dataset_cfg=None,
    infer_eval_dataset_cfg=None,
    checkpoint_cfg=utils.CheckpointConfig(save=None, restore=None),
    partitioner=partitioning.PjitPartitioner(num_partitions=2),
    trainer_cls=functools.partial(_OurDropout, learning_rate_fn=schedule, num_microbatches=None),
    model_dir=str(folder),
    total_steps=STEPS,
    eval_steps=0,
    eval_period=0,
    stats_period=1,
    random_seed=SEED,
    summarize_config_fn=lambda *args: None,
    inference_evaluator_cls=seqio.Evaluator,
    concurrent_metrics=False,
    get_dataset_fn=lambda *args: tf.data.Dataset.from_tensor_slices(_batches()),
    actions={'TRAIN': [losses]},
    verify_matching_vocabs_fn=None,
  )
  assert step == STEPS
  return losses.found, state


def _train_with_ours(optimizer, schedule, weights):
  """Losses of our trainer and its last state, from the parameters that t5x begins with."""
  mesh = mesh_lib.make_mesh(tensor=2)
  trainer = our_trainer.Trainer(
    generator_objective.GeneratorObjective(CONFIG, depth_loss_weights=weights),
    optimizer(schedule=schedule),
    mesh,
    seed=SEED,
  )
  key = jax.random.split(jax.random.PRNGKey(SEED))[0]
  params = parti.Parti(CONFIG).init(key, *parti.example_inputs(CONFIG))['params']
  params = jax.tree.map(
    jax.device_put, jax.device_get(flax.linen.meta.unbox(params)), trainer.shardings.params
  )
  state, losses = trainer.create_state().replace(params=params), []
  batches = _batches()
  for step in range(STEPS):
    batch = trainer.put({name: value[step] for name, value in batches.items()})
    state, metrics = trainer.step(state, batch)
    losses.append(float(metrics['loss']))
  return losses, state


@pytest.mark.parametrize('name, weights', [('adafactor', None), ('adamw', (1, 2))])
def test_first_losses_are_equal(name, weights, tmp_path):
  """The same parameters, batches, dropout and optimizer; both on data × 2-way model meshes."""
  theirs, their_state = _train_with_t5x(*OPTIMIZERS[name], weights, tmp_path)
  ours, our_state = _train_with_ours(*OPTIMIZERS[name], weights)
  assert len(theirs) == len(ours) == STEPS and ours[-1] < ours[0] - 0.1
  np.testing.assert_allclose(theirs, ours, rtol=1e-5)
  # What grows from rounding stays small in the parameters too.
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4),
    flax.core.unfreeze(their_state.params),
    our_state.params,
  )

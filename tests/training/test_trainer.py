"""The step: microbatches and an optimizer on the host change nothing, and do what they are for."""

import dataclasses
import functools
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import random_parameters
import tiny_configs

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import coca
from parti_jax.models import discriminator
from parti_jax.models import parti_config
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.partitioning import rules
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import optimizers
from parti_jax.training import run as run_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import super_resolution_objective
from parti_jax.training.objectives import text_encoder_objective
from parti_jax.training.objectives import tokenizer_objective

BATCH = 8


def _generator():
  sizes = dataclasses.replace(tiny_configs.GENERATOR, encoder_layers=1)
  draw = np.random.default_rng(0)
  batch = {
    'encoder_input_tokens': draw.integers(3, 16, (BATCH, 4)).astype(np.int32),
    'decoder_target_tokens': draw.integers(0, 24, (BATCH, 4)).astype(np.int32),
    # Microbatches of different weight.
    'decoder_loss_weights': (np.arange(32).reshape(BATCH, 4) % 7 < 4).astype(np.float32),
  }
  return generator_objective.GeneratorObjective(sizes), batch


def _tokenizer():
  sizes = vit_vqgan.ViTVQGANConfig(
    image_size=8,
    patch_size=4,
    encoder_layers=1,
    encoder_width=16,
    encoder_mlp_width=32,
    encoder_heads=4,
    decoder_layers=1,
    decoder_width=16,
    decoder_mlp_width=32,
    decoder_heads=4,
    codebook_size=16,
    code_dim=4,
    dtype='float32',
  )
  images = np.random.default_rng(1).integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8)
  # Latents from all microbatches are candidates for codes that are revived.
  return tokenizer_objective.TokenizerObjective(
    sizes, revive_every=1, revive_until=5, dead_below=0.01
  ), {'images': images}


def _adversarial(group):
  objective, batch = _tokenizer()
  return dataclasses.replace(
    objective,
    revive_every=0,
    adversarial_weight=0.1,
    discriminator=discriminator.DiscriminatorConfig(
      channels=64, max_channels=8, minibatch_group=group
    ),
  ), batch


def _super_resolution():
  sizes = super_resolution.SuperResolutionConfig(
    factor=2, blocks=1, width=8, expansion=2, dtype='float32'
  )
  images = np.random.default_rng(2).integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
  return super_resolution_objective.SuperResolutionObjective(sizes, 16, crop=4), {'images': images}


COCA = coca.CoCaConfig(
  image_size=8,
  patch_size=4,
  image_layers=1,
  unimodal_layers=1,
  multimodal_layers=1,
  width=16,
  mlp_width=32,
  heads=4,
  caption_queries=4,
  feature_dim=8,
  text_vocabulary=16,
  text_length=8,
  dropout=0.3,
  dtype='float32',
)


def _pairs():
  draw = np.random.default_rng(3)
  texts = draw.integers(3, 16, (BATCH, 8)).astype(np.int32)
  texts *= np.arange(8) < draw.integers(2, 9, BATCH)[:, None]  # Of different lengths.
  return {
    'images': draw.integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8),
    'encoder_input_tokens': texts,
  }


def _ranker():
  return ranker_objective.RankerObjective(COCA, shift=1, noise=0.2), _pairs()


def _text_encoder(contrastive_weight):
  sizes = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    width=16,
    mlp_width=32,
    heads=4,
    text_vocabulary=16,
    text_length=8,
    codebook_size=24,
    grid=(2, 2),
    dropout=0.3,
    dtype='float32',
  )
  return text_encoder_objective.TextEncoderObjective(
    sizes, COCA, contrastive_weight=contrastive_weight
  ), _pairs()


# Objectives and whether their losses compare examples.
LOSSES = {
  'super_resolution': (_super_resolution, False),
  'adversarial': (lambda: _adversarial(1), False),
  'masked': (lambda: _text_encoder(0.0), False),
  'ranker': (_ranker, True),
  'contrastive': (lambda: _text_encoder(1.0), True),
  'minibatch_deviation': (lambda: _adversarial(4), True),
}


@functools.cache
def _stepped(objective_name, microbatches):
  objective, batch = {'generator': _generator, 'tokenizer': _tokenizer}[objective_name]()
  mesh = mesh_lib.make_mesh(tensor=2, devices=jax.devices()[:4])
  trainer = trainer_lib.Trainer(objective, optax.sgd(10.0), mesh, 5, microbatches)
  state, metrics = trainer.step(trainer.create_state(), trainer.put(batch))
  return jax.device_get(state), jax.device_get(metrics)


@pytest.mark.parametrize('objective', ['generator', 'tokenizer'])
def test_microbatches_give_the_step_of_the_whole_batch(objective):
  state, metrics = _stepped(objective, 1)
  other, others = _stepped(objective, 4)
  assert others.keys() == metrics.keys() >= {'loss', 'gradient_norm'}
  for name, value in metrics.items():
    np.testing.assert_allclose(others[name], value, rtol=2e-5, err_msg=name)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, atol=2e-5 * np.abs(a).max()),
    (state.params, state.statistics),
    (other.params, other.statistics),
  )


@pytest.mark.parametrize('name', LOSSES)
def test_losses_that_compare_examples_compare_those_of_a_microbatch(name):
  make, compares = LOSSES[name]
  objective, batch = make()
  batch = jax.tree.map(jnp.asarray, batch)
  assert bool(objective.batch_dependent_terms) == compares

  batch = {name: jnp.asarray(value) for name, value in batch.items()}

  def total(params, microbatches):
    """The loss as the step sums it."""
    losses = []
    for first in range(microbatches):
      part = {name: value[first::microbatches] for name, value in batch.items()}
      rows = jnp.arange(first, BATCH, microbatches, dtype=jnp.uint32)
      loss, _ = objective.loss(
        params, part, layers.DropoutKeys(jax.random.key(1), rows), jnp.int32(0)
      )
      losses.append(loss * objective.weight(part) / objective.weight(batch))
    return sum(losses)

  totals = jax.jit(lambda params: (total(params, 1), total(params, 2)))
  whole, of_parts = totals(random_parameters.of_objective(objective))
  assert (abs(of_parts / whole - 1) > 1e-5) == compares


def test_a_run_says_that_microbatches_change_its_losses(tmp_path):
  objective, _ = _ranker()
  for microbatches in (1, 2):
    trainer = trainer_lib.Trainer(
      objective, optax.sgd(1.0), mesh_lib.make_mesh(devices=jax.devices()[:1]), 0, microbatches
    )
    run = run_lib.Run(
      trainer, tmp_path / str(microbatches), 1, [], inputs_lib.Inputs(objective, {}, False)
    )
    said = 'with train.microbatches=2 each microbatch has its own negatives in the contrastive loss'
    assert (said in run.beginning()) == (microbatches == 2)
    run.close()


def test_microbatches_take_less_memory():
  objective, _ = _generator()
  mesh = mesh_lib.make_mesh(devices=jax.devices()[:1])

  def temporaries(microbatches):
    trainer = trainer_lib.Trainer(objective, optax.sgd(1.0), mesh, 0, microbatches)
    return trainer.lower(512).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(8) < temporaries(1) / 3


def test_microbatches_and_devices_must_divide_the_batch():
  mesh, table = mesh_lib.make_mesh(tensor=2), rules.logical_axis_rules()
  rules.check_batch(24, mesh, table, 2)
  with pytest.raises(UserError, match='train.microbatches=3 times the 4 ways.*multiple of 12'):
    rules.check_batch(16, mesh, table, 3)


def test_the_optimizers_state_may_lie_on_the_host():
  objective, batch = _generator()
  mesh = mesh_lib.make_mesh(tensor=2, devices=jax.devices()[:4])
  ended = []
  for offload in (False, True):
    trainer = trainer_lib.Trainer(
      objective, optimizers.adamw(lambda step: 0.01), mesh, 5, offload_optimizer=offload
    )
    state = trainer.create_state()
    for _ in range(2):
      state, _ = trainer.step(state, trainer.put(batch))
    kinds = {
      leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.optimizer_state) if leaf.shape
    }
    assert kinds == ({'pinned_host'} if offload else {'device'})
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {'device'}
    ended.append(jax.device_get(state))
  jax.tree.map(np.testing.assert_array_equal, *ended)


def test_no_device_holds_logits_of_the_whole_codebook():
  sizes = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=1,
    width=16,
    mlp_width=32,
    heads=4,
    text_vocabulary=16,
    text_length=3,
    codebook_size=88,
    grid=(1, 5),
    dropout=0.0,
    dtype='float32',
  )
  mesh = mesh_lib.make_mesh(data=2, tensor=4)
  trainer = trainer_lib.Trainer(generator_objective.GeneratorObjective(sizes), optax.sgd(1.0), mesh)
  shapes = set(re.findall(r'[a-z0-9]+\[([\d,]+)\]', trainer.lower(14).compile().as_text()))
  values = {shape: np.prod([int(size) for size in shape.split(',')]) for shape in shapes}
  # A device's part is 7 examples, 5 places and 22 codes; all codes would be 88.
  assert values['7,5,22'] == 7 * 5 * 22
  assert max(values.values()) < 7 * 5 * 88


def test_a_pipelines_settings_are_taken_from_gin_when_the_trainer_is_made():
  objective, _ = _generator()
  objective = dataclasses.replace(
    objective, model=dataclasses.replace(objective.model, encoder_layers=2)
  )
  gin_config.parse([], ['pipeline.groups = 2'])
  make = lambda stage: trainer_lib.Trainer(
    objective, optax.sgd(0.1), mesh_lib.make_mesh(stage=stage), microbatches=1
  )
  make(1)
  assert 'pipeline.groups' not in gin_config.operative()
  trainer = make(2)
  # A run's config.gin is written before anything is traced.
  assert 'pipeline.groups = 2' in gin_config.operative()
  gin_config.parse([], [])
  schedules, schedule = [], pipeline_parallelism.schedule
  with mock.patch.object(
    pipeline_parallelism,
    'schedule',
    lambda *args: schedules.append(schedule(*args)) or schedules[-1],
  ):
    trainer.lower(32)
  assert {found.groups for found in schedules if found is not None} == {2}

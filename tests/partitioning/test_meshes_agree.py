"""Tests that a training step gives the same loss and parameters on all meshes of 8 devices.

The step is plain gradient descent with such a large learning rate that the updated parameters
consist mostly of the update. So comparing parameters compares gradients, at their own scale. Adam
or Adafactor would divide each gradient by its size and amplify rounding errors of those near 0.
"""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny_configs

from parti_jax.models import coca
from parti_jax.models import t5_encoder
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective
from parti_jax.training.objectives import ranker_objective
from parti_jax.training.objectives import tokenizer_objective

BATCH = 8
# What is trained, and the sizes of data, fsdp, tensor and stage. The batch is split over both data and
# fsdp. The generator meets each axis; what shares its layers meets as many at once as there are devices.
CASES = [
  ('generator', (8, 1, 1, 1)),
  ('generator', (2, 2, 2, 1)),
  ('generator', (1, 2, 4, 1)),
  ('generator', (2, 1, 2, 2)),
  ('tokenizer', (2, 2, 2, 1)),
  ('tokenizer', (1, 1, 4, 2)),
  ('ranker', (1, 2, 2, 2)),
  ('vqgan', (2, 2, 2, 1)),
  ('with_t5', (1, 2, 2, 2)),
  ('other_blocks', (1, 2, 2, 2)),
]


def _generator():
  sizes = dataclasses.replace(tiny_configs.GENERATOR, attention_patterns=('row', 'column'))
  draw = np.random.default_rng(0)
  text = draw.integers(3, 16, (BATCH, 4)).astype(np.int32)
  text[:, 3] = 1
  text[0] = [1, 0, 0, 0]
  batch = {
    'encoder_input_tokens': text,
    'decoder_target_tokens': draw.integers(0, 24, (BATCH, 4)).astype(np.int32),
    'decoder_loss_weights': np.ones((BATCH, 4), np.float32),
  }
  return generator_objective.GeneratorObjective(sizes), batch, 30.0


def _with_t5():
  encoder = t5_encoder.T5EncoderConfig(
    layers=2,
    width=8,
    mlp_width=16,
    heads=4,
    head_dim=4,
    text_vocabulary=16,
    text_length=4,
    relative_buckets=8,
    relative_distance=16,
    dropout=0.3,
  )
  objective, batch, _ = _generator()
  sizes = dataclasses.replace(objective.model, text_encoder=encoder)
  return generator_objective.GeneratorObjective(sizes), batch, 10.0


def _other_blocks():
  objective, batch, rate = _generator()
  sizes = dataclasses.replace(
    objective.model, norm='rms', mlp='swiglu', qk_norm=True, positions='rotary_2d', kv_heads=2
  )
  return generator_objective.GeneratorObjective(sizes), batch, rate


def _tokenizer():
  sizes = vit_vqgan.ViTVQGANConfig(
    image_size=8,
    patch_size=4,
    encoder_layers=2,
    encoder_width=16,
    encoder_mlp_width=32,
    encoder_heads=4,
    decoder_layers=2,
    decoder_width=16,
    decoder_mlp_width=32,
    decoder_heads=4,
    codebook_size=16,
    code_dim=4,
    dtype='float32',
  )
  # The step revives codes, so that the random choice of codes is compared too.
  stage = tokenizer_objective.TokenizerObjective(
    sizes, revive_every=1, revive_until=5, dead_below=0.01
  )
  images = np.random.default_rng(1).integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8)
  return stage, {'images': images}, 20.0


def _vqgan():
  stage = tokenizer_objective.TokenizerObjective(
    tiny_configs.VQGAN, logit_laplace_weight=0.0, revive_every=1, revive_until=5, dead_below=0.01
  )
  images = np.random.default_rng(1).integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8)
  return stage, {'images': images}, 20.0


def _ranker():
  sizes = coca.CoCaConfig(
    image_size=8,
    patch_size=4,
    image_layers=2,
    unimodal_layers=2,
    multimodal_layers=2,
    width=16,
    mlp_width=32,
    heads=4,
    caption_queries=4,
    feature_dim=8,
    text_vocabulary=16,
    text_length=4,
    dropout=0.3,
    dtype='float32',
  )
  draw = np.random.default_rng(2)
  texts = draw.integers(3, 16, (BATCH, 4)).astype(np.int32)
  texts[:, 3] = 1
  texts[5] = texts[0]
  images = draw.integers(0, 256, (BATCH, 8, 8, 3)).astype(np.uint8)
  return (
    ranker_objective.RankerObjective(sizes, shift=1, noise=0.2),
    {'images': images, 'encoder_input_tokens': texts},
    1.0,
  )


@functools.cache
def _trained(stage_name, sizes):
  """Returns the loss and the parameters before and after a step on a mesh, as NumPy arrays."""
  stage, batch, rate = {
    'generator': _generator,
    'tokenizer': _tokenizer,
    'vqgan': _vqgan,
    'with_t5': _with_t5,
    'other_blocks': _other_blocks,
    'ranker': _ranker,
  }[stage_name]()
  devices = jax.devices()[: np.prod(sizes)]
  mesh = mesh_lib.make_mesh(*sizes, devices=devices)
  trainer = trainer_lib.Trainer(stage, optax.sgd(rate), mesh, seed=5)
  state = trainer.create_state()
  before = jax.device_get(state.params)
  state, metrics = trainer.step(state, trainer.put(batch))
  assert int(state.step) == 1
  kernel = max(jax.tree.leaves(state.params), key=lambda leaf: leaf.size)
  assert len(kernel.addressable_shards) == len(devices)
  return jax.device_get(metrics), before, jax.device_get(state)


@pytest.mark.parametrize(
  'stage', ['generator', 'tokenizer', 'vqgan', 'ranker', 'with_t5', 'other_blocks']
)
def test_the_step_consists_mostly_of_its_update(stage):
  _, before, state = _trained(stage, (1, 1, 1, 1))
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max() / np.abs(b).max(), before, state.params)
  assert np.median(jax.tree.leaves(moved)) > 0.3
  # The ranker's poolers attend evenly at first, so their queries hardly move.
  if stage in ('generator', 'tokenizer'):
    assert min(jax.tree.leaves(moved)) > 0.01


@pytest.mark.parametrize('stage, sizes', CASES)
def test_a_step_gives_the_same_on_all_meshes(stage, sizes):
  metrics, before, state = _trained(stage, (1, 1, 1, 1))
  others, before_there, state_there = _trained(stage, sizes)
  jax.tree.map(np.testing.assert_array_equal, before_there, before)
  np.testing.assert_allclose(others['loss'], metrics['loss'], rtol=1e-5)
  np.testing.assert_allclose(others['gradient_norm'], metrics['gradient_norm'], rtol=1e-5)
  # A norm of a head's four features amplifies rounding errors where they are small.
  error = 3e-5 if stage == 'other_blocks' else 1e-5
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, atol=error * np.abs(a).max()),
    state.params,
    state_there.params,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(b, a, rtol=1e-5),
    state.statistics,
    state_there.statistics,
  )


def test_the_masks_of_dropout_do_not_depend_on_the_mesh():
  # Meshes agree because of this setting of JAX.
  assert jax.config.jax_threefry_partitionable

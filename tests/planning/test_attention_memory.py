"""Tests that a training step compiled for TPU stores no array of all pairs of image tokens."""

import re

import optax
import pytest

from parti_jax.models import parti_config
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import generator_objective


@pytest.mark.tpu_compile
@pytest.mark.slow
def test_no_array_of_all_pairs_of_positions_in_the_training_step(tpu_devices):
  # 24 · 32 = 768 image tokens, a length that isn't another size of the network.
  sizes = parti_config.PartiConfig(
    encoder_layers=1,
    decoder_layers=2,
    width=256,
    mlp_width=512,
    heads=4,
    text_vocabulary=512,
    text_length=128,
    codebook_size=1024,
    grid=(24, 32),
    remat='block_inputs',
    attention_patterns=('conv', 'column'),
  )
  mesh = mesh_lib.make_mesh(data=2, tensor=2, devices=tpu_devices)
  trainer = trainer_lib.Trainer(generator_objective.GeneratorObjective(sizes), optax.sgd(1.0), mesh)
  text = trainer.lower(8).compile().as_text()
  assert 'tpu_custom_call' in text  # The fused kernel, forward and backward.
  shapes = {tuple(map(int, sizes.split(','))) for sizes in re.findall(r'\[([\d,]+)\]', text)}
  # The network's activations exist, [batch / data, length, width].
  assert (4, 768, 256) in shapes
  # Not even the mask has both positions in its shape, since the kernel reads it in blocks.
  assert not [shape for shape in shapes if shape.count(768) > 1]

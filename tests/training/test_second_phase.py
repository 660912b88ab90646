"""The tokenizer's second phase: its decoder learns, its tokens stay (Parti, section 2.1)."""

import dataclasses

import jax
import numpy as np
import pytest

from parti_jax.errors import UserError
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh
from parti_jax.training import frozen_tokenizer
from parti_jax.training import optimizers
from parti_jax.training import tokenizer_stage
from parti_jax.training import trainer as trainer_lib

CONFIG = vit_vqgan.ViTVQGANConfig(
    image_size=8, patch_size=4, encoder_layers=1, encoder_width=8, encoder_mlp_width=16,
    encoder_heads=2, decoder_layers=1, decoder_width=8, decoder_mlp_width=16, decoder_heads=2,
    codebook_size=16, code_dim=4, dtype='float32')


def test_frozen_parts_do_not_move_and_tokens_stay_the_same():
  pictures = np.random.default_rng(0).integers(0, 256, (8, 8, 8, 3), np.uint8)
  first = tokenizer_stage.TokenizerStage(CONFIG, revive_every=2, revive_until=100)
  second = dataclasses.replace(first, frozen=('encoder', 'quantizer'))
  one_device = mesh.make_mesh(devices=jax.devices()[:1])
  trainers = [trainer_lib.Trainer(stage, optimizers.adamw(lambda step: 1e-2), one_device)
              for stage in (first, second)]
  batch = trainers[0].put({'images': pictures})
  state = trainers[0].create_state()
  for _ in range(3):  # Leaves momentum behind, which must not move what is frozen then.
    state, _ = trainers[0].step(state, batch)
  before = jax.device_get(state.params)
  tokens = trainers[1].stage.evaluate(state.params, {'images': pictures})['tokens']
  for _ in range(3):
    state, _ = trainers[1].step(state, batch)
  after = jax.device_get(state.params)
  for part in ('encoder', 'quantizer'):
    jax.tree.map(np.testing.assert_array_equal, before[part], after[part])
  moved = jax.tree.map(lambda a, b: not np.array_equal(a, b), before['decoder'], after['decoder'])
  assert all(jax.tree.leaves(moved))
  np.testing.assert_array_equal(
      trainers[1].stage.evaluate(state.params, {'images': pictures})['tokens'], tokens)
  assert frozen_tokenizer.fingerprint(before) == frozen_tokenizer.fingerprint(after)


def test_part_that_does_not_exist_is_named():
  with pytest.raises(UserError, match='encodr.*encoder, quantizer and decoder'):
    tokenizer_stage.TokenizerStage(CONFIG, frozen=('encodr',))

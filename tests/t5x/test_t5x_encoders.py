"""T5 encoders from t5x's own checkpoints, in both formats, against t5x's network."""

import dataclasses

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import require_t5x  # noqa: F401
from t5x import adafactor
from t5x import checkpoints
from t5x import partitioning
from t5x import train_state
from t5x.examples.t5 import network

from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import t5
from parti_jax.models import t5_encoder


def _save(folder, variables, own_format):
  optimizer = adafactor.Adafactor(
    0.1, logical_factor_rules=adafactor.standard_logical_factor_rules()
  )
  state = train_state.FlaxOptimTrainState.create(optimizer, variables)
  partitioner = partitioning.PjitPartitioner(num_partitions=1)
  if own_format:
    checkpoints.Checkpointer(state, partitioner, str(folder)).save(state)
  else:
    manager = checkpoints.OrbaxCheckpointManagerInterface(str(folder), state, partitioner)
    manager.save(state)
    manager.close()


@pytest.mark.parametrize(
  'own_format, activations', [(True, ('relu',)), (False, ('gelu', 'linear'))]
)
def test_the_encoder_is_that_of_t5x(tmp_path, own_format, activations):
  model = network.Transformer(
    network.T5Config(
      vocab_size=48,
      emb_dim=16,
      num_heads=4,
      num_encoder_layers=2,
      num_decoder_layers=1,
      head_dim=6,
      mlp_dim=24,
      mlp_activations=activations,
    )
  )
  texts = np.random.default_rng(0).integers(1, 48, (3, 37)).astype(np.int32)
  texts[1, 5:] = texts[2, 20:] = 0
  texts = jnp.asarray(texts)
  variables = model.init(jax.random.key(0), texts, texts, texts, enable_dropout=False)
  _save(tmp_path, variables, own_format)
  arrays = files.open_weights([str(tmp_path / 'checkpoint_0')]).arrays
  config = dataclasses.replace(t5.config_of(arrays), dtype='float32')
  sources = t5.key_map(config, arrays)
  params = jax.tree.map(np.asarray, key_map.convert(sources, arrays))
  params = flax.traverse_util.unflatten_dict(params, sep='/')
  found = t5_encoder.T5Encoder(config).apply({'params': params}, texts)
  expected = model.apply(
    {'params': variables['params']}, texts, enable_dropout=False, method='encode'
  )
  # What is at padding is never looked at, and t5x has other values there.
  kept = np.asarray(texts) > 0
  np.testing.assert_allclose(np.asarray(found)[kept], np.asarray(expected)[kept], atol=1e-5)

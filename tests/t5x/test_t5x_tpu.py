"""t5x's training step of Parti for TPUs that are not there: its mesh, and what is lowered."""

import re
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
import require_t5x  # noqa: F401
from t5x import partitioning
from t5x import trainer as t5x_trainer
from t5x import utils

from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.planning import topology
from parti_jax.t5x import models
from parti_jax.t5x import optimizers
from parti_jax.t5x import workarounds
from parti_jax.training import optimizers as our_optimizers

# The attention kernel takes sequences of multiples of 128.
CONFIG = parti_config.PartiConfig(
  encoder_layers=1,
  decoder_layers=1,
  width=256,
  mlp_width=512,
  heads=2,
  text_vocabulary=160,
  text_length=8,
  codebook_size=64,
  grid=(16, 8),
  dropout=0.1,
)


@pytest.mark.parametrize(
  'partitions, bounds, submesh',
  [
    (1, (16, 16, 1, 1), (1, 1, 1, 1)),
    (4, (8, 8, 8, 1), (4, 1, 1, 1)),
    (8, (4, 4, 8, 1), (1, 1, 8, 1)),  # A ring before a line.
    (16, (8, 8, 8, 1), (8, 2, 1, 1)),
    (4, (4, 4, 4, 2), (2, 1, 1, 2)),
  ],
)
def test_part_of_a_slice_that_the_model_is_split_over(partitions, bounds, submesh):
  assert workarounds.tpu_submesh(partitions, bounds) == submesh


def test_number_of_partitions_that_a_slice_does_not_have():
  with pytest.raises(ValueError, match='num_partitions=3'):
    workarounds.tpu_submesh(3, (4, 4, 4, 1))


@pytest.mark.tpu_compile
def test_several_slices_need_their_shapes():
  """By the coordinates of their chips t5x would take one of them."""
  pytest.importorskip('libtpu', reason='no TPU to lower for (pip install "parti_jax[tpu]")')
  devices = topology.parse('2xv5e:2x2').devices()
  with mock.patch.object(jax, 'devices', lambda *_: devices):
    with pytest.raises(ValueError, match='2 slices: .*PjitPartitioner.ici_mesh_shape'):
      partitioning.default_mesh(2)


@pytest.mark.tpu_compile
@pytest.mark.parametrize(
  'name, shapes_of_slices, mesh, rows',
  [
    ('v5e:2x2', {}, {'data': 2, 'model': 2}, 4),
    (
      '2xv5e:2x2',
      {'ici_mesh_shape': (1, 2, 2), 'dcn_mesh_shape': (2, 1, 1)},
      {'replica': 2, 'data': 2, 'model': 2},
      2,
    ),
  ],
)
def test_step_on_a_tpu_that_t5x_does_not_know(name, shapes_of_slices, mesh, rows):
  """Each device has its own examples, heads and codes, in the kernel too; nothing is computed."""
  pytest.importorskip('libtpu', reason='no TPU to lower for (pip install "parti_jax[tpu]")')
  devices = topology.parse(name).devices()
  shapes = {
    'encoder_input_tokens': (8, 8),
    'decoder_target_tokens': (8, 128),
    'decoder_loss_weights': (8, 128),
  }
  types = dict(zip(shapes, (jnp.int32, jnp.int32, jnp.float32)))
  model = models.PartiModel(parti.Parti(CONFIG), optimizers.OptaxWrapper(our_optimizers.adafactor))
  with (
    mock.patch.object(jax, 'devices', lambda *_: devices),
    mock.patch.object(jax, 'local_devices', lambda *_: devices),
  ):
    partitioner = partitioning.PjitPartitioner(num_partitions=2, **shapes_of_slices)
    initializer = utils.TrainStateInitializer(
      model.optimizer_def, model.get_initial_variables, shapes, partitioner, types
    )
    trainer = t5x_trainer.Trainer(
      model,
      initializer.global_train_state_shape,
      partitioner,
      [],
      None,
      initializer.train_state_axes,
      jax.random.PRNGKey(0),
      lambda step: 1e-3,
      num_microbatches=None,
    )
    batch = {name: jax.ShapeDtypeStruct(shapes[name], types[name]) for name in shapes}
    step = trainer._partitioned_train_step
    text = step.lower(trainer.train_state, batch).as_text()
  assert dict(partitioner.mesh.shape) == mesh
  kernels = [line for line in text.splitlines() if 'tpu_custom_call' in line]
  # One head of 128 lanes on each device, of queries, keys and values.
  assert kernels and all(f'tensor<3x{rows}x128x128xbf16>' in line for line in kernels)
  batch_axes = ', '.join(f'"{axis}"' for axis in mesh if axis != 'model')
  logits = re.escape(f'[{{{batch_axes}}}, {{}}, {{"model"}}]> : tensor<8x128x64xf32>')
  assert re.search(logits, text)

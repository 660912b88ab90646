"""Tests that the pipeline gives the same loss and gradients as plain layers, and its bubble."""

import collections
import dataclasses
import functools
import os
import subprocess
import sys
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from parti_jax.core import gin_config
from parti_jax.core.errors import UserError
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.partitioning import rules
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import generator_objective

BATCH = 16


def _stage(dropout, remat='block_inputs'):
  # Two types of layers alternate: a visit of one layer selects the type at run time, a visit of
  # two layers doesn't need to.
  return generator_objective.GeneratorObjective(
    parti_config.PartiConfig(
      encoder_layers=8,
      decoder_layers=8,
      width=16,
      mlp_width=32,
      heads=4,
      text_vocabulary=16,
      text_length=4,
      codebook_size=24,
      grid=(2, 2),
      dropout=dropout,
      dtype='float32',
      remat=remat,
      attention_patterns=('column', 'global'),
    )
  )


def _batch():
  draw = np.random.default_rng(0)
  text = draw.integers(3, 16, (BATCH, 4)).astype(np.int32)
  text[0] = [1, 0, 0, 0]
  return {
    'encoder_input_tokens': text,
    'decoder_target_tokens': draw.integers(0, 24, (BATCH, 4)).astype(np.int32),
    'decoder_loss_weights': draw.integers(0, 2, (BATCH, 4)).astype(np.float32),
  }


def _loss(stage, params, batch):
  return stage.loss(params, batch, layers.dropout_keys(jax.random.key(7), BATCH), jnp.int32(0))[0]


@functools.cache
def _params():
  """Returns parameters away from their initial values, so that all of them have gradients."""
  params = nn.meta.unbox(jax.jit(_stage(0.0).init)(jax.random.key(0)))
  draw = np.random.default_rng(1)
  return jax.tree.map(lambda x: np.asarray(x + 0.1 * draw.normal(size=x.shape), np.float32), params)


@functools.cache
def _plain(dropout):
  stage = _stage(dropout)
  return jax.device_get(
    jax.jit(jax.value_and_grad(functools.partial(_loss, stage)))(_params(), _batch())
  )


def _on_mesh(stage, mesh):
  """Returns loss and gradients with parameters and batch split over the mesh."""
  table = rules.logical_axis_rules()
  boxed = jax.eval_shape(stage.init, jax.random.key(0))
  shardings = rules.parameter_shardings(boxed, mesh, table)
  batch_sharding = rules.batch_sharding(mesh, table)
  with rules.partitioned(mesh, table):
    step = jax.jit(
      jax.value_and_grad(functools.partial(_loss, stage)),
      in_shardings=(shardings, batch_sharding),
      out_shardings=(None, shardings),
    )
    compiled = step.lower(_params(), _batch()).compile()
    return jax.device_get(
      compiled(jax.device_put(_params(), shardings), jax.device_put(_batch(), batch_sharding))
    )


@pytest.mark.parametrize(
  'sizes, settings, dropout',
  [
    ({'stage': 2, 'data': 2, 'tensor': 2}, {'groups': 2}, 0.3),
    ({'stage': 2, 'data': 1, 'fsdp': 2, 'tensor': 2}, {'layers_per_visit': 2}, 0.0),
    ({'stage': 4, 'data': 1, 'tensor': 2}, {'groups': 4}, 0.0),
    ({'stage': 8, 'data': 1}, {'groups': 2}, 0.3),
  ],
)
def test_the_pipeline_gives_the_loss_and_gradients_of_plain_layers(sizes, settings, dropout):
  _compare(sizes, settings, dropout)


def _compare(sizes, settings, dropout):
  gin_config.parse([], [f'pipeline.{name}={value}' for name, value in settings.items()])
  loss, gradients = _plain(dropout)
  other, others = _on_mesh(_stage(dropout), mesh_lib.make_mesh(**sizes))
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(others)):
    assert np.abs(a).max() > 0, path
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max(), err_msg=str(path))


@pytest.mark.process
@pytest.mark.slow
def test_eight_stages_with_data_and_tensor_parallelism():
  # Needs 32 devices, and so a separate process.
  environment = os.environ | {'XLA_FLAGS': '--xla_force_host_platform_device_count=32'}
  done = subprocess.run(
    [sys.executable, __file__], env=environment, capture_output=True, text=True, check=False
  )
  assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('remat', ['everything', 'block_inputs_and_attention'])
def test_the_pipeline_gives_the_same_with_all_remat_policies(remat):
  loss, gradients = _plain(0.3)
  mesh = mesh_lib.make_mesh(stage=4, data=2)
  other, others = _on_mesh(_stage(0.3, remat), mesh)
  np.testing.assert_allclose(other, loss, rtol=1e-5)
  for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(others)):
    np.testing.assert_allclose(b, a, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize(
  'plan',
  [
    pipeline_parallelism.Schedule(2, 1, 1, 4),
    pipeline_parallelism.Schedule(4, 3, 2, 1),
    pipeline_parallelism.Schedule(8, 2, 3, 2),
  ],
)
def test_all_microbatches_pass_all_layers_in_order_with_the_expected_bubble(plan):
  seen, idle = collections.defaultdict(list), 0
  for tick in range(plan.ticks):
    for stage in range(plan.stages):
      busy, group, place, visit = plan.work(stage, tick)
      if busy:
        seen[group, place].append((tick, visit * plan.stages + stage))
      else:
        idle += 1
  assert len(seen) == plan.microbatches
  for visits in seen.values():
    ticks, units = zip(*visits)
    assert units == tuple(range(plan.stages * plan.visits))
    # It never waits: the next stage takes it at the next tick.
    assert ticks == tuple(range(ticks[0], ticks[0] + len(units)))
  # Filling and draining a single round: stages · (stages - 1) idle slots for any number of visits.
  assert idle == plan.stages * (plan.stages - 1)
  assert plan.bubble == idle / (plan.ticks * plan.stages)


def test_the_loop_has_as_many_ticks_as_the_schedule():
  turns = []

  def layer(params, index, index_in_visit, x):
    del index, index_in_visit
    return x * params

  def count(jaxpr):
    for equation in jaxpr.eqns:
      if equation.primitive.name == 'scan':
        turns.append(equation.params['length'])
      for value in equation.params.values():
        inner = getattr(value, 'jaxpr', value)
        if hasattr(inner, 'eqns'):
          count(inner)

  two_groups = pipeline_parallelism.use(pipeline_parallelism.Settings(groups=2))
  mesh = mesh_lib.make_mesh(stage=4, data=2)
  with rules.partitioned(mesh, rules.logical_axis_rules()), two_groups:
    plan = pipeline_parallelism.schedule(8, BATCH)
    run = lambda stacked, x: pipeline_parallelism.run(
      layer, lambda visit: visit, stacked, x, (), plan
    )
    count(jax.make_jaxpr(jax.jit(run))(jnp.ones((8, 1)), jnp.ones((BATCH, 1, 1))).jaxpr)
  # Two groups of four microbatches, two visits each; three ticks of bubble.
  assert turns == [2 * 4 * 2 + 3]


@pytest.mark.parametrize('stages, visits', [(2, 4), (4, 4), (4, 3), (8, 2), (16, 4), (3, 5)])
def test_transfers_give_each_stage_one_unit_per_round(stages, visits):
  rounds = pipeline_parallelism.transfers(stages, visits)
  assert sorted(unit for units in rounds for unit in units) == list(range(stages * visits))
  for units in rounds:
    assert [unit // visits for unit in units] == list(range(stages))
    assert sorted(unit % stages for unit in units) == list(range(stages))


def test_a_schedule_needs_stages_and_enough_examples():
  with mesh_lib.use(mesh_lib.make_mesh(data=8)):
    assert pipeline_parallelism.schedule(8, 16) is None
  with mesh_lib.use(mesh_lib.make_mesh(stage=4)):
    assert pipeline_parallelism.schedule(8, 16) == pipeline_parallelism.Schedule(4, 1, 2, 1)
    with pipeline_parallelism.use(pipeline_parallelism.Settings(groups=4, layers_per_visit=2)):
      # Of 16 examples 2 are left for each.
      assert pipeline_parallelism.schedule(8, 16) == pipeline_parallelism.Schedule(4, 2, 1, 2)
    assert pipeline_parallelism.schedule(8, 3) is None
    with pytest.raises(UserError, match="6 layers can't be divided among make_mesh.stage=4"):
      pipeline_parallelism.schedule(6, 16)


if __name__ == '__main__':
  assert len(jax.devices()) == 32
  for rate in (0.3, 0.0):
    _compare({'stage': 8, 'data': 2, 'tensor': 2}, {}, rate)
    _compare({'stage': 4, 'data': 2, 'fsdp': 2, 'tensor': 2}, {}, rate)


def test_pictures_work_with_a_tokenizer_whose_layers_do_not_divide():
  sizes = vit_vqgan.ViTVQGANConfig(
    image_size=8,
    patch_size=4,
    codebook_size=24,
    code_dim=4,
    dtype='float32',
    **{
      f'{part}_{name}': value
      for part in ('encoder', 'decoder')
      for name, value in (('layers', 1), ('width', 8), ('mlp_width', 16), ('heads', 2))
    },
  )
  init = jax.jit(lambda key: vit_vqgan.ViTVQGAN(sizes).init(key, *vit_vqgan.example_inputs(sizes)))
  params = nn.meta.unbox(init(jax.random.key(0))['params'])
  frozen = frozen_tokenizer.FrozenTokenizer('run', sizes, params)
  stage = _stage(0.0)
  model = dataclasses.replace(stage.model, encoder_layers=2, decoder_layers=2)
  stage = dataclasses.replace(stage, model=model, tokenizer='run')

  def pictures(stages):
    mesh = mesh_lib.make_mesh(data=1, stage=stages, devices=jax.devices()[:stages])
    with mock.patch.object(type(stage), 'frozen_tokenizer', frozen):
      trainer = trainer_lib.Trainer(stage, optax.sgd(0.1), mesh)
      return trainer.pictures(trainer.create_state().params, _batch())['samples']

  # Uses given images, since rounding may change sampled ones.
  np.testing.assert_array_equal(pictures(2)[:, :, :8], pictures(1)[:, :, :8])

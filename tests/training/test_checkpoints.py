"""Tests checkpoints: round trips, and missing, unfinished or incompatible ones."""

import dataclasses
import os
import shutil

import jax
import numpy as np
import optax
import pytest
import tiny_configs
from etils import epath

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.core.errors import UserError
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import optimizers
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import tokenizer_objective

SIZES = dataclasses.replace(tiny_configs.TOKENIZER, encoder_width=16, decoder_width=16)
PLACE = {'epoch': 2, 'taken': 5}


def _trainer(optimizer=None, mesh=(8, 1, 1), **changes):
  objective = tokenizer_objective.TokenizerObjective(dataclasses.replace(SIZES, **changes))
  return trainer_lib.Trainer(
    objective, optimizer or optimizers.adafactor(0.1), mesh_lib.make_mesh(*mesh), seed=0
  )


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """Returns a run's folder with checkpoints of steps 3 and 7, its trainer and the last state."""
  folder = tmp_path_factory.mktemp('run')
  trainer = _trainer()
  state = trainer.create_state()
  manager = checkpoint_manager.Checkpoints(folder, keep=2)
  for step in (1, 3, 7):
    state = state.replace(step=state.step * 0 + step)
    manager.save(step, state, PLACE, run_checkpoints.describe(trainer.objective))
  manager.close()
  return folder, trainer, state


def _restored(folder, trainer, step=7):
  manager = checkpoint_manager.Checkpoints(folder)
  try:
    return manager.restore(step, trainer.abstract, run_checkpoints.describe(trainer.objective))
  finally:
    manager.close()


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_a_state_is_restored_bit_for_bit_with_its_position_in_the_data(saved):
  folder, trainer, state = saved
  restored, place = _restored(folder, trainer)
  _assert_same(restored, state)
  assert place == PLACE
  for leaf, plan in zip(jax.tree.leaves(restored), jax.tree.leaves(trainer.abstract)):
    assert leaf.dtype == plan.dtype
    assert leaf.sharding.is_equivalent_to(plan.sharding, leaf.ndim)


def test_a_checkpoint_is_read_onto_another_mesh(saved):
  folder, _, state = saved
  other = _trainer(mesh=(2, 2, 2))
  restored, _ = _restored(folder, other)
  _assert_same(restored, state)
  kernel = restored.params['encoder']['project_hidden']['kernel']
  assert kernel.addressable_shards[0].data.shape == (8, 8)


def test_the_last_few_are_kept(saved):
  folder, _, _ = saved
  assert sorted(path.name for path in (folder / 'checkpoints').iterdir()) == ['3', '7']
  assert run_checkpoints.latest_checkpoint(folder) == folder / 'checkpoints' / '7'


def test_parameters_are_read_without_the_rest(saved):
  folder, _, state = saved
  path = run_checkpoints.latest_checkpoint(folder)
  sizes = run_checkpoints.read_config(path, 'tokenizer')
  assert sizes == SIZES
  params = run_checkpoints.read_params(
    path, vit_vqgan.ViTVQGAN(sizes), vit_vqgan.example_inputs(sizes)
  )
  _assert_same(params, state.params)
  assert {device for leaf in jax.tree.leaves(params) for device in leaf.devices()} == {
    jax.local_devices()[0]
  }


def test_parameters_of_another_shape_are_named(saved):
  sizes = dataclasses.replace(SIZES, code_dim=4)
  with pytest.raises(UserError) as caught:
    run_checkpoints.read_params(
      run_checkpoints.latest_checkpoint(saved[0]),
      vit_vqgan.ViTVQGAN(sizes),
      vit_vqgan.example_inputs(sizes),
    )
  for word in ('params/quantizer/codebook/table', '(6, 3)', '(6, 4)'):
    assert word in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'changes, words',
  [
    (
      {'decoder_width': 32, 'codebook_size': 7},
      ['decoder_width is 16 there and 32 here', 'codebook_size is 6 there and 7 here'],
    ),
    ({'patch_size': 2}, ['patch_size is 4 there and 2 here']),
    ({'encoder_heads': 4}, ['encoder_heads is 2 there and 4 here']),
  ],
)
def test_settings_that_differ_are_named(saved, changes, words):
  with pytest.raises(UserError, match='has another configuration') as caught:
    _restored(saved[0], _trainer(**changes))
  assert all(word in str(caught.value) for word in words)


def test_settings_that_change_no_parameter_may_differ(saved):
  folder, _, state = saved
  restored, _ = _restored(folder, _trainer(unroll=2, remat='dots', dtype='bfloat16'))
  _assert_same(restored.params, state.params)


def test_the_state_of_another_optimizer_is_named(saved):
  with pytest.raises(UserError, match='does not fit this configuration.*optimizer_state'):
    _restored(saved[0], _trainer(optimizers.adamw(0.1)))
  # Also an optimizer with less state than the checkpoint's.
  with pytest.raises(UserError, match='optimizer_state/.* is not in this configuration'):
    _restored(saved[0], _trainer(optax.sgd(0.1)))


def test_a_checkpoint_of_another_objective_is_named(saved):
  folder, _, _ = saved
  path = run_checkpoints.latest_checkpoint(folder)
  model = run_checkpoints.read_model(path)
  with pytest.raises(UserError, match="objective 'tokenizer', not of 'generator'"):
    run_checkpoints.check_same_model(path, model, {'stage': 'generator', 'config': {}})
  with pytest.raises(UserError, match="objective 'tokenizer'; give a run of 'generator'"):
    run_checkpoints.read_config(path, 'generator')


def test_a_missing_run_is_named(tmp_path):
  with pytest.raises(UserError, match='nowhere: no training run there.*--model_dir'):
    run_checkpoints.latest_checkpoint(tmp_path / 'nowhere')
  (tmp_path / 'begun' / 'checkpoints').mkdir(parents=True)
  with pytest.raises(UserError, match='begun: holds no finished checkpoint yet'):
    run_checkpoints.latest_checkpoint(tmp_path / 'begun')


def test_a_checkpoint_that_was_being_written_does_not_count(saved, tmp_path):
  folder, trainer, state = saved
  copy = tmp_path / 'run'
  shutil.copytree(folder, copy)
  unfinished = copy / 'checkpoints' / '9.orbax-checkpoint-tmp'
  shutil.copytree(copy / 'checkpoints' / '7', unfinished)
  assert run_checkpoints.latest_checkpoint(copy).name == '7'
  manager = checkpoint_manager.Checkpoints(copy)
  assert manager.latest_step() == 7
  manager.close()
  _assert_same(_restored(copy, trainer)[0], state)
  assert not unfinished.exists()  # The resumed run removes it.


@pytest.mark.parametrize('lost', ['model', 'state'])
def test_a_checkpoint_with_a_missing_part_is_not_used(saved, tmp_path, lost):
  folder, trainer, _ = saved
  copy = tmp_path / 'run'
  shutil.copytree(folder, copy)
  path = epath.Path(copy / 'checkpoints' / '7')
  shutil.rmtree(path / lost)
  with pytest.raises(UserError, match='7: not a finished checkpoint of this package'):
    run_checkpoints.read_config(path, 'tokenizer')
    run_checkpoints.read_params(path, vit_vqgan.ViTVQGAN(SIZES), vit_vqgan.example_inputs(SIZES))
  assert run_checkpoints.latest_checkpoint(copy).name == '3'
  manager = checkpoint_manager.Checkpoints(copy)
  manager.close()
  assert manager.latest_step() == 3 and manager.found.damaged[0].step == 7


def test_a_run_in_cloud_storage_is_not_taken_for_a_local_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert os.fspath(run_checkpoints.folder('gs://bucket/run')) == 'gs://bucket/run/checkpoints'
  assert os.fspath(run_checkpoints.folder('run')) == str(tmp_path / 'run' / 'checkpoints')


def test_a_checkpoint_from_before_attention_patterns_is_of_global_attention():
  sizes = dataclasses.asdict(parti_config.PartiConfig())
  older = {
    'stage': 'generator',
    'config': {
      name: value
      for name, value in sizes.items()
      if name not in ('attention_patterns', 'conv_kernel')
    },
  }
  run_checkpoints.check_same_model('run', older, {'stage': 'generator', 'config': sizes})
  conv = {'stage': 'generator', 'config': sizes | {'attention_patterns': ('conv',)}}
  message = r"attention_patterns is \('global',\) there and \('conv',\) here"
  with pytest.raises(UserError, match=message):
    run_checkpoints.check_same_model('run', older, conv)
  # Patterns used to have another name and to be the same in all layers.
  older['config'] |= {'attention_pattern': 'conv', 'conv_kernel': 11}
  run_checkpoints.check_same_model('run', older, conv)


def test_a_store_whose_package_is_missing_names_the_extra(monkeypatch):
  def fail(*_):
    raise ImportError('Please install gcsfs') from ModuleNotFoundError("No module named 'gcsfs'")

  monkeypatch.setattr('fsspec.get_filesystem_class', fail)
  with pytest.raises(UserError, match=r'gs://b/run: .*pip install "parti_jax\[gcs\]"'):
    run_checkpoints.folder('gs://b/run')

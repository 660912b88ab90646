"""Tests checkpoints in stores that Orbax can't write to: uploads, verification and removal."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import remote_staging
from parti_jax.checkpoints import run_checkpoints
from parti_jax.cli import main
from parti_jax.core import errors
from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.sampling import text_to_image
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop

PLACE, MODEL = {'epoch': 2}, {'stage': 'generator', 'config': {}}


def _save(run, *steps):
  manager = checkpoint_manager.Checkpoints(run, keep=2)
  for step in steps:
    manager.save(step, {'a': jnp.arange(4.0) + step}, PLACE, MODEL)
  manager.close()
  return manager.found


def _damage(run, step):
  within = f'checkpoints/{step}/state/d/'
  file = next(name for name in storage.sizes(run) if name.startswith(within))
  storage.write(storage.join(run, file), b'too short')


def test_checkpoints_on_s3(s3_bucket, tmp_path, capsys):
  run = f'{s3_bucket}/{tmp_path.name}'
  folder = storage.join(run, 'checkpoints')
  assert not run_checkpoints.has_checkpoint(run)
  with pytest.raises(errors.UserError, match='no training run there'):
    run_checkpoints.latest_checkpoint(run)
  assert _save(run, 1, 2, 3).step is None
  assert storage.names(folder) == ['2', '3'] and remote_staging.steps(run) == [2, 3]
  # An interrupted upload doesn't count, and its step is written again.
  storage.write(f'{folder}/4/state/d/left', 'left')
  assert run_checkpoints.has_checkpoint(run) and remote_staging.steps(run) == [2, 3]
  _damage(run, 3)
  copy = run_checkpoints.latest_checkpoint(run)
  assert copy.name == '2' and run_checkpoints.read_place(copy) == PLACE
  assert 'checkpoint 3 is damaged: ' in capsys.readouterr().err
  assert storage.names(folder) == ['2', '3', '4']
  found = _save(run, 4)
  assert found.step == 2 and 'truncated (9 of' in found.damaged[0].fault
  assert storage.names(folder) == ['2', '3.damaged', '4']
  assert 'state/d/left' not in storage.sizes(f'{folder}/4')
  storage.remove_folder(f'{folder}/4')
  _damage(run, 2)
  with pytest.raises(errors.UserError, match='no checkpoint there is whole'):
    _save(run, 5)


def test_a_failed_upload_is_reported_and_older_checkpoints_stay(tmp_path, monkeypatch):
  run = f'memory:///{tmp_path.name}'
  _save(run, 1)

  def fail(file, path):
    raise errors.UserError(f'{path}: the store failed')

  monkeypatch.setattr(storage, 'upload', fail)
  with pytest.raises(errors.UserError, match='/2/.*the store failed'):
    _save(run, 2)
  assert remote_staging.steps(run) == [1]


def test_is_needed():
  assert remote_staging.is_needed('s3://bucket/run')
  assert not remote_staging.is_needed('gs://bucket/run') and not remote_staging.is_needed('/run')


def _several(run, processes=2):
  """What each process of several has: its pieces of the arrays, and metadata that all write."""
  found = []
  for process in range(processes):
    staged = remote_staging.Staging(run, 1, process, processes, start=2)
    folder = staged.directory / '1'
    for name in (
      '_CHECKPOINT_METADATA',
      'data/metadata',
      'state/_METADATA',
      'state/a/.zarray',
      'commit_success.txt',
      f'state/a/{process}.0',
      f'state/array_metadatas/process_{process}',
    ):
      (folder / name).parent.mkdir(parents=True, exist_ok=True)
      (folder / name).write_text(f'{process} has {name}')
    manifest.write(folder)
    manifest.seal(folder)
    found.append(staged)
  return found


def test_a_checkpoint_of_several_processes_counts_when_all_have_uploaded_theirs(
  tmp_path, monkeypatch
):
  run = f'memory:///{tmp_path.name}'
  monkeypatch.setattr(remote_staging, '_POLL', 0.01)
  first, second = _several(run)
  # Left by a start that was cut short, and there when the second process begins.
  storage.write(f'{run}/checkpoints/1/{manifest.part_name(1)}', 'left')
  uploaded, written = threading.Event(), storage.write
  monkeypatch.setattr(
    storage,
    'write',
    lambda path, content: (
      written(path, content),
      uploaded.set() if path.endswith(manifest.NAME) else None,
    ),
  )
  storage.write(f'{run}/checkpoints/1/uploading.1', '')
  second.upload(1)
  assert not uploaded.wait(0.2)
  assert 'state/a/1.0' not in storage.sizes(f'{run}/checkpoints/1')
  first.upload(1)
  first.wait()
  second.wait()
  assert remote_staging.steps(run) == [1]
  names = storage.sizes(f'{run}/checkpoints/1')
  assert {'state/a/0.0', 'state/a/1.0', 'state/array_metadatas/process_1'} <= set(names)
  assert not [name for name in names if name.startswith((f'{manifest.NAME}.', 'uploading'))]
  content = storage.read(f'{run}/checkpoints/1/state/a/.zarray', 99)
  assert content == b'0 has state/a/.zarray'
  copy = remote_staging.Staging(run)
  assert manifest.fault(copy.directory / '1') is None
  (copy.directory / '1/state/a/1.0').write_text('other')
  assert 'state/a/1.0' in manifest.fault(copy.directory / '1')


def test_a_process_that_fails_waits_for_no_other(tmp_path):
  run = f'memory:///{tmp_path.name}'
  # The second before the first has begun, the first before the second has uploaded anything.
  for staged in reversed(_several(run)):
    with pytest.raises(KeyError, match='of the run'):
      try:
        staged.upload(1)
        raise KeyError('of the run')
      finally:
        staged.close()
  assert remote_staging.steps(run) == []


def test_models_by_url(s3_bucket, tmp_path, capsys):
  url = f'{s3_bucket}/{tmp_path.name}/model'
  demo = str(text_to_image.DEMO_FOLDER)
  assert main.main(['export', f'--base={demo}', f'--output_dir={url}', '--dtype=float32']) == 0
  vocabulary = storage.join(url, 'vocabulary.model')
  again = ['export', f'--base={url}', f'--vocabulary={vocabulary}', f'--output_dir={url}']
  assert main.main(again) == 2 and 'exists; choose another' in capsys.readouterr().err
  assert main.main([*again, '--overwrite']) == 0
  assert f'try it: parti-jax generate PROMPT --model={url}' in capsys.readouterr().out
  model, base = model_folder.load(url), model_folder.load(demo)
  assert model.stored_as == 'float32' and model.vocabulary_path.is_file()
  jax.tree.map(np.testing.assert_array_equal, model.generator_params, base.generator_params)
  with pytest.raises(errors.UserError, match="no-model isn't a model folder"):
    text_to_image.load(f'{s3_bucket}/no-model')


def test_other_output_by_url_is_refused(capsys):
  assert main.main(['generate', 'a heart', '--output_dir=s3://bucket/tokens']) == 2
  assert 's3://bucket/tokens: only local paths' in capsys.readouterr().err


def _train(run, steps, bindings):
  gin_config.parse(
    ['gin_configs/runs/tiny_generator.gin'],
    [*bindings, f'train.steps={steps}', 'train.checkpoint_every=2', 'train.log_every=1'],
  )
  return train_loop.train(os.fspath(run))


@pytest.mark.slow
def test_a_run_on_s3_resumes_like_one_on_a_disk(s3_bucket, tmp_path, generator_bindings):
  """Tests that a resumed run on S3 ends like an uninterrupted run on a disk."""
  run = f'{s3_bucket}/{tmp_path.name}'
  _train(run, 4, generator_bindings)
  _train(run, 6, generator_bindings)
  _train(tmp_path / 'run', 6, generator_bindings)
  paths = [run_checkpoints.latest_checkpoint(folder) for folder in (run, tmp_path / 'run')]
  assert [path.name for path in paths] == ['6', '6']
  assert run_checkpoints.read_place(paths[0]) == run_checkpoints.read_place(paths[1])
  states = [_arrays(path) for path in paths]
  assert states[0].keys() == states[1].keys() and states[0]
  for name, array in states[0].items():
    np.testing.assert_array_equal(array, states[1][name])
  names = storage.names(run)
  assert {'checkpoints', 'config.gin', 'journal', 'tensorboard'} <= set(names)
  assert 'lock.json' not in names


def _arrays(path):
  import orbax.checkpoint as ocp

  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    tree = checkpointer.metadata(path / 'state').item_metadata.tree
    restored = checkpointer.restore(
      path / 'state',
      args=ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
      ),
    )
  return {
    jax.tree_util.keystr(key): leaf for key, leaf in jax.tree_util.tree_leaves_with_path(restored)
  }

"""Tests that damage to any file of a checkpoint is detected, and the last whole one stays."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import run_checkpoints
from parti_jax.checkpoints import verification
from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import train_loop  # noqa: F401

MODEL = {'stage': 'tokenizer', 'config': {}}


def _truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path):
  path.write_bytes(b'')


def _flip(path, where=0.5):
  content = bytearray(path.read_bytes())
  content[int(len(content) * where)] ^= 4
  path.write_bytes(content)


def _remove(path):
  path.unlink()


DAMAGES = [_truncate, _empty, _flip, _remove]


def _state(step, size=8):
  draw = np.random.default_rng(step)
  return {
    'step': jnp.asarray(step),
    'params': {name: jnp.asarray(draw.normal(size=(size, 4)), jnp.float32) for name in ('a', 'b')},
  }


def _save(manager, step):
  manager.save(step, _state(step), {'place': step}, MODEL)


def _write(folder, steps, keep=2):
  manager = checkpoint_manager.Checkpoints(folder, keep)
  for step in steps:
    _save(manager, step)
  manager.close()
  return folder


def _steps(folder):
  return sorted(path.name for path in (folder / 'checkpoints').iterdir())


def _newest(directory):
  return verification.newest_whole(epath.Path(directory))


def _fault(folder, *share):
  return manifest.fault(epath.Path(folder), *share)


def _all_files(folder):
  return [path for path in sorted(folder.rglob('*')) if path.is_file()]


@pytest.fixture(name='written', scope='module')
def _written(tmp_path_factory):
  """Makes a run's folder with whole checkpoints of steps 300 and 400."""
  return _write(tmp_path_factory.mktemp('written'), (300, 400))


@pytest.fixture(name='run')
def _run(written, tmp_path):
  """Makes a copy of the run."""
  shutil.copytree(written, tmp_path / 'run')
  return tmp_path / 'run'


def test_a_manifest_names_all_other_files(written):
  folder = written / 'checkpoints' / '400'
  entries = json.loads((folder / manifest.NAME).read_text())['files']
  there = {str(path.relative_to(folder)) for path in _all_files(folder)} - {manifest.NAME}
  assert set(entries) == there
  assert any('ocdbt' in name for name in entries) and 'data/metadata' in entries
  assert _fault(folder) is None
  assert all(_fault(folder, share, 5) is None for share in range(5))


@pytest.mark.parametrize('damage', DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_to_any_file_is_detected_and_the_older_one_used(run, damage, capsys):
  folder = run / 'checkpoints' / '400'
  files = _all_files(folder)
  assert len(files) > 10
  for path in files:
    before, name = path.read_bytes(), str(path.relative_to(folder))
    damage(path)
    found = _newest(run / 'checkpoints')
    assert found.step == 300, name
    (bad,) = found.damaged
    assert bad.step == 400 and bad.fault.startswith(f'{name} '), name
    # At least one of several processes that divide the files finds it.
    assert any(_fault(folder, share, 3) for share in range(3)), name
    path.write_bytes(before)
  assert _newest(run / 'checkpoints') == verification.Found(400)
  _truncate(files[-1])
  assert run_checkpoints.latest_checkpoint(run).name == '300'
  assert 'checkpoint 400 is damaged: ' in capsys.readouterr().err
  assert _steps(run) == ['300', '400']  # Reading changes nothing.


def test_a_flipped_bit_anywhere_in_the_small_files_is_detected(run):
  folder = run / 'checkpoints' / '400'
  for name in (manifest.NAME, '_CHECKPOINT_METADATA', 'commit_success.txt', 'model/metadata'):
    before = (folder / name).read_bytes()
    for where in np.linspace(0, 0.999, 12):
      _flip(folder / name, where)
      assert _fault(folder), (name, where)
      (folder / name).write_bytes(before)


def test_a_run_goes_on_from_the_whole_one_and_writes_the_step_again(run):
  data = next((run / 'checkpoints' / '400' / 'state' / 'd').iterdir())
  before = data.stat().st_size
  _truncate(data)
  manager = checkpoint_manager.Checkpoints(run)
  assert manager.latest_step() == manager.found.step == 300
  name = f'state/d/{data.name}'
  assert manager.found.lines() == [
    f'checkpoint 400: {name} is truncated ({before // 2} of {before} bytes); resuming from 300: '
    '100 steps are done again'
  ]
  assert _steps(run) == ['300', '400.damaged']
  _save(manager, 400)
  manager.close()
  assert _steps(run) == ['300', '400', '400.damaged']
  assert _newest(run / 'checkpoints') == verification.Found(400)
  # Damage it again.
  _remove(run / 'checkpoints' / '400' / 'commit_success.txt')
  manager = checkpoint_manager.Checkpoints(run)
  _save(manager, 350)
  manager.close()
  assert _steps(run) == ['300', '350', '400.damaged', '400.damaged-2']


def test_without_a_whole_one_nothing_is_touched(run):
  for step in ('300', '400'):
    _empty(run / 'checkpoints' / step / 'state' / '_METADATA')
  before = [(path, path.read_bytes()) for path in _all_files(run)]
  message = (
    'no checkpoint there is whole, and none was changed: checkpoint 400: state/_METADATA '
    r'is truncated \(0 of .*; checkpoint 300: state/_METADATA'
  )
  with pytest.raises(UserError, match=message):
    checkpoint_manager.Checkpoints(run)
  with pytest.raises(UserError, match=message):
    run_checkpoints.latest_checkpoint(run)
  assert [(path, path.read_bytes()) for path in _all_files(run)] == before


def _without_manifest(folder):
  """Turns a checkpoint into one from before manifests."""
  _remove(folder / manifest.NAME)
  metadata = json.loads((folder / '_CHECKPOINT_METADATA').read_text())
  metadata['custom_metadata'] = {}
  (folder / '_CHECKPOINT_METADATA').write_text(json.dumps(metadata))


def test_a_checkpoint_from_before_manifests_is_read_whole(run, monkeypatch):
  monkeypatch.setattr(verification, '_BYTES_AT_ONCE', 1)
  folder = run / 'checkpoints' / '400'
  _without_manifest(folder)
  assert verification.fault(epath.Path(folder)) is None
  lost = 0
  for path in _all_files(folder):
    if path.name in ('_sharding', 'commit_success.txt') or path.parent.name == 'array_metadatas':
      continue  # No array is in them.
    before = path.read_bytes()
    _truncate(path)
    if (found := verification.fault(epath.Path(folder))) is not None:
      assert "can't be read" in found
      lost += 1
    path.write_bytes(before)
  assert lost >= 5
  shutil.rmtree(folder / 'model')
  assert verification.fault(epath.Path(folder)).startswith("model can't be read")


@pytest.mark.parametrize('keep', [1, 2])
def test_the_last_whole_one_stays_when_newer_ones_turn_out_damaged(tmp_path, keep):
  manager = checkpoint_manager.Checkpoints(tmp_path, keep)
  for step in (1, 2, 3, 4):
    _save(manager, step)
    manager.check()
    manager._finish()
    if step > 1:
      assert '1' in _steps(tmp_path)
      _flip(next((tmp_path / 'checkpoints' / str(step) / 'state' / 'd').iterdir()))
  manager.close()
  assert _newest(tmp_path / 'checkpoints').step == 1
  manager = checkpoint_manager.Checkpoints(tmp_path, keep)
  for step in (2, 3, 4):
    _save(manager, step)
  manager.close()
  assert [name for name in _steps(tmp_path) if 'damaged' not in name] == ['3', '4']


def test_while_a_newer_one_is_written_the_last_whole_one_stays(tmp_path, monkeypatch):
  seen = []
  write = manifest.write
  monkeypatch.setattr(
    manifest, 'write', lambda folder: (seen.append(_steps(tmp_path)), write(folder))
  )
  _write(tmp_path, (1, 2, 3), keep=1)
  unfinished = ocp.utils.TMP_DIR_SUFFIX
  assert seen == [[f'1{unfinished}'], ['1', f'2{unfinished}'], ['1', '2', f'3{unfinished}']]
  assert _steps(tmp_path) == ['2', '3']


def test_a_checkpoint_that_was_not_sealed_is_whole(run):
  folder = run / 'checkpoints' / '400'
  late = ('_CHECKPOINT_METADATA', 'commit_success.txt')
  for name in late:
    before = (folder / name).read_bytes()
    _remove(folder / manifest.NAME)
    others = [folder / late_name for late_name in late]
    kept = [path.read_bytes() for path in others]
    for path in others:
      _remove(path)
    manifest.write(epath.Path(folder))  # As just before the commit.
    for path, content in zip(others, kept):
      path.write_bytes(content)
    assert _fault(folder) is None
    for damage in (_truncate, _empty, _remove):
      damage(folder / name)
      assert _fault(folder) == f'{name} is missing or damaged'
      (folder / name).write_bytes(before)
  manifest.seal(epath.Path(folder))
  _flip(folder / 'commit_success.txt', 0.9)
  assert _fault(folder) == 'commit_success.txt has other bytes than were written'


def test_several_processes_hash_their_own_files(run):
  folder = run / 'checkpoints' / '400'
  # Orbax leaves the files like this for process 0 to merge.
  _remove(folder / manifest.NAME)
  other = f'state{ocp.utils.TMP_DIR_SUFFIX}'
  (folder / 'state').rename(folder / other)
  shutil.copytree(folder / other / 'ocdbt.process_0', folder / other / 'ocdbt.process_1')
  for process in (0, 1):
    manifest.write_part(epath.Path(folder), process)
  noted = json.loads((folder / f'{manifest.NAME}.1').read_text())['files']
  assert noted and all(name.startswith('state/ocdbt.process_1/') for name in noted)
  (folder / other).rename(folder / 'state')
  manifest.write(epath.Path(folder))
  assert not list(folder.glob(f'{manifest.NAME}.*')) and _fault(folder) is None
  _flip(next((folder / 'state' / 'ocdbt.process_1' / 'd').iterdir()))
  assert _fault(folder).startswith('state/ocdbt.process_1/d/')


@pytest.mark.slow
def test_the_command_goes_on_from_the_whole_one(tmp_path, generator_bindings, capsys):
  """Tests that `train` skips a damaged checkpoint with a warning, and refuses if none is whole."""
  argv = [
    'train',
    '--gin_file=gin_configs/runs/tiny_generator.gin',
    f'--model_dir={tmp_path}',
    *(f'--gin.{line}' for line in generator_bindings),
    '--gin.train.eval_split=None',
    '--gin.train.pictures_every=0',
    '--gin.train.checkpoint_every=1',
  ]
  assert main.main([*argv, '--gin.train.steps=2']) == 0
  newest = tmp_path / 'checkpoints' / '2'
  path = max(_all_files(newest), key=lambda path: path.stat().st_size)
  _flip(path)
  capsys.readouterr()
  assert main.main([*argv, '--gin.train.steps=2']) == 0
  shown = capsys.readouterr().err
  assert (
    f'checkpoint 2: {path.relative_to(newest)} has other bytes than were written; resuming '
    'from 1: 1 steps are done again'
  ) in shown
  assert 'resuming at step 1' in shown
  assert _steps(tmp_path) == ['1', '2', '2.damaged']
  for step in ('1', '2'):
    _remove(tmp_path / 'checkpoints' / step / 'commit_success.txt')
  assert main.main([*argv, '--gin.train.steps=3']) == 2
  shown = capsys.readouterr().err.splitlines()[-1]
  assert 'no checkpoint there is whole, and none was changed: checkpoint 2: commit_s' in shown
  assert _steps(tmp_path) == ['1', '2', '2.damaged']

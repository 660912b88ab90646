"""Tests of parti_jax.importers.t5x_files: each layout of t5x checkpoints, and damaged ones."""

import flax.traverse_util
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import t5x_checkpoints

from parti_jax.core.errors import UserError
from parti_jax.importers import files


@pytest.fixture
def arrays():
  draw = np.random.default_rng(0)
  return {
    'target/encoder/layers_0/mlp/wi/kernel': draw.normal(size=(4, 6)).astype(np.float32),
    'target/encoder/encoder_norm/scale': draw.normal(size=4).astype(ml_dtypes.bfloat16),
    'target/zeros': np.zeros((2, 3), np.float32),
    'state/param_states/v': draw.normal(size=(3, 1)).astype(np.float32),
    'state/step': np.array(7, np.int32),
  }


def _check(folder, expected):
  weights = files.open_weights([str(folder)])
  assert set(weights.arrays) == set(expected)
  for name, array in expected.items():
    found = weights.arrays[name]
    assert found.shape == array.shape and found.dtype == array.dtype, name
    np.testing.assert_array_equal(found.read(), array)
  return weights


@pytest.mark.parametrize(
  'spec',
  [
    None,
    lambda name: {'kvstore': {'driver': 'file', 'path': name}},
    lambda name: {'kvstore': {'driver': 'gcs', 'bucket': 't5x-dummy-bucket', 'path': f'{name}/'}},
    lambda name: {'kvstore': {'driver': 'gcs', 'bucket': 't5x-dummy-bucket'}, 'path': name},
  ],
)
def test_own_format(tmp_path, arrays, spec):
  folder = tmp_path / 'checkpoint_7'
  small = {'state/count': np.arange(3)}
  t5x_checkpoints.write(folder, arrays, spec, **small)
  _check(folder, arrays | small)


@pytest.mark.parametrize('ocdbt', [False, True])
def test_early_orbax(tmp_path, arrays, ocdbt):
  folder = tmp_path / 'checkpoint_7'
  t5x_checkpoints.write_early_orbax(folder / 'state', arrays, ocdbt)
  _check(folder, arrays)


@pytest.mark.parametrize('zarr3', [False, True])
@pytest.mark.parametrize('ocdbt', [False, True])
def test_orbax(tmp_path, arrays, ocdbt, zarr3):
  folder = tmp_path / 'checkpoint_7'
  tree = flax.traverse_util.unflatten_dict(arrays, sep='/') | {'flax_mutables': {}, 'none': None}
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3)
  with ocp.Checkpointer(ocp.CompositeCheckpointHandler(state=handler)) as checkpointer:
    checkpointer.save(folder, args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree)))
  _check(folder, arrays)
  _check(folder / 'state', arrays)


def test_digest_is_of_all_files(tmp_path, arrays):
  digests = []
  for name in ('a', 'b'):
    t5x_checkpoints.write(tmp_path / name, arrays)
    digests.append(_check(tmp_path / name, arrays).digest())
  (tmp_path / 'b' / 'target.zeros' / '1.0').write_bytes(b'other')
  other = files.open_weights([str(tmp_path / 'b')]).digest()
  assert digests[0] == digests[1] != other


def test_damage_is_named_and_never_read_as_zeros(tmp_path, arrays):
  t5x_checkpoints.write(tmp_path, arrays)
  name = 'target/encoder/layers_0/mlp/wi/kernel'
  chunk = tmp_path / name.replace('/', '.') / '1.0'
  chunk.write_bytes(chunk.read_bytes()[:20])
  found = files.open_weights([str(tmp_path)]).arrays[name]
  with pytest.raises(UserError, match='wi.kernel is damaged or unfinished.*copy the whole folder'):
    found.read()
  chunk.unlink()
  with pytest.raises(UserError, match='wi.kernel is damaged or unfinished.*missing'):
    found.read()
  (chunk.parent / '.zarray').write_text('{')
  with pytest.raises(UserError, match='wi.kernel is damaged or unfinished'):
    files.open_weights([str(tmp_path)])


def test_arrays_that_were_not_copied_are_not_listed(tmp_path, arrays):
  t5x_checkpoints.write(tmp_path, arrays)
  (tmp_path / 'state.step').rename(tmp_path / 'elsewhere')
  del arrays['state/step']
  _check(tmp_path, arrays)


def test_a_damaged_orbax_checkpoint_is_named(tmp_path, arrays):
  folder = tmp_path / 'checkpoint_7'
  with ocp.PyTreeCheckpointer(use_ocdbt=False) as checkpointer:
    checkpointer.save(folder, flax.traverse_util.unflatten_dict(arrays, sep='/'))
  found = files.open_weights([str(folder)]).arrays['target/zeros']
  (folder / 'target.zeros' / '0.0').unlink()
  with pytest.raises(UserError, match='checkpoint_7 is damaged or unfinished'):
    found.read()
  (folder / '_METADATA').write_text('{')
  with pytest.raises(UserError, match='checkpoint_7 is damaged or unfinished'):
    files.open_weights([str(folder)])


@pytest.mark.parametrize('path', ['../secret', '/etc', 'a/b', '..', '', 3])
def test_arrays_elsewhere_are_refused(tmp_path, arrays, path):
  spec = {'kvstore': {'driver': 'file', 'path': path}}
  t5x_checkpoints.write(tmp_path / 'checkpoint_7', arrays, lambda name: spec)
  with pytest.raises(UserError, match=r'is in the folder .*, which is not in '):
    files.open_weights([str(tmp_path / 'checkpoint_7')])


def test_what_is_not_read_is_named(tmp_path, arrays):
  t5x_checkpoints.write(tmp_path / 'a', {'target/a': np.ones((2, 2), np.uint16)}, version=2)
  with pytest.raises(UserError, match='target.a: bfloat16 as t5x wrote it before June 2021'):
    files.open_weights([str(tmp_path / 'a')])
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b' / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-0"\n')
  with pytest.raises(UserError, match="b is a checkpoint of TensorFlow, which isn't read"):
    files.open_weights([str(tmp_path / 'b')])
  t5x_checkpoints.write(tmp_path / 'checkpoint_7', {})
  with pytest.raises(UserError, match='checkpoint_7 holds no arrays'):
    files.open_weights([str(tmp_path / 'checkpoint_7')])
  with pytest.raises(UserError, match=r'give one of its checkpoints, such as .*checkpoint_7'):
    files.open_weights([str(tmp_path)])
  with pytest.raises(UserError, match='of a t5x checkpoint, give the folder'):
    files.open_weights([str(tmp_path / 'checkpoint_7' / 'checkpoint')])

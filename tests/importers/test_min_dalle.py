"""The reader of min-dalle's two files, which must give the arrays of dalle-mini's one.

tests/references/test_dalle_mini.py reads files that min-dalle's own modules make.
"""

import numpy as np
import pytest
import safetensors.numpy
import tiny_dalle_mini

from parti_jax.core.errors import UserError
from parti_jax.importers import min_dalle


@pytest.fixture(name='towers')
def fixture_towers():
  return tiny_dalle_mini.towers()


def _open(folder, towers, order=('encoder', 'decoder')):
  paths = []
  for tower in order:
    paths.append(str(folder / f'{tower}.safetensors'))
    safetensors.numpy.save_file(towers[tower], paths[-1])
  return min_dalle.open_weights(paths)


@pytest.mark.parametrize('order', [('encoder', 'decoder'), ('decoder', 'encoder')])
def test_the_arrays_are_those_of_dalle_mini(tmp_path, towers, order):
  for tower in towers.values():
    # torch's norms have scales, which min-dalle leaves at 1.
    tower['final_ln.weight'] = np.ones(16, np.float32)
    tower['layers.0.pre_self_attn_layer_norm.weight'] = np.ones(16, np.float16)
    tower['layers.1.glu.ln1.weight'] = np.ones(26, np.float32)
  weights = _open(tmp_path, towers, order)
  assert [file.stem for file in weights.files] == list(order)
  expected = tiny_dalle_mini.arrays()
  assert set(weights.arrays) == set(expected)
  for name, array in expected.items():
    assert weights.arrays[name].shape == array.shape
    np.testing.assert_array_equal(weights.arrays[name].read(), array)


def test_what_is_unknown_stays_and_what_is_wrong_is_named(tmp_path, towers):
  towers['encoder']['other.weight'] = np.ones(3, np.float32)
  towers['encoder']['layers.0.other.weight'] = np.ones(3, np.float32)
  found = _open(tmp_path, towers).arrays
  assert {'other.weight', 'layers.0.other.weight'} <= set(found)
  towers['encoder']['final_ln.weight'] = np.full(16, 2, np.float32)
  with pytest.raises(UserError, match=r'final_ln\.weight is not 1 everywhere'):
    _open(tmp_path, towers)
  towers = tiny_dalle_mini.towers()
  del towers['decoder']['layers.0.glu.fc1.weight']
  with pytest.raises(UserError, match=r'the layers that have .*Dense_1/kernel are \[1\]'):
    _open(tmp_path, towers)
  whole = tiny_dalle_mini.towers()['decoder']['layers.0.glu.fc1.weight']
  for wrong in (np.ones((2, 2), np.float32), whole.astype(np.float16)):
    towers['decoder']['layers.0.glu.fc1.weight'] = wrong
    with pytest.raises(UserError, match='Dense_1/kernel have several shapes or dtypes'):
      _open(tmp_path, towers)


def test_both_files_are_needed(tmp_path, towers):
  with pytest.raises(UserError, match='encoder.pt and decoder.pt.*1 files are given, 0 of them'):
    _open(tmp_path, towers, ('encoder',))
  with pytest.raises(UserError, match='2 files are given, 2 of them'):
    _open(tmp_path, {'encoder': towers['decoder'], 'decoder': towers['decoder']})

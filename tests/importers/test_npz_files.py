"""Tests of parti_jax.importers.npz_files; tests/importers/test_files.py has the damaged files."""

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.importers import npz_files

ROWS = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)


@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_rows_and_whole_arrays(tmp_path, save):
  save(tmp_path / 'a.npz', arr_0=ROWS, turned=np.asfortranarray(ROWS[0]), one=np.float64(3))
  found = npz_files.open_npz(tmp_path / 'a.npz')
  assert {name: array.shape for name, array in found.items()} == {
    'arr_0': (5, 4, 3),
    'turned': (4, 3),
    'one': (),
  }
  np.testing.assert_array_equal(found['arr_0'].rows(1, 3), ROWS[1:3])
  np.testing.assert_array_equal(found['arr_0'].rows(0, 5), found['arr_0'].read())
  np.testing.assert_array_equal(found['turned'].read(), ROWS[0])
  assert found['one'].read() == 3
  with pytest.raises(ValueError, match='not stored by rows'):
    found['turned'].rows(0, 1)


def test_equal_contents_have_equal_checksums(tmp_path):
  for name, array in (('a', ROWS), ('b', ROWS), ('c', ROWS + 1)):
    np.savez(tmp_path / f'{name}.npz', arr_0=array)
  first, same, other = (npz_files.open_npz(tmp_path / f'{name}.npz')['arr_0'].crc for name in 'abc')
  assert first == same != other


def test_a_file_that_is_cut_is_refused(tmp_path):
  np.savez(tmp_path / 'a.npz', arr_0=ROWS)
  content = (tmp_path / 'a.npz').read_bytes()
  (tmp_path / 'a.npz').write_bytes(content[:-30])
  with pytest.raises(UserError, match="a.npz isn't a file of numpy.savez, or is damaged"):
    npz_files.open_npz(tmp_path / 'a.npz')

"""Tests of parti_jax.importers.files: each format as its own library writes it, and damaged ones."""

import io
import json
import re
import zipfile

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from parti_jax.core.errors import UserError
from parti_jax.importers import files


@pytest.fixture
def arrays():
  draw = np.random.default_rng(0)
  return {
    'encoder/kernel': draw.normal(size=(3, 4, 5)).astype(np.float32),
    'encoder/bias': draw.normal(size=5).astype(np.float16),
    'table': draw.normal(size=(6, 2)).astype(ml_dtypes.bfloat16),
    'empty': np.zeros((0, 3), np.float32),
    'number': np.array(2.5, np.float64),
    'counts': draw.integers(0, 99, (2, 2)),
  }


def _nested(arrays):
  tree = {}
  for name, array in arrays.items():
    *folders, last = name.split('/')
    place = tree
    for folder in folders:
      place = place.setdefault(folder, {})
    place[last] = array
  return tree


def _check(found, expected):
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].shape == array.shape and found[name].dtype == array.dtype, name
    np.testing.assert_array_equal(found[name].read(), array)


def test_safetensors(tmp_path, arrays):
  safetensors.numpy.save_file(arrays, tmp_path / 'model.safetensors')
  weights = files.open_weights([str(tmp_path / 'model.safetensors')])
  _check(weights.arrays, arrays)
  assert files.open_weights([str(tmp_path)]).digest() == weights.digest()


def test_npz(tmp_path, arrays):
  np.savez(tmp_path / 'model.npz', **arrays)
  _check(files.open_weights([str(tmp_path / 'model.npz')]).arrays, arrays)


def test_python_objects_in_an_npz_are_refused(tmp_path):
  np.savez(tmp_path / 'model.npz', a=np.array([{}], dtype=object))
  with pytest.raises(UserError, match='model.npz: a holds Python objects'):
    files.open_weights([str(tmp_path / 'model.npz')])


def _npy(shape, content, version=1):
  header = io.BytesIO()
  write = {1: np.lib.format.write_array_header_1_0, 2: np.lib.format.write_array_header_2_0}[
    version
  ]
  write(header, {'descr': '<f4', 'fortran_order': False, 'shape': shape})
  return header.getvalue() + content


@pytest.mark.parametrize(
  'members, named',
  [
    ([('a.npy', _npy((2**40,), bytes(8)))], '8 bytes'),
    ([('a.npy', _npy((-2,), bytes(8)))], '8 bytes'),
    ([('a', _npy((2,), bytes(8)))], 'a is not a .npy'),
    ([('a.npy', _npy((2,), bytes(8)))] * 2, 'two of its members have the same name'),
    ([('a.npy', b'none')], 'model.npz'),
  ],
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_hostile_npz(tmp_path, members, named):
  with zipfile.ZipFile(tmp_path / 'model.npz', 'w') as archive:
    for name, content in members:
      archive.writestr(name, content)
  with pytest.raises(UserError, match=named):
    files.open_weights([str(tmp_path / 'model.npz')])


@pytest.mark.parametrize('place', [0.3, 0.5, 0.7])
def test_a_damaged_compressed_npz_is_named(tmp_path, place):
  path = tmp_path / 'model.npz'
  np.savez_compressed(path, a=np.random.default_rng(0).normal(size=500))
  content = bytearray(path.read_bytes())
  start = int(len(content) * place)
  content[start : start + 40] = bytes(40)
  path.write_bytes(content)
  with pytest.raises(UserError, match='model.npz is damaged at a'):
    files.open_weights([str(path)]).arrays['a'].read()


@pytest.mark.parametrize(
  'content',
  ['null', '[]', '{"weight_map": null}', '{"weight_map": {"a": ["b"]}}', '[' * 100_000],
)
def test_what_is_no_index_of_shards_is_named(tmp_path, content):
  (tmp_path / 'model.safetensors.index.json').write_text(content)
  with pytest.raises(UserError, match="isn't an index of shards"):
    files.open_weights([str(tmp_path)])


def test_what_is_not_there_is_named(tmp_path):
  (tmp_path / 'folder.bin').mkdir()
  for path in ('model.safetensors.index.json', 'model.bin'):
    with pytest.raises(UserError, match='does not exist'):
      files.open_weights([str(tmp_path / path)])
  with pytest.raises(UserError, match='has no file of weights'):
    files.open_weights([str(tmp_path)])
  with pytest.raises(UserError, match='name too long'):
    files.open_weights([str(tmp_path / ('x' * 300))])


@pytest.mark.parametrize('name', ['flax_model.msgpack', 'tokenizer_checkpoint'])
def test_flax_msgpack(tmp_path, arrays, name):
  tree = _nested(arrays) | {'step': 3, 'name': 'a tree', 'scalar': np.float32(1.5), 'none': None}
  (tmp_path / name).write_bytes(flax.serialization.msgpack_serialize(tree))
  _check(files.open_weights([str(tmp_path / name)]).arrays, arrays)


def test_flax_msgpack_in_pieces(tmp_path, arrays, monkeypatch):
  monkeypatch.setattr(flax.serialization, 'MAX_CHUNK_SIZE', 32)
  content = flax.serialization.msgpack_serialize(_nested(arrays))
  assert b'__msgpack_chunked_array__' in content
  (tmp_path / 'model.msgpack').write_bytes(content)
  _check(files.open_weights([str(tmp_path / 'model.msgpack')]).arrays, arrays)


def test_shards(tmp_path, arrays):
  names = list(arrays)
  shards = {'a-1.safetensors': names[:2], 'a-2.safetensors': names[2:]}
  for file, own in shards.items():
    safetensors.numpy.save_file({name: arrays[name] for name in own}, tmp_path / file)
  index = tmp_path / 'model.safetensors.index.json'
  weight_map = {name: file for file, own in shards.items() for name in own}
  index.write_text(json.dumps({'weight_map': weight_map}))
  by_hand = files.open_weights([str(tmp_path / file) for file in shards])
  for paths in ([str(index)], [str(tmp_path)]):
    weights = files.open_weights(paths)
    _check(weights.arrays, arrays)
    assert weights.digest() == by_hand.digest()
  (tmp_path / 'a-2.safetensors').unlink()
  with pytest.raises(UserError, match='lacks 1 shards, such as a-2.safetensors'):
    files.open_weights([str(tmp_path)])
  index.write_text(json.dumps({'weight_map': {'a': '../a-1.safetensors'}}))
  with pytest.raises(UserError, match='other folders'):
    files.open_weights([str(tmp_path)])


def test_which_of_several_files_must_be_said(tmp_path, arrays):
  for name in 'ab':
    safetensors.numpy.save_file(arrays, tmp_path / f'{name}.safetensors')
  with pytest.raises(UserError, match='2 files .safetensors: a.safetensors, b.safetensors'):
    files.open_weights([str(tmp_path)])
  both = [str(tmp_path / f'{name}.safetensors') for name in 'ab']
  with pytest.raises(UserError, match='b.safetensors: the array .* is in another'):
    files.open_weights(both)


@pytest.mark.parametrize('ending', ['.safetensors', '.npz', '.msgpack', '.pt'])
def test_cut_files_are_named(tmp_path, arrays, ending):
  path = tmp_path / f'model{ending}'
  if ending == '.safetensors':
    safetensors.numpy.save_file(arrays, path)
  elif ending == '.msgpack':
    path.write_bytes(flax.serialization.msgpack_serialize(_nested(arrays)))
  else:
    del arrays['table']
    with open(path, 'wb') as file:
      np.savez(file, **arrays)
  content = path.read_bytes()
  for length in (0, 1, 20, len(content) // 2, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(UserError, match=re.escape(str(path))):
      files.open_weights([str(path)])


@pytest.mark.parametrize(
  'content',
  [
    b'\x81\xa1a\xc7\x03\x01\x93\x91\x05',
    b'\x81\xa1a\xc9\xff\xff\xff\xff\x01',
    b'\x81\xa1a\xc7\x0c\x01\x93\x91\x05\xa7float32\xc4',
    b'\xdf\xff\xff\xff\xff',
    b'\x81\xa1a' * 5000,
    b'\x81\xc0\xc0',
    b'\xc1',
    b'\x01',
    b'\x81\xa1a\x01\x01',
  ],
)
def test_hostile_msgpack(tmp_path, content):
  (tmp_path / 'model.msgpack').write_bytes(content)
  with pytest.raises(UserError, match='model.msgpack'):
    files.open_weights([str(tmp_path / 'model.msgpack')])


@pytest.mark.parametrize(
  'content, named',
  [
    (b'\x82\xa1a\x01\xa1a\x02', 'two values are named a'),
    (b'\x82\xa3a/b\x01\xa1a\x81\xa1b\x02', 'two values are named a/b'),
    ((b'\x81\xda\x27\x00' + b'k' * 9984) * 2 + b'\x01', 'more than 10000 characters'),
  ],
)
def test_names_in_msgpack_are_unique_and_short(tmp_path, content, named):
  (tmp_path / 'model.msgpack').write_bytes(content)
  with pytest.raises(UserError, match=named):
    files.open_weights([str(tmp_path / 'model.msgpack')])


def test_other_files_are_refused(tmp_path):
  (tmp_path / 'model.h5').write_bytes(b'')
  with pytest.raises(UserError, match='model.h5: weights are read from .safetensors'):
    files.open_weights([str(tmp_path / 'model.h5')])
  with pytest.raises(UserError, match='none.npz does not exist'):
    files.open_weights([str(tmp_path / 'none.npz')])
  with pytest.raises(UserError, match='no file of weights'):
    files.open_weights([str(tmp_path)])

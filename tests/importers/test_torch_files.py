"""Tests of parti_jax.importers.torch_files: what torch writes, and what hostile files hold."""

import collections
import io
import pickle
import re
import sys
import types
import zipfile

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.importers import torch_files


class _Pickler(pickle.Pickler):
  """Writes names that need not exist, and storages as torch does."""

  def persistent_id(self, obj):
    return obj.identity if isinstance(obj, _Storage) else None


class _Storage:
  def __init__(self, kind, key, size):
    self.identity = ('storage', kind, key, 'cpu', size)


@pytest.fixture
def torch_names(monkeypatch):
  """Modules with the names that torch's pickles look up, as pickle insists that they exist."""
  names = {
    'torch._utils': ['_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter'],
    'torch': ['FloatStorage', 'HalfStorage', 'LongStorage'],
    'elsewhere': ['run'],
  }
  found = {}
  for module, functions in names.items():
    made = types.ModuleType(module)
    for name in functions:
      function = types.FunctionType((lambda *_: None).__code__, {}, name)
      function.__module__, function.__qualname__ = module, name
      setattr(made, name, function)
      found[name] = function
    monkeypatch.setitem(sys.modules, module, made)
  return found


class _Call:
  """Pickles as a call of a function."""

  def __init__(self, function, *arguments):
    self._pickled = function, arguments

  def __reduce__(self):
    return self._pickled


def _write(path, value, storages, protocol=2, compression=zipfile.ZIP_STORED):
  program = io.BytesIO()
  _Pickler(program, protocol).dump(value)
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', program.getvalue())
    archive.writestr('archive/byteorder', b'little')
    for key, array in storages.items():
      archive.writestr(f'archive/data/{key}', array.tobytes())
  return path


def _tensor(names, kind, key, size, offset, shape, strides):
  return _Call(
    names['_rebuild_tensor_v2'],
    _Storage(names[kind], key, size),
    offset,
    shape,
    strides,
    False,
    collections.OrderedDict(),
  )


@pytest.mark.parametrize('protocol', [2, 3])
def test_a_tree_of_tensors(tmp_path, torch_names, protocol):
  floats = np.arange(24, dtype=np.float32)
  halves = np.arange(6, dtype=np.float16)
  tensor = lambda *arguments: _tensor(torch_names, *arguments)
  value = {
    'state_dict': collections.OrderedDict(
      {
        'a.weight': tensor('FloatStorage', '0', 24, 0, (2, 3, 4), (12, 4, 1)),
        'a.turned': tensor('FloatStorage', '0', 24, 4, (4, 2), (1, 12)),
        'b': _Call(
          torch_names['_rebuild_parameter'],
          tensor('HalfStorage', '1', 6, 0, (6,), (1,)),
          True,
          collections.OrderedDict(),
        ),
        'scalar': tensor('HalfStorage', '1', 6, 5, (), ()),
      }
    ),
    'steps': 12,
    'rates': [0.5, {'name': 'adam', 'none': None, 'yes': True}],
    'several': [tensor('HalfStorage', '1', 6, 1, (2,), (2,))],
  }
  path = _write(tmp_path / 'weights.pt', value, {'0': floats, '1': halves}, protocol)
  found = torch_files.open_torch_file(path)
  expected = {
    'state_dict.a.weight': floats.reshape(2, 3, 4),
    'state_dict.a.turned': np.array([[4, 16], [5, 17], [6, 18], [7, 19]], np.float32),
    'state_dict.b': halves,
    'state_dict.scalar': halves[5],
    'several.0': halves[[1, 3]],
  }
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert found[name].shape == array.shape and found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name].read(), array)


@pytest.mark.parametrize('zipped', [True, False])
def test_torchs_own_files(tmp_path, zipped):
  torch = pytest.importorskip('torch')
  draw = torch.Generator().manual_seed(0)
  module = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5))
  with torch.no_grad():
    for parameter in module.parameters():
      parameter.normal_(generator=draw)
  state = module.state_dict()
  state['half'] = torch.randn(3, 4, generator=draw).to(torch.bfloat16).T
  state['parameter'] = torch.nn.Parameter(torch.ones(2))
  torch.save(
    {'model': state, 'epoch': 3, 'none': None},
    tmp_path / 'weights.pt',
    _use_new_zipfile_serialization=zipped,
  )
  found = torch_files.open_torch_file(tmp_path / 'weights.pt')
  assert set(found) == {f'model.{name}' for name in state}
  for name, tensor in state.items():
    read = found[f'model.{name}'].read()
    np.testing.assert_array_equal(read.astype(np.float64), tensor.detach().double().numpy())
    assert read.shape == tuple(tensor.shape)


@pytest.mark.parametrize(
  'value, named',
  [
    (lambda names: {'a': _Call(names['run'], 'rm -r')}, 'elsewhere.run'),
    (lambda names: [print], '__builtin__.print'),
    (lambda names: _Call(eval, '1 + 1'), '__builtin__.eval'),
    (lambda names: _Call(names['FloatStorage'], 3), 'torch.FloatStorage'),
    (lambda names: collections.OrderedDict, 'holds no tensors'),
    (lambda names: {1, 2}, 'could run code'),
    (lambda names: {'a': 1}, 'holds no tensors'),
  ],
)
def test_other_contents_are_refused_by_name(tmp_path, torch_names, value, named):
  path = _write(tmp_path / 'weights.pt', value(torch_names), {})
  with pytest.raises(UserError, match=re.escape(named)) as raised:
    torch_files.open_torch_file(path)
  assert str(path) in str(raised.value)


@pytest.mark.parametrize(
  'program',
  [
    b'',
    b'.',
    b'N',
    b'\x80\x02a.',
    b'\x80\x02t.',
    b'\x80\x02}q\x00h\x05.',
    b'\x80\x02NR.',
    b'\x80\x02(((.',
    b'\x80\x02cos\nsystem\nX\x02\x00\x00\x00ls\x85R.',
    b'\x80\x02ios\nsystem\n.',
    b'\x80\x02]q\x00h\x00a.',
    b'\x80\x04\x8c\x02os\x8c\x06system\x93.',
    b'\x80\x02ccollections\nOrderedDict\n)R}NsQ.',
    b'\xff\xff\xff',
  ],
)
def test_hostile_programs_end_with_an_error(tmp_path, program):
  with zipfile.ZipFile(tmp_path / 'weights.pt', 'w') as archive:
    archive.writestr('archive/data.pkl', program)
  with pytest.raises(UserError, match='weights.pt'):
    torch_files.open_torch_file(tmp_path / 'weights.pt')


@pytest.mark.parametrize(
  'size, offset, shape, strides, named',
  [
    (5, 0, (5,), (1,), '16 bytes instead of 20'),
    (4, 1, (4,), (1,), 'beyond the end'),
    (4, 0, (2, 2), (3, 1), 'beyond the end'),
    (4, 0, (2**40,), (0,), 'beyond the end'),
    (4, 3, (2,), (-1,), 'not a tensor'),
    (4, 0, (2, 2), (1,), 'not a tensor'),
    (4, 0, (True,), (1,), 'not a tensor'),
  ],
)
def test_tensors_stay_within_their_data(tmp_path, torch_names, size, offset, shape, strides, named):
  value = {'a': _tensor(torch_names, 'FloatStorage', '0', size, offset, shape, strides)}
  path = _write(tmp_path / 'weights.pt', value, {'0': np.zeros(4, np.float32)})
  with pytest.raises(UserError, match=named):
    torch_files.open_torch_file(path)


def test_data_is_not_unpacked_and_may_not_be_missing(tmp_path, torch_names):
  value = {'a': _tensor(torch_names, 'FloatStorage', '0', 4, 0, (4,), (1,))}
  bomb = _write(
    tmp_path / 'bomb.pt', value, {'0': np.zeros(4, np.float32)}, compression=zipfile.ZIP_DEFLATED
  )
  with pytest.raises(UserError, match='bomb.pt is damaged'):
    torch_files.open_torch_file(bomb)
  with pytest.raises(UserError, match='archive/data/0 is missing'):
    torch_files.open_torch_file(_write(tmp_path / 'cut.pt', value, {}))


def test_a_flipped_bit_is_found(tmp_path, torch_names):
  value = {'a': _tensor(torch_names, 'FloatStorage', '0', 4, 0, (4,), (1,))}
  path = _write(tmp_path / 'weights.pt', value, {'0': np.full(4, 7, np.float32)})
  content = bytearray(path.read_bytes())
  content[content.index(np.full(4, 7, np.float32).tobytes())] ^= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match='damaged'):
    torch_files.open_torch_file(path)['a'].read()


def test_containers_that_name_each_other_many_times_are_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(torch_files, '_MAX_ITEMS', 1000)
  value = []
  for _ in range(60):  # 2⁶⁰ places.
    value = [value, value]
  with pytest.raises(UserError, match='more than 1000 values'):
    torch_files.open_torch_file(_write(tmp_path / 'weights.pt', value, {}))


def _nested_tuples(depth):
  value = ()
  for _ in range(depth):  # Hashing the tuple visits 2**depth places.
    value = (value, value)
  return pickle.dumps(value, 2).removesuffix(b'.').removeprefix(b'\x80\x02')


def test_tuples_are_no_keys(tmp_path):
  program = b'\x80\x02(' + _nested_tuples(60) + b'Nd.'
  with zipfile.ZipFile(tmp_path / 'weights.pt', 'w') as archive:
    archive.writestr('archive/data.pkl', program)
  with pytest.raises(UserError, match='tuple as a key'):
    torch_files.open_torch_file(tmp_path / 'weights.pt')


def test_names_do_not_grow_without_limit(tmp_path):
  value, key = 1, 'k' * 5000
  for _ in range(3):
    value = {key: value}
  with pytest.raises(UserError, match='more than 10000 characters'):
    torch_files.open_torch_file(_write(tmp_path / 'weights.pt', value, {}))


def test_arrays_have_no_more_axes_than_numpy_has(tmp_path, torch_names):
  value = {'a': _tensor(torch_names, 'FloatStorage', '0', 1, 0, (1,) * 70, (1,) * 70)}
  with pytest.raises(UserError, match='not a tensor'):
    torch_files.open_torch_file(_write(tmp_path / 'w.pt', value, {'0': np.zeros(1, np.float32)}))


@pytest.mark.parametrize('compression', [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_a_damaged_compressed_list_is_named(tmp_path, compression):
  path = tmp_path / 'weights.pt'
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', pickle.dumps(list(range(1000)), 2))
  content = bytearray(path.read_bytes())
  content[60:100] = b'\xff' * 40
  path.write_bytes(content)
  with pytest.raises(UserError, match='weights.pt'):
    torch_files.open_torch_file(path)


@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_members_of_the_same_name_are_refused(tmp_path, torch_names):
  value = {'a': _tensor(torch_names, 'FloatStorage', '0', 1, 0, (1,), (1,))}
  path = _write(tmp_path / 'weights.pt', value, {'0': np.zeros(1, np.float32)})
  with zipfile.ZipFile(path, 'a') as archive:
    archive.writestr('archive/data/0', np.ones(1, np.float32).tobytes())
  with pytest.raises(UserError, match='two of its members have the same name'):
    torch_files.open_torch_file(path)


def _write_old(path, value, storages, version=1001, machine=None, keys=None, sizes=None):
  """Writes a file as torch did before 1.6."""
  content = io.BytesIO()
  machine = {'protocol_version': version, 'little_endian': True} if machine is None else machine
  for part in (0x1950A86A20F9469CFC6C, version, machine, value, sorted(keys or storages)):
    _Pickler(content, 2).dump(part)
  for key, array in sorted(storages.items()):
    size = (sizes or {}).get(key, array.size)
    content.write(np.array(size, '<i8').tobytes() + array.tobytes())
  path.write_bytes(content.getvalue())
  return path


@pytest.fixture
def old_value(torch_names):
  """A tree of two storages, in the tuples that torch wrote before 1.6."""

  def tensor(function, kind, key, size, offset, shape, strides, *rest):
    storage = _Storage(torch_names[kind], key, size)
    storage.identity += (None,)
    return _Call(torch_names[function], storage, offset, shape, strides, *rest)

  return {
    'a': tensor(
      '_rebuild_tensor_v2', 'FloatStorage', '77', 6, 1, (2, 2), (1, 2), False,
      collections.OrderedDict(),
    ),
    'b': tensor('_rebuild_tensor', 'LongStorage', '8', 3, 0, (3,), (1,)),
  }  # fmt: skip


_OLD_STORAGES = {'77': np.arange(6, dtype=np.float32), '8': np.array([7, 8, 9])}


def test_files_from_before_torch_1_6(tmp_path, old_value):
  found = torch_files.open_torch_file(_write_old(tmp_path / 'old.pth', old_value, _OLD_STORAGES))
  assert set(found) == {'a', 'b'}
  np.testing.assert_array_equal(found['a'].read(), np.array([[1, 3], [2, 4]], np.float32))
  np.testing.assert_array_equal(found['b'].read(), [7, 8, 9])


def test_python_2s_ordered_dicts(tmp_path, old_value):
  class Pairs(_Call):
    pass

  pairs = [[name, tensor] for name, tensor in old_value.items()]
  value = Pairs(collections.OrderedDict, pairs)
  found = torch_files.open_torch_file(_write_old(tmp_path / 'old.pth', value, _OLD_STORAGES))
  np.testing.assert_array_equal(found['b'].read(), [7, 8, 9])


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'version': 1002}, 'unknown version of torch.save: 1002'),
    ({'machine': {'little_endian': False}}, 'not stored as little-endian'),
    ({'machine': 5}, 'damaged'),
    ({'keys': ['77']}, 'the tensor data 8 is missing'),
    ({'keys': ['77', '78']}, 'no tensor uses the tensor data 78'),
    ({'keys': ['77', '77']}, 'no list of its tensor data'),
    ({'sizes': {'77': 5}}, 'the tensor data 77 has another size'),
    ({'sizes': {'8': 2**40}}, 'the tensor data 8 has another size'),
    (
      {'storages': {**_OLD_STORAGES, '8': np.array([7, 8])}, 'sizes': {'8': 3}},
      '8 bytes too early',
    ),
  ],
)
def test_damaged_files_from_before_torch_1_6(tmp_path, old_value, changes, named):
  path = _write_old(tmp_path / 'old.pth', old_value, **{'storages': _OLD_STORAGES, **changes})
  with pytest.raises(UserError, match=named) as raised:
    torch_files.open_torch_file(path)
  assert str(path) in str(raised.value)


def test_old_files_that_end_anywhere_are_refused(tmp_path, old_value):
  content = _write_old(tmp_path / 'old.pth', old_value, _OLD_STORAGES).read_bytes()
  for end in range(1, len(content)):
    (tmp_path / 'cut.pth').write_bytes(content[:end])
    with pytest.raises(UserError, match='cut.pth'):
      torch_files.open_torch_file(tmp_path / 'cut.pth')


def test_old_files_run_no_code(tmp_path, torch_names):
  path = _write_old(tmp_path / 'old.pth', {'a': _Call(torch_names['run'], 'rm -r')}, {})
  with pytest.raises(UserError, match='elsewhere.run'):
    torch_files.open_torch_file(path)


def test_other_files(tmp_path):
  (tmp_path / 'page.pth').write_bytes(b'<html>Not found</html>')
  with pytest.raises(UserError, match="page.pth isn't a file of torch.save"):
    torch_files.open_torch_file(tmp_path / 'page.pth')
  with pytest.raises(UserError, match='does not exist'):
    torch_files.open_torch_file(tmp_path / 'none.pt')

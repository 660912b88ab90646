"""Parameter files: the container's format, arrays that are read lazily, and memory."""

import json
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from parti_jax.core.errors import UserError
from parti_jax.exported_model import parameter_files
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import placing

DTYPES = {'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16, 'float32': np.float32}


def _params():
  draw = np.random.default_rng(0)
  normal = lambda *shape: np.asarray(draw.normal(size=shape), np.float32)
  return {'b': {'kernel': normal(4, 8, 6), 'scale': normal()}, 'a': {'bias': normal(3)}}


def _shapes(params):
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32), params)


@pytest.mark.parametrize('dtype', DTYPES)
def test_the_safetensors_library_reads_and_writes_the_same_file(dtype, tmp_path):
  params, made_with = _params(), {'vocabulary': 'ab', 'tokenizer': 'cd'}
  parameter_files.write(tmp_path / 'ours', params, dtype, made_with)
  arrays = {
    'a/bias': params['a']['bias'],
    'b/kernel': params['b']['kernel'],
    'b/scale': params['b']['scale'],
  }
  arrays = {name: np.asarray(array).astype(DTYPES[dtype]) for name, array in arrays.items()}
  found = safetensors.numpy.load_file(tmp_path / 'ours')
  assert found.keys() == arrays.keys()
  for name, array in arrays.items():
    assert found[name].dtype == array.dtype
    np.testing.assert_array_equal(found[name], array)
  assert parameter_files.read_made_with(tmp_path / 'ours') == made_with
  parameter_files.write(tmp_path / 'ours', params, dtype, {})
  safetensors.numpy.save_file(arrays, tmp_path / 'theirs')
  assert (tmp_path / 'ours').read_bytes() == (tmp_path / 'theirs').read_bytes()


@pytest.mark.parametrize('dtype', DTYPES)
def test_arrays_are_read_whole_in_parts_and_by_layer(dtype, tmp_path):
  params = _params()
  parameter_files.write(tmp_path / 'file', params, dtype, {})
  read = parameter_files.read(tmp_path / 'file', _shapes(params))
  kernel, wanted = read['b']['kernel'], params['b']['kernel'].astype(DTYPES[dtype])
  assert (kernel.shape, kernel.dtype, kernel.size, kernel.ndim) == ((4, 8, 6), np.float32, 192, 3)
  np.testing.assert_array_equal(np.asarray(kernel), wanted.astype(np.float32))
  np.testing.assert_array_equal(kernel[1:3, :, 2:4], wanted[1:3, :, 2:4].astype(np.float32))
  layer = kernel[-1].astype(jnp.bfloat16)
  assert (layer.shape, layer.dtype) == ((8, 6), jnp.bfloat16)
  rounded = wanted[-1].astype(np.float32).astype(jnp.bfloat16)
  np.testing.assert_array_equal(np.asarray(layer), rounded)
  np.testing.assert_array_equal(layer[2:4, :], rounded[2:4])
  with pytest.raises(IndexError):
    kernel[4]
  scale = read['b']['scale']
  assert np.asarray(scale).shape == () and np.asarray(scale).dtype == np.float32


def test_a_process_reads_the_shards_of_its_devices_alone(tmp_path, monkeypatch):
  params = _params()
  parameter_files.write(tmp_path / 'file', params, 'float32', {})
  array = parameter_files.read(tmp_path / 'file', _shapes(params))['b']['kernel']
  read = []
  whole = parameter_files.StoredArray.__getitem__

  def noted(self, index):
    found = whole(self, index)
    if isinstance(found, np.ndarray):
      read.append(found.size)
    return found

  monkeypatch.setattr(parameter_files.StoredArray, '__getitem__', noted)
  mesh = mesh_lib.make_mesh(fsdp=8)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, 'fsdp'))
  put = placing.put(array, sharding)
  np.testing.assert_array_equal(put, params['b']['kernel'])
  assert read == [24] * 8

  # Four devices hold each half, which is read once.
  read.clear()
  mesh = mesh_lib.make_mesh(data=4, tensor=2)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, None, 'tensor'))
  put = placing.put(array, sharding)
  np.testing.assert_array_equal(put, params['b']['kernel'])
  assert read == [96] * 2


def test_writing_and_loading_hold_one_array_at_a_time(tmp_path):
  class Lazy:
    shape = (512, 512)

    def __array__(self, dtype=None, copy=None):
      return np.ones(self.shape, np.float32)

  params = {f'layer_{number}': Lazy() for number in range(64)}
  size = 4 * 512**2
  tracemalloc.start()
  parameter_files.write(tmp_path / 'file', params, 'float32', {})
  _, peak = tracemalloc.get_traced_memory()
  assert peak < 8 * size
  tracemalloc.reset_peak()
  read = parameter_files.read(tmp_path / 'file', _shapes(params))
  for leaf in read.values():
    assert np.asarray(leaf)[0, 0] == 1
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 8 * size


def test_a_stored_array_is_written_one_layer_after_another(tmp_path, monkeypatch):
  params = _params()
  parameter_files.write(tmp_path / 'file', params, 'float32', {})
  read = parameter_files.read(tmp_path / 'file', _shapes(params))
  sizes = []
  whole = parameter_files.StoredArray.__array__

  def noted(self, *arguments, **options):
    sizes.append(self.size)
    return whole(self, *arguments, **options)

  monkeypatch.setattr(parameter_files.StoredArray, '__array__', noted)
  parameter_files.write(tmp_path / 'again', read, 'float32', {})
  assert sizes == [3, 48, 48, 48, 48, 1]
  assert (tmp_path / 'again').read_bytes() == (tmp_path / 'file').read_bytes()


def test_numbers_that_are_too_large_are_named(tmp_path):
  params = {'a': np.ones(3, np.float32), 'b': np.full(2, 1e6, np.float32)}
  with pytest.raises(UserError, match='file: the parameter b has values that are not finite as fl'):
    parameter_files.write(tmp_path / 'file', params, 'float16', {})


def test_the_header_follows_the_format(tmp_path):
  parameter_files.write(tmp_path / 'file', _params(), 'bfloat16', {'vocabulary': 'é'})
  content = (tmp_path / 'file').read_bytes()
  length = int.from_bytes(content[:8], 'little')
  assert length % 8 == 0
  header = json.loads(content[8 : 8 + length])
  assert header.pop('__metadata__') == {'vocabulary': 'é'}
  assert [entry['data_offsets'] for entry in header.values()] == [[0, 6], [6, 390], [390, 392]]
  assert len(content) == 8 + length + 392
  with pytest.raises(UserError, match='damaged or unfinished'):
    (tmp_path / 'file').write_bytes(content[:-1])
    parameter_files.read(tmp_path / 'file', _shapes(_params()))


def test_numbers_that_were_damaged_are_named(tmp_path):
  params = {'a': np.array([1.0, np.nan], np.float32)}
  safetensors.numpy.save_file(params, tmp_path / 'file')
  array = parameter_files.read(tmp_path / 'file', _shapes(params))['a']
  with pytest.raises(UserError, match='the parameter a of a model has values that are not finite'):
    np.asarray(array)
  safetensors.numpy.save_file({'a': np.ones(2, np.int16)}, tmp_path / 'file')
  with pytest.raises(UserError, match=r'numbers of another kind than stored: a \(I16\)'):
    parameter_files.read(tmp_path / 'file', _shapes(params))

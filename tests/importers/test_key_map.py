"""Tests of parti_jax.importers.key_map."""

import dataclasses
import re

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.importers import key_map


@dataclasses.dataclass
class _Stored:
  array: np.ndarray
  reads: int = 0

  shape = property(lambda self: self.array.shape)
  dtype = property(lambda self: self.array.dtype)

  def read(self):
    self.reads += 1
    return self.array


MAP = {
  'conv/kernel': key_map.one('conv.weight', key_map.convolution),
  'blocks/dense/kernel': key_map.layers('block.{}.weight', 2, key_map.linear),
  'blocks/dense/heads': key_map.layers('block.{}.qkv', 2, lambda a: a.reshape(2, 3, -1)[0]),
  'scale': key_map.one('norm.weight'),
  'temperature': key_map.one('logit_scale', lambda a: a.reshape(())),
}
EXPECTED = {
  'conv/kernel': (3, 3, 2, 5),
  'blocks/dense/kernel': (2, 4, 7),
  'blocks/dense/heads': (2, 3, 4),
  'scale': (6,),
  'temperature': (),
}
SHAPES = {
  'conv.weight': (5, 2, 3, 3),
  'block.0.weight': (7, 4),
  'block.1.weight': (7, 4),
  'block.0.qkv': (6, 4),
  'block.1.qkv': (6, 4),
  'norm.weight': (6,),
  'logit_scale': (1,),
}


def _stored(**changes):
  draw = np.random.default_rng(0)
  shapes = SHAPES | {name.replace('__', '.'): shape for name, shape in changes.items()}
  return {
    name: _Stored(draw.normal(size=shape).astype(np.float16))
    for name, shape in shapes.items()
    if shape is not None
  }


def test_parameters_are_made_of_the_arrays_that_the_map_names():
  stored = _stored()
  key_map.check(MAP, stored, EXPECTED, 'a file')
  assert not any(array.reads for array in stored.values())
  ours = key_map.convert(MAP, stored)
  assert {path: array.shape for path, array in ours.items()} == EXPECTED
  ours = {path: np.asarray(array) for path, array in ours.items()}
  assert {path: array.shape for path, array in ours.items()} == EXPECTED
  assert all(array.dtype == np.float32 and array.flags.c_contiguous for array in ours.values())
  assert all(array.reads == 1 for array in stored.values())
  assert ours['conv/kernel'][1, 2, 0, 4] == stored['conv.weight'].array[4, 0, 1, 2]
  assert ours['blocks/dense/kernel'][1, 3, 5] == stored['block.1.weight'].array[5, 3]
  assert ours['blocks/dense/heads'][1, 2, 3] == stored['block.1.qkv'].array[2, 3]


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'norm__weight': None}, 'missing: norm.weight'),
    ({'loss__weight': (1,)}, 'not part of this network: loss.weight'),
    ({'block__1__weight': (4, 7)}, 'block.1.weight [4, 7], which would be blocks/dense/kernel'),
    ({'conv__weight': (5, 2)}, 'conv.weight [5, 2], which would be conv/kernel [3, 3, 2, 5]'),
    ({'block__0__qkv': (7, 4)}, 'block.0.qkv [7, 4]'),
  ],
)
def test_what_does_not_fit_is_named(changes, named):
  with pytest.raises(UserError, match=re.escape(named)) as raised:
    key_map.check(MAP, _stored(**changes), EXPECTED, 'weights.pt')
  assert str(raised.value).startswith('weights.pt ')


class _Values:
  def __init__(self, values, dtype=np.float32):
    self.values = np.asarray(values, dtype)
    self.shape, self.dtype = self.values.shape, self.values.dtype

  def read(self):
    return self.values


@pytest.mark.parametrize('bad', ['layers.0', 'layers.1'])
@pytest.mark.parametrize('value', [np.nan, np.inf, 1e300])
@pytest.mark.filterwarnings('error')
def test_values_that_are_not_finite_are_named(bad, value):
  stored = {f'layers.{layer}': _Values([1, 2]) for layer in range(2)}
  stored |= {bad: _Values([1, value], np.float64)}
  (found,) = key_map.convert({'ours': key_map.layers('layers.{}', 2)}, stored).values()
  with pytest.raises(UserError, match=f'the array {bad} has values that are not finite'):
    np.asarray(found)


def test_arrays_may_be_parts_of_a_parameter_that_has_layers_itself():
  whole = np.random.default_rng(0).normal(size=(2, 4, 3, 5)).astype(np.float32)
  stored = {name: _Values(whole[:, :, place]) for place, name in enumerate('qkv')}
  found = {'kernel': key_map.together('qkv', 2)}
  key_map.check(found, stored, {'kernel': whole.shape}, 'a file')
  ours = key_map.convert(found, stored)['kernel']
  assert ours.shape == whole.shape
  np.testing.assert_array_equal(np.asarray(ours), whole)
  assert np.asarray(ours).flags.c_contiguous
  stored['k'] = _Values(whole[:, :3, 0])
  with pytest.raises(UserError, match=r'k \[2, 3, 5\], which would be kernel \[2, 4, 3, 5\]'):
    key_map.check(found, stored, {'kernel': whole.shape}, 'a file')


def test_names_that_a_pattern_covers_may_be_left_over():
  stored = _stored(loss__a__weight=(1,), loss__b=(1,))
  key_map.check(MAP, stored, EXPECTED, 'a file', [r'loss\..*'])
  with pytest.raises(UserError, match='loss.b'):
    key_map.check(MAP, stored, EXPECTED, 'a file', [r'loss\.a\..*'])


def test_many_names_are_cut():
  with pytest.raises(UserError, match='and 2 more'):
    key_map.check(MAP, {}, EXPECTED, 'a file')


def test_published_sizes_are_checked_without_their_memory():
  size = 2**20  # 4 TiB, were it allocated.

  class Huge:
    shape = (size, size)
    dtype = np.dtype(np.float32)

  key_map.check(
    {'kernel': key_map.one('w', key_map.linear)}, {'w': Huge()}, {'kernel': (size, size)}, 'f'
  )


def test_whole_numbers_are_no_parameters():
  stored = _stored()
  name = next(iter(stored))
  stored[name].array = stored[name].array.astype(np.int8)
  with pytest.raises(UserError, match=f'not floating-point numbers: {name} \\(int8\\)'):
    key_map.check(MAP, stored, EXPECTED, 'weights.pt')

"""Tests of parti_jax.importers.real_esrgan.

`manifests/` has the names and shapes of published weights. Pixels are compared with another library in
tests/references/test_real_esrgan.py.
"""

import dataclasses
import re

import numpy as np
import pytest
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.importers import files
from parti_jax.importers import key_map
from parti_jax.importers import real_esrgan as importer
from parti_jax.models import real_esrgan

X4PLUS = real_esrgan.RRDBNetConfig(dtype='float32')
GENERAL = real_esrgan.SRVGGNetCompactConfig(dtype='float32')
# Networks, and their numbers of parameters.
PUBLISHED = {
  'realesrgan_x4plus': (X4PLUS, 16_697_987),
  'realesrgan_x2plus': (dataclasses.replace(X4PLUS, factor=2, unshuffle=2), 16_703_171),
  'realesrgan_x4plus_anime_6b': (dataclasses.replace(X4PLUS, blocks=6), 4_467_779),
  'realesr_general_x4v3': (GENERAL, 1_213_296),
  'realesr_animevideov3': (dataclasses.replace(GENERAL, layers=16), 621_424),
}


def _arrays(name):
  _, arrays = published.read(name)
  return arrays


def _check(arrays, config):
  key_map.check(
    importer.key_map(config, arrays),
    arrays,
    importer.expected(config),
    'a file',
    importer.ignored(arrays),
  )


def _bare(arrays):
  return {name.partition('.')[2]: array for name, array in arrays.items()}


def _counted(arrays, blocks):
  """Arrays of an RRDBNet with the names of ESRGAN's first code."""
  names = {
    'conv_first': 'model.0',
    'conv_body': f'model.1.sub.{blocks}',
    'conv_up1': 'model.3',
    'conv_up2': 'model.6',
    'conv_hr': 'model.8',
    'conv_last': 'model.10',
  }
  found = {}
  for name, array in _bare(arrays).items():
    name = re.sub(r'^body\.(\d+)\.rdb(\d)\.conv(\d)', r'model.1.sub.\1.RDB\2.conv\3.0', name)
    module, _, kind = name.rpartition('.')
    found[f'{names.get(module, module)}.{kind}'] = array
  return found


def _later(arrays):
  """Arrays of an RRDBNet with the names of ESRGAN's later code."""
  changes = ('conv_body', 'trunk_conv'), ('body', 'RRDB_trunk'), ('rdb', 'RDB')
  changes += ('conv_up', 'upconv'), ('conv_hr', 'HRconv')
  found = {}
  for name, array in _bare(arrays).items():
    for theirs, ours in changes:
      name = name.replace(theirs, ours)
    found[name] = array
  return found


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_weights_fit_the_network(name):
  config, count = PUBLISHED[name]
  for arrays in (_arrays(name), _bare(_arrays(name))):
    assert importer.config_of(arrays) == config
    _check(arrays, config)
  assert sum(np.prod(shape) for shape in importer.expected(config).values()) == count


@pytest.mark.parametrize('rename', [_later, lambda arrays: _counted(arrays, 23)])
def test_the_older_names_are_read_too(rename):
  arrays = rename(_arrays('realesrgan_x4plus'))
  assert importer.config_of(arrays) == X4PLUS
  _check(arrays, X4PLUS)
  names = {name for source in importer.key_map(X4PLUS, arrays).values() for name in source.names}
  assert names == set(arrays)


def test_averaged_weights_are_preferred():
  arrays = _arrays('realesrgan_x4plus_anime_6b')
  arrays |= {f'params.{name}': array for name, array in _bare(arrays).items()}
  config = importer.config_of(arrays)
  sources = importer.key_map(config, arrays)
  assert all(name.startswith('params_ema.') for source in sources.values() for name in source.names)
  _check(arrays, config)


def test_a_network_that_is_there_twice_is_refused():
  bare = _bare(_arrays('realesr_animevideov3'))
  arrays = {f'{prefix}.{name}': array for prefix in 'ab' for name, array in bare.items()}
  with pytest.raises(UserError, match=r"there 2 times, under 'a\.', 'b\.'"):
    importer.config_of(arrays)


@pytest.mark.parametrize('name', ['realesrgan_x4plus_anime_6b', 'realesr_animevideov3'])
def test_an_array_that_is_missing_or_of_another_shape_is_named(name):
  config, _ = PUBLISHED[name]
  arrays = _arrays(name)
  for chosen in arrays:
    others = {name: array for name, array in arrays.items() if name != chosen}
    with pytest.raises(UserError):
      _check(others, importer.config_of(others))
    shape = arrays[chosen].shape
    for wrong in ((*shape, 2), (shape[0] + 1, *shape[1:]), ()):
      changed = arrays | {chosen: published.Listed(wrong)}
      with pytest.raises(UserError):
        _check(changed, importer.config_of(changed))


@pytest.mark.parametrize(
  'changes, message',
  [
    ({'params_ema.body.0.rdb1.conv1x1.weight': (32, 64, 1, 1)}, 'not part of this network'),
    ({'params_ema.conv_up3.weight': (64, 64, 3, 3)}, 'missing: params_ema.conv_up3.bias'),
    ({'params_ema.conv_first.weight': (64, 4, 3, 3)}, 'takes 4 channels, with 2 doublings'),
    ({'params_ema.conv_first.weight': (64, 192, 3, 3)}, 'takes 192 channels, with 2 doublings'),
  ],
)
def test_networks_of_other_kinds_are_refused(changes, message):
  arrays = _arrays('realesrgan_x4plus_anime_6b')
  arrays |= {name: published.Listed(shape) for name, shape in changes.items()}
  with pytest.raises(UserError, match=re.escape(message)):
    _check(arrays, importer.config_of(arrays))


def test_counted_modules_must_be_those_of_doublings():
  arrays = _counted(_arrays('realesrgan_x4plus_anime_6b'), 6)
  arrays['model.11.weight'] = published.Listed((3, 64, 3, 3))
  with pytest.raises(UserError, match=r'the last of its modules is model\.11'):
    importer.config_of(arrays)
  arrays['model.3000000000004.weight'] = published.Listed((3, 64, 3, 3))
  with pytest.raises(UserError, match='it doubles height and width 1000000000000 times'):
    importer.config_of(arrays)


@pytest.mark.parametrize('arrays', [{}, {'weight': published.Listed((2, 2))}])
def test_other_weights_are_refused(arrays):
  for function in (importer.config_of, importer.ignored):
    with pytest.raises(UserError, match='not of the format real-esrgan: there is none of body.0.r'):
      function(arrays)


@dataclasses.dataclass
class _Array:
  values: np.ndarray

  shape = property(lambda self: self.values.shape)
  dtype = property(lambda self: self.values.dtype)

  def read(self):
    return self.values


def _weights(path, **arrays):
  return files.Weights((path,), {name: _Array(values) for name, values in arrays.items()})


def test_weights_between_two_files():
  first = _weights('a', x=np.full([2], 1.0, np.float16), step=np.array(3))
  second = _weights('b', x=np.full([2], 3.0, np.float32), step=np.array(5))
  for share, value in ((0, 3.0), (1, 1.0), (0.75, 1.5)):
    found = files.interpolated(first, second, share)
    assert found.files == ('a', 'b') and found.arrays['x'].dtype == np.float32
    np.testing.assert_array_equal(found.arrays['x'].read(), [value, value])
    assert found.arrays['step'].read() == 3


@pytest.mark.parametrize(
  'arrays, share, message',
  [
    ({'y': np.zeros(2)}, 0.5, 'a and b have different arrays, such as x'),
    ({'x': np.zeros(3)}, 0.5, 'a and b have arrays x of different shapes'),
    ({'x': np.zeros(2)}, 1.5, 'the share 1.5 of the first weights'),
    ({'x': np.zeros(2)}, float('nan'), 'the share nan of the first weights'),
  ],
)
def test_files_that_no_weights_lie_between(arrays, share, message):
  with pytest.raises(UserError, match=message):
    files.interpolated(_weights('a', x=np.zeros(2)), _weights('b', **arrays), share)

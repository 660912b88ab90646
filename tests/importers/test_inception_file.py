"""parti_jax.importers.inception_file: the published names and shapes, and files of small networks."""

import jax
import numpy as np
import pytest
import safetensors.numpy
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.importers import inception_file
from parti_jax.models import inception

SMALL = inception.Inception(size=75, divisor=16)


def test_the_published_names_and_shapes_are_those_of_the_network():
  _, arrays = published.read('inception_2015_12_05')
  inception_file.check(arrays, 'inception_2015_12_05')
  # Files that torch wrote after a training have counters too.
  counter = {'Conv2d_1a_3x3.bn.num_batches_tracked': published.Listed((), np.dtype(np.int64))}
  inception_file.check(arrays | counter, 'inception_2015_12_05')


@pytest.mark.parametrize(
  'changes, named',
  [
    ({'Mixed_6d.branch1x1.conv.weight': None}, 'missing: Mixed_6d.branch1x1.conv.weight'),
    ({'fc.weight': (1000, 2048)}, r'fc.weight \[1000, 2048\]'),
    ({'Mixed_8a.conv.weight': (1, 1, 1, 1)}, 'not part of this network: Mixed_8a.conv.weight'),
  ],
)
def test_other_networks_are_refused(changes, named):
  _, arrays = published.read('inception_2015_12_05')
  for name, shape in changes.items():
    arrays.pop(name, None)
    if shape:
      arrays[name] = published.Listed(shape)
  with pytest.raises(UserError, match=named):
    inception_file.check(arrays, 'file.pth')


def test_a_file_is_read(tmp_path):
  draw = np.random.default_rng(0)
  shapes = inception.abstract_params(SMALL)
  params = jax.tree.map(lambda leaf: draw.normal(size=leaf.shape).astype(np.float32), shapes)
  kernel = params['mixed_7b']['branch3x3_2a']['kernel']
  arrays = {}
  for path, source in inception_file.key_map(SMALL).items():
    leaf = params
    for key in path.split('/'):
      leaf = leaf[key]
    order = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[leaf.ndim]
    arrays[source.names[0]] = np.ascontiguousarray(leaf.transpose(order))
  assert arrays['Mixed_7b.branch3x3_2a.conv.weight'].shape == (24, 24, 1, 3)
  safetensors.numpy.save_file(arrays, tmp_path / 'small.safetensors')
  found, digest = inception_file.read(tmp_path / 'small.safetensors', SMALL)
  assert jax.tree.structure(found) == jax.tree.structure(params) and len(digest) == 64
  jax.tree.map(np.testing.assert_array_equal, found, params)
  np.testing.assert_array_equal(found['mixed_7b']['branch3x3_2a']['kernel'], kernel)

"""LPIPS' weight files: names and shapes of the published ones, and bad files."""

import pickle

import jax
import numpy as np
import pytest
import safetensors.numpy
from importers import published

from parti_jax.core.errors import UserError
from parti_jax.importers import key_map
from parti_jax.importers import lpips_files
from parti_jax.models import lpips


def _arrays(network):
  """Random weights under the names and with the shapes of both files."""
  draw = np.random.default_rng(0)
  trunk = {
    name: draw.normal(size=array.shape, scale=0.05).astype(np.float32)
    for name, array in published.read(f'torchvision_{network}')[1].items()
    if name.startswith('features')
  }
  heads = {
    name: draw.uniform(size=array.shape).astype(np.float32)
    for name, array in published.read(f'lpips_{network}')[1].items()
  }
  # What a classifier's file has besides.
  return trunk | {'classifier.1.bias': np.zeros(5, np.float32)}, heads


@pytest.fixture(scope='module', params=lpips.NETWORKS)
def files(tmp_path_factory, request):
  """The network's name, the folder with both files as .safetensors, and their arrays."""
  folder, (trunk, heads) = tmp_path_factory.mktemp('weights'), _arrays(request.param)
  safetensors.numpy.save_file(trunk, folder / 'network.safetensors')
  safetensors.numpy.save_file(heads, folder / 'heads.safetensors')
  return request.param, folder, trunk, heads


@pytest.mark.parametrize('network', lpips.NETWORKS)
def test_names_and_shapes_are_those_of_the_published_files(network):
  shapes = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(lpips.abstract_params(network))
  }
  assert lpips_files.shapes(network) == shapes
  covered = {}
  for manifest, found, ignored in (
    (f'torchvision_{network}', lpips_files.network_key_map(network), (r'classifier\..*',)),
    (f'lpips_{network}', lpips_files.heads_key_map(), ()),
  ):
    _, arrays = published.read(manifest)
    covered |= found
    key_map.check(found, arrays, {path: shapes[path] for path in found}, manifest, ignored)
  assert set(covered) == set(shapes)


def test_weights_are_those_of_the_files(files):
  network, folder, trunk, heads = files
  params = lpips_files.read(folder / 'network.safetensors', folder / 'heads.safetensors', network)
  layer, ours = {
    'vgg16': ('features.14', params['vgg16']['stage_2_2'] if network == 'vgg16' else None),
    'alexnet': ('features.6', params.get('alexnet', {}).get('convolution_2')),
  }[network]
  # From [out, in, row, column].
  np.testing.assert_array_equal(ours['kernel'][0, 2, 5, 7], trunk[f'{layer}.weight'][7, 5, 0, 2])
  np.testing.assert_array_equal(ours['bias'], trunk[f'{layer}.bias'])
  np.testing.assert_array_equal(params['head_3'], heads['lin3.model.1.weight'].ravel())


def test_missing_and_damaged_files_are_named(files, tmp_path):
  network, folder, _, heads = files
  good = folder / 'network.safetensors', folder / 'heads.safetensors'
  with pytest.raises(UserError, match='nowhere.pth does not exist.*docs/tokenizer.md'):
    lpips_files.read(tmp_path / 'nowhere.pth', good[1], network)
  (tmp_path / 'cut.safetensors').write_bytes(good[1].read_bytes()[:500])
  with pytest.raises(UserError, match='cut.safetensors is damaged.*docs/tokenizer.md'):
    lpips_files.read(good[0], tmp_path / 'cut.safetensors', network)
  with pytest.raises(UserError, match=r'missing: lin0.model.1.weight.*docs/tokenizer.md'):
    lpips_files.read(good[0], good[0], network)
  wrong = heads | {'lin2.model.1.weight': np.zeros((1, 7, 1, 1), np.float32)}
  safetensors.numpy.save_file(wrong, tmp_path / 'wrong.safetensors')
  with pytest.raises(UserError, match=r'lin2.model.1.weight \[1, 7, 1, 1\]'):
    lpips_files.read(good[0], tmp_path / 'wrong.safetensors', network)
  other = [name for name in lpips.NETWORKS if name != network]
  with pytest.raises(UserError, match=f'get the file of {other[0]}'):
    lpips_files.read(*good, other[0])


class _Harmful:
  """Would run code when it is unpickled."""

  def __reduce__(self):
    return (open, ('ran', 'w'))


def test_a_file_that_would_run_code_is_refused(files, tmp_path, monkeypatch):
  network, folder, _, _ = files
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'harmful.pth').write_bytes(pickle.dumps({'features.0.weight': _Harmful()}))
  with pytest.raises(UserError, match='harmful.pth'):
    lpips_files.read(tmp_path / 'harmful.pth', folder / 'heads.safetensors', network)
  assert not (tmp_path / 'ran').exists()

"""LPIPS' weight files: the distance of the `lpips` package from the same files, and bad files."""

import dataclasses
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny_configs

from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError
from parti_jax.models import lpips
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import lpips_weights
from parti_jax.training.objectives import tokenizer_objective


def _arrays():
  """Random weights under the names and with the shapes of both files."""
  draw, trunk, heads, index, channels = np.random.default_rng(0), {}, {}, 0, 3
  for stage, widths in enumerate(lpips.VGG16):
    for width in widths:
      kernel = draw.normal(size=(width, channels, 3, 3), scale=(2 / (9 * channels)) ** 0.5)
      trunk[f'features.{index}.weight'] = kernel.astype(np.float32)
      trunk[f'features.{index}.bias'] = draw.normal(size=width, scale=0.1).astype(np.float32)
      index, channels = index + 2, width
    index += 1
    heads[f'lin{stage}.model.1.weight'] = draw.uniform(size=(1, channels, 1, 1)).astype(np.float32)
  # What a classifier's file has besides.
  trunk['classifier.0.bias'] = np.zeros(5, np.float32)
  return trunk, heads


@pytest.fixture(scope='module')
def files(tmp_path_factory):
  """Both files as .safetensors, and their arrays."""
  folder, (trunk, heads) = tmp_path_factory.mktemp('weights'), _arrays()
  safetensors.numpy.save_file(trunk, folder / 'vgg16.safetensors')
  safetensors.numpy.save_file(heads, folder / 'heads.safetensors')
  return folder, trunk, heads


def test_weights_are_those_of_the_files_and_fit_the_network(files):
  folder, trunk, heads = files
  params = lpips_weights.read(folder / 'vgg16.safetensors', folder / 'heads.safetensors')
  wanted = jax.eval_shape(lpips.LPIPS().init, jax.random.key(0), *lpips.example_inputs())
  wanted = {
    jax.tree_util.keystr(path[:-1]): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(wanted['params'])
  }
  assert {
    jax.tree_util.keystr(path): leaf.shape
    for path, leaf in jax.tree_util.tree_leaves_with_path(params)
  } == wanted
  # The third convolution of the third stage, from [out, in, row, column].
  np.testing.assert_array_equal(
    params['vgg16']['stage_2_2']['kernel'][0, 2, 5, 7], trunk['features.14.weight'][7, 5, 0, 2]
  )
  np.testing.assert_array_equal(params['vgg16']['stage_4_2']['bias'], trunk['features.28.bias'])
  np.testing.assert_array_equal(params['head_3'], heads['lin3.model.1.weight'].ravel())


def test_the_distance_is_the_lpips_packages(files, tmp_path):
  torch = pytest.importorskip(
    'torch', reason='torch is not installed; docs/tokenizer.md says how to run this test'
  )
  package = pytest.importorskip(
    'lpips', reason='lpips is not installed; docs/tokenizer.md says how to run this test'
  )
  _, trunk, heads = files
  tensors = lambda arrays: {name: torch.from_numpy(array) for name, array in arrays.items()}
  torch.save(tensors(trunk), tmp_path / 'vgg16.pth')
  torch.save(tensors(heads), tmp_path / 'vgg.pth')
  theirs = package.LPIPS(
    pretrained=True, net='vgg', pnet_rand=True, verbose=False, model_path=str(tmp_path / 'vgg.pth')
  )
  with torch.no_grad():
    for name, layer in (
      (name, layer)
      for part in theirs.net.children()
      for name, layer in part.named_children()
      if hasattr(layer, 'weight')
    ):
      layer.weight.copy_(torch.from_numpy(trunk[f'features.{name}.weight']))
      layer.bias.copy_(torch.from_numpy(trunk[f'features.{name}.bias']))
    images, others = np.random.default_rng(1).uniform(size=(2, 2, 32, 48, 3)).astype(np.float32)
    wanted = (
      theirs(*(torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (images, others)), normalize=True)
      .numpy()
      .ravel()
    )
  params = lpips_weights.read(tmp_path / 'vgg16.pth', tmp_path / 'vgg.pth')
  found = jax.jit(lpips.LPIPS().apply)({'params': params}, images, others)
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  assert np.all(wanted > 0.01)


def test_the_tokenizer_learns_by_it_and_does_not_keep_it(files):
  folder, _, _ = files
  sizes = dataclasses.replace(tiny_configs.TOKENIZER, image_size=16, patch_size=8)
  stage = tokenizer_objective.TokenizerObjective(
    sizes,
    perceptual_weight=0.5,
    vgg16_weights=str(folder / 'vgg16.safetensors'),
    lpips_weights=str(folder / 'heads.safetensors'),
  )
  mesh = mesh_lib.make_mesh(data=2, devices=jax.devices()[:2])
  trainer = trainer_lib.Trainer(stage, optax.sgd(0.1), mesh)
  images = np.random.default_rng(2).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
  state = trainer.create_state()
  params = jax.device_get(state.params)
  state, metrics = trainer.step(state, trainer.put({'images': images}))
  assert set(state.params) == set(tokenizer_objective.PARTS)
  real = jnp.asarray(images / np.float32(255))

  @jax.jit
  def distances(params, perceptual):
    out = vit_vqgan.ViTVQGAN(sizes).apply({'params': params}, real)
    return lpips.LPIPS().apply({'params': perceptual}, real, vit_vqgan.to_pixels(out['mean']))

  distance = distances(params, jax.device_get(trainer.constants['perceptual']))
  np.testing.assert_allclose(metrics['perceptual'], np.mean(distance), rtol=1e-4)
  np.testing.assert_allclose(
    metrics['loss'],
    metrics['l2']
    + 0.1 * metrics['logit_laplace']
    + metrics['quantizer_loss']
    + 0.5 * metrics['perceptual'],
    rtol=1e-5,
  )
  # A plan knows their shapes without the files.
  assert jax.tree.map(lambda leaf: leaf.shape, trainer.constants) == jax.tree.map(
    lambda leaf: leaf.shape, stage.abstract_constants()
  )


def test_missing_and_damaged_files_are_named(files, tmp_path):
  folder, trunk, heads = files
  with pytest.raises(UserError, match='nowhere.pth: no such file.*docs/tokenizer.md'):
    lpips_weights.read(tmp_path / 'nowhere.pth', folder / 'heads.safetensors')
  (tmp_path / 'cut.safetensors').write_bytes((folder / 'heads.safetensors').read_bytes()[:500])
  with pytest.raises(UserError, match='cut.safetensors: not a readable file of weights'):
    lpips_weights.read(folder / 'vgg16.safetensors', tmp_path / 'cut.safetensors')
  with pytest.raises(UserError, match=r'lin0.model.1.weight is missing instead of \[1, 64, 1, 1\]'):
    lpips_weights.read(folder / 'vgg16.safetensors', folder / 'vgg16.safetensors')
  del trunk
  wrong = heads | {'lin2.model.1.weight': np.zeros((1, 7, 1, 1), np.float32)}
  safetensors.numpy.save_file(wrong, tmp_path / 'wrong.safetensors')
  with pytest.raises(UserError, match=r'lin2.model.1.weight is \[1, 7, 1, 1\] instead of'):
    lpips_weights.read(folder / 'vgg16.safetensors', tmp_path / 'wrong.safetensors')


class _Harmful:
  """Would run code when it is unpickled."""

  def __reduce__(self):
    return (open, ('ran', 'w'))


def test_a_file_that_would_run_code_is_refused(files, tmp_path, monkeypatch):
  pytest.importorskip('torch', reason='torch is not installed, which reads such files')
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'harmful.pth').write_bytes(pickle.dumps({'features.0.weight': _Harmful()}))
  with pytest.raises(UserError, match='harmful.pth: not a readable file of weights'):
    lpips_weights.read(tmp_path / 'harmful.pth', files[0] / 'heads.safetensors')
  assert not (tmp_path / 'ran').exists()


def test_torch_is_an_extra():
  error = ModuleNotFoundError("No module named 'torch'", name='torch')
  assert 'parti_jax[lpips]' in optional_packages.missing_extra(error)

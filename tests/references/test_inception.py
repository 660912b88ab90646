"""parti_jax.models.inception against torch-fidelity's network, with random weights."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
fidelity = pytest.importorskip('torch_fidelity.feature_extractor_inceptionv3')
interpolation = pytest.importorskip('torch_fidelity.interpolate_compat_tensorflow')

from parti_jax.evaluation.metrics import features  # noqa: E402
from parti_jax.importers import inception_file  # noqa: E402
from parti_jax.models import inception  # noqa: E402


def _network(path):
  """torch-fidelity's network with random weights and statistics, and its file at a path."""
  torch.manual_seed(0)
  class_ = fidelity.FeatureExtractorInceptionV3
  with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
    patch.setattr(fidelity, 'load_state_dict_from_url', lambda *args, **kwargs: {})
    patch.setattr(class_, 'load_state_dict', lambda self, state: None)
    network = class_('random', ['2048', 'logits_unbiased'])
  for module in network.modules():
    if isinstance(module, torch.nn.Conv2d):
      torch.nn.init.kaiming_normal_(module.weight)
    if isinstance(module, torch.nn.BatchNorm2d):
      for values, low, high in (
        (module.weight, 0.7, 1.3),
        (module.bias, -0.2, 0.2),
        (module.running_mean, -0.3, 0.3),
        (module.running_var, 0.7, 1.5),
      ):
        torch.nn.init.uniform_(values, low, high)
  # As the published file was written.
  torch.save(network.state_dict(), path, _use_new_zipfile_serialization=False)
  return network


@pytest.fixture(scope='module', name='both')
def fixture_both(tmp_path_factory):
  path = tmp_path_factory.mktemp('weights') / 'pt_inception-2015-12-05-6726825d.pth'
  network = _network(path)
  params, digest = inception_file.read(path)
  assert len(digest) == 64
  return network, params


@pytest.mark.parametrize('size', [64, 320])
def test_outputs_are_torch_fidelitys(both, size):
  network, params = both
  images = np.random.default_rng(size).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
  kept = []
  hook = network.Mixed_6d.branch1x1.register_forward_hook(lambda *args: kept.append(args[2]))
  with torch.no_grad():
    pool, logits = network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
  hook.remove()
  spatial = kept[0][:, :7].permute(0, 2, 3, 1).flatten(1)
  found = jax.jit(inception.Inception().apply)({'params': params}, jnp.asarray(images))
  assert found.pool.shape == (2, 2048) and found.spatial.shape == (2, 2023)
  assert found.logits.shape == (2, 1008)
  for ours, theirs in zip(found, (pool, spatial, logits)):
    theirs = theirs.numpy()
    assert theirs.std() > 0
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4 * np.abs(theirs).max())


@pytest.mark.parametrize('shape', [(7, 12), (299, 299), (512, 400)])
def test_resizing_is_tensorflow_1s(shape):
  images = np.random.default_rng(0).uniform(0, 255, (2, *shape, 3)).astype(np.float32)
  theirs = interpolation.interpolate_bilinear_2d_like_tensorflow1x(
    torch.from_numpy(images.transpose(0, 3, 1, 2)), size=(299, 299), align_corners=False
  )
  np.testing.assert_allclose(
    inception.resized(jnp.asarray(images), 299),
    theirs.numpy().transpose(0, 2, 3, 1),
    rtol=1e-6,
    atol=1e-3,
  )


def test_resizing_is_clean_fids():
  resize = pytest.importorskip('cleanfid.resize').build_resizer('clean')
  images = np.random.default_rng(0).integers(0, 256, (2, 410, 320, 3), dtype=np.uint8)
  expected = np.stack([resize(image) for image in images])
  np.testing.assert_array_equal(features.clean_resized(images, 299), expected)

"""parti_jax.models.lpips against the `lpips` package, with its own heads and random networks."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch')
package = pytest.importorskip('lpips')

from parti_jax.importers import lpips_files  # noqa: E402
from parti_jax.models import lpips  # noqa: E402

THEIR_NAMES = {'vgg16': 'vgg', 'alexnet': 'alex'}


@pytest.mark.parametrize('size', [(32, 48), (65, 71)])
@pytest.mark.parametrize('network', lpips.NETWORKS)
def test_the_distance_is_the_lpips_packages(tmp_path, network, size):
  torch.manual_seed(0)
  name = THEIR_NAMES[network]
  theirs = package.LPIPS(pretrained=True, net=name, pnet_rand=True, verbose=False)
  state = {}
  for part in theirs.net.children():
    for number, layer in part.named_children():
      if hasattr(layer, 'weight'):
        torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.normal_(layer.bias, std=0.1)
        state |= {f'features.{number}.{key}': value for key, value in layer.state_dict().items()}
  # As torchvision's file of VGG16 was written.
  torch.save(state, tmp_path / 'network.pth', _use_new_zipfile_serialization=False)
  heads = pathlib.Path(package.__path__[0], 'weights', 'v0.1', f'{name}.pth')
  images, others = np.random.default_rng(1).uniform(size=(2, 2, *size, 3)).astype(np.float32)
  tensors = (torch.from_numpy(x.transpose(0, 3, 1, 2)) for x in (images, others))
  with torch.no_grad():
    wanted = theirs(*tensors, normalize=True).numpy().ravel()
  params = lpips_files.read(tmp_path / 'network.pth', heads, network)
  module = lpips.LPIPS(network=network, precision=jax.lax.Precision.HIGHEST)
  found = jax.jit(module.apply)({'params': params}, jnp.asarray(images), jnp.asarray(others))
  np.testing.assert_allclose(found, wanted, rtol=1e-4)
  assert np.all(wanted > 0.01)

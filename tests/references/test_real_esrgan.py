"""parti_jax.importers.real_esrgan and models.real_esrgan against spandrel, with random weights."""

import flax.traverse_util
import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch')
esrgan = pytest.importorskip('spandrel.architectures.ESRGAN')
compact = pytest.importorskip('spandrel.architectures.Compact')

from parti_jax.importers import files  # noqa: E402
from parti_jax.importers import key_map  # noqa: E402
from parti_jax.importers import real_esrgan as importer  # noqa: E402
from parti_jax.models import upscalers  # noqa: E402
from parti_jax.sampling import placement  # noqa: E402
from parti_jax.sampling import upscaling  # noqa: E402

# Spandrel's growth is always 32.
GROWTH = 32
BLOCKS = 2


def _random(shapes, seed=0):
  """Arrays of which each moves the result, with a result near [0, 1]."""
  draw = np.random.default_rng(seed)
  arrays = {}
  for name, shape in shapes.items():
    scale = 1.0 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
    arrays[name] = torch.tensor(draw.normal(0, scale, shape).astype(np.float32))
  return arrays


def _rrdb_shapes(doublings, unshuffle, width=16):
  """{name: shape} of an RRDBNet with the names of Real-ESRGAN."""
  kernels = {'conv_first': (width, 3 * unshuffle**2), 'conv_last': (3, width)}
  kernels |= {name: (width, width) for name in ('conv_body', 'conv_hr')}
  kernels |= {f'conv_up{place}': (width, width) for place in range(1, doublings + 1)}
  for block in range(BLOCKS):
    for dense in (1, 2, 3):
      for place in range(1, 6):
        outputs = width if place == 5 else GROWTH
        name = f'body.{block}.rdb{dense}.conv{place}'
        kernels[name] = (outputs, width + (place - 1) * GROWTH)
  return _with_biases(kernels)


def _compact_shapes(factor, layers, width=16):
  kernels = {'body.0': (width, 3), f'body.{2 * layers + 2}': (3 * factor**2, width)}
  kernels |= {f'body.{2 * place}': (width, width) for place in range(1, layers + 1)}
  slopes = {f'body.{2 * place + 1}.weight': (width,) for place in range(layers + 1)}
  return _with_biases(kernels) | slopes


def _with_biases(kernels):
  shapes = {f'{name}.weight': (*shape, 3, 3) for name, shape in kernels.items()}
  return shapes | {f'{name}.bias': shape[:1] for name, shape in kernels.items()}


def _renamed(arrays):
  """Arrays with the names of ESRGAN's later code."""
  names = {
    'conv_body': 'trunk_conv',
    'body.': 'RRDB_trunk.',
    'rdb': 'RDB',
    'conv_up': 'upconv',
    'conv_hr': 'HRconv',
  }
  found = {}
  for name, array in arrays.items():
    for theirs, ours in names.items():
      name = name.replace(theirs, ours)
    found[name] = array
  return found


def _imported(path):
  """The config and the parameters of a file."""
  weights = files.open_weights([str(path)])
  config = importer.config_of(weights.arrays)
  sources = importer.key_map(config, weights.arrays)
  ignored = importer.ignored(weights.arrays)
  key_map.check(sources, weights.arrays, importer.expected(config), str(path), ignored)
  params = jax.tree.map(np.asarray, key_map.convert(sources, weights.arrays))
  return config, flax.traverse_util.unflatten_dict(params, sep='/')


def _theirs(descriptor, images):
  with torch.no_grad():
    found = descriptor.model.eval()(torch.tensor(images).permute(0, 3, 1, 2))
  return found.permute(0, 2, 3, 1).numpy()


def _compare(config, params, descriptor, images):
  ours = jax.jit(upscalers.module(config).apply)({'params': params}, images)
  theirs = _theirs(descriptor, images)
  np.testing.assert_allclose(ours, theirs, atol=1e-5)
  assert theirs.std() > 0.03


def _images(*shape):
  return np.random.default_rng(1).uniform(size=(2, *shape, 3)).astype(np.float32)


@pytest.mark.parametrize(
  'doublings, unshuffle, factor', [(2, 1, 4), (2, 2, 2), (2, 4, 1), (1, 1, 2), (3, 1, 8)]
)
@pytest.mark.parametrize('style', ['real_esrgan', 'esrgan', 'counted'])
def test_an_rrdb_net_gives_the_same_pixels(tmp_path, style, doublings, unshuffle, factor):
  arrays = _random(_rrdb_shapes(doublings, unshuffle))
  if style == 'esrgan':
    arrays = _renamed(arrays)
  descriptor = esrgan.ESRGANArch().load(dict(arrays))
  if style == 'counted':
    # Spandrel's own module has the names of ESRGAN's first code.
    arrays = descriptor.model.state_dict()
  torch.save(arrays if style != 'real_esrgan' else {'params_ema': arrays}, tmp_path / 'net.pth')
  config, params = _imported(tmp_path / 'net.pth')
  assert (config.factor, config.unshuffle, config.blocks) == (factor, unshuffle, BLOCKS)
  _compare(config, params, descriptor, _images(3 * unshuffle, 5 * unshuffle))


@pytest.mark.parametrize('factor, layers', [(4, 3), (2, 1)])
def test_an_srvgg_net_compact_gives_the_same_pixels(tmp_path, factor, layers):
  arrays = _random(_compact_shapes(factor, layers))
  torch.save({'params': arrays}, tmp_path / 'net.pth')
  config, params = _imported(tmp_path / 'net.pth')
  assert (config.factor, config.layers) == (factor, layers)
  _compare(config, params, compact.CompactArch().load(dict(arrays)), _images(5, 7))


@pytest.mark.parametrize('size', [(7, 9), (8, 5)])
def test_odd_pictures_are_extended_by_reflection(tmp_path, size):
  arrays = _random(_rrdb_shapes(2, 2))
  torch.save({'params_ema': arrays}, tmp_path / 'net.pth')
  config, params = _imported(tmp_path / 'net.pth')
  pictures = np.random.default_rng(2).integers(0, 256, (2, *size, 3)).astype(np.uint8)
  ours = upscaling.Upscaler(config, params, placement.Placement())(pictures)
  theirs = _theirs(esrgan.ESRGANArch().load(dict(arrays)), pictures / np.float32(255))
  assert ours.shape == theirs.shape
  assert np.abs(np.clip(theirs, 0, 1) * 255 - ours).max() < 0.51


def test_interpolated_weights_are_those_of_both_files(tmp_path):
  arrays = [_random(_compact_shapes(4, 2), seed) for seed in (0, 1)]
  paths = [tmp_path / f'{place}.pth' for place in (0, 1)]
  for path, content in zip(paths, arrays):
    torch.save({'params': content}, path)
  mixed = files.interpolated(*(files.open_weights([str(path)]) for path in paths), 0.25)
  for name, array in arrays[0].items():
    np.testing.assert_allclose(
      mixed.arrays[f'params.{name}'].read(), 0.25 * array + 0.75 * arrays[1][name], rtol=1e-6
    )

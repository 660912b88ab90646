"""Reads the weights of LPIPS from the files of torchvision and of the `lpips` package.

| network | torchvision's file | file of the `lpips` package, weights/v0.1/ |
|---|---|---|
| vgg16 | vgg16-397923af.pth | vgg.pth |
| alexnet | alexnet-owt-7be5be79.pth, alexnet-owt-4df8aa71.pth | alex.pth |

Files of .safetensors with the same names are read, too.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.importers import files
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import lpips

# A trained classifier's further layers.
_CLASSIFIER = (r'classifier\..*',)
# Numbers of AlexNet's convolutions among torchvision's layers; between them are ReLUs and pools.
_ALEXNET_LAYERS = (0, 3, 6, 8, 10)


def network_key_map(network: str) -> key_map_lib.KeyMap:
  """Returns the arrays of torchvision's file that make up the convolutions.

  Args:
    network: one of `lpips.NETWORKS`.
  """
  found = {}
  for path, layer in _layers(network).items():
    name = f'features.{layer}'
    found[f'{path}/kernel'] = key_map_lib.one(f'{name}.weight', key_map_lib.convolution)
    found[f'{path}/bias'] = key_map_lib.one(f'{name}.bias')
  return found


def heads_key_map() -> key_map_lib.KeyMap:
  """Returns the arrays of the `lpips` package's file that weight the feature maps."""
  return {
    f'head_{stage}': key_map_lib.one(
      f'lin{stage}.model.1.weight', lambda array: array.reshape(array.shape[1:2])
    )
    for stage in range(5)
  }


def shapes(network: str) -> dict[str, tuple[int, ...]]:
  """Returns {path of a parameter of `lpips.LPIPS`: its shape}."""
  if network == 'alexnet':
    sizes = [[(width, kernel)] for width, kernel, _, _ in lpips.ALEXNET]
  else:
    sizes = [[(width, 3) for width in widths] for widths in lpips.VGG16]
  flat = [layer for stage in sizes for layer in stage]
  found: dict[str, tuple[int, ...]] = {}
  channels = 3
  for path, (width, kernel) in zip(_layers(network), flat, strict=True):
    found[f'{path}/kernel'] = (kernel, kernel, channels, width)
    found[f'{path}/bias'] = (width,)
    channels = width
  return found | {f'head_{stage}': (layers[-1][0],) for stage, layers in enumerate(sizes)}


def _layers(network: str) -> dict[str, int]:
  """Returns {path of a convolution: number of torchvision's layer}."""
  if network == 'alexnet':
    return {f'alexnet/convolution_{place}': layer for place, layer in enumerate(_ALEXNET_LAYERS)}
  found, layer = {}, 0
  for stage, widths in enumerate(lpips.VGG16):
    for place in range(len(widths)):
      found[f'vgg16/stage_{stage}_{place}'] = layer
      layer += 2  # A ReLU follows each convolution,
    layer += 1  # and a pool each stage.
  return found


def read(
  network_path: str | os.PathLike, heads_path: str | os.PathLike, network: str = 'vgg16'
) -> dict[str, Any]:
  """Reads the parameters of `lpips.LPIPS`.

  Args:
    network_path: torchvision's file of the network, of which only the convolutions are read.
    heads_path: the file of the `lpips` package.
    network: one of `lpips.NETWORKS`.

  Returns:
    A tree of float32 numpy arrays.

  Raises:
    UserError: if a file is missing or damaged, or holds other weights.
  """
  sizes = shapes(network)
  found: dict[str, np.ndarray] = {}
  for path, key_map, ignored in (
    (network_path, network_key_map(network), _CLASSIFIER),
    (heads_path, heads_key_map(), ()),
  ):
    arrays = _opened(path)
    expected = {name: sizes[name] for name in key_map}
    try:
      key_map_lib.check(key_map, arrays, expected, os.fspath(path), ignored)
    except UserError as error:
      raise UserError(f'{error}; get the file of {network} as docs/tokenizer.md says') from error
    converted = key_map_lib.convert(key_map, arrays)
    found |= {name: np.asarray(array) for name, array in converted.items()}
  return flax.traverse_util.unflatten_dict(found, sep='/')


def _opened(path: str | os.PathLike) -> Mapping[str, key_map_lib.StoredArray]:
  try:
    return files.open_weights([os.fspath(path)]).arrays
  except UserError as error:
    raise UserError(f'{error}; docs/tokenizer.md says where to get the weights of LPIPS') from error

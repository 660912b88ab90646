"""Reads the weights of the FID's Inception into `parti_jax.models.inception`.

The file is torch-fidelity's and pytorch-fid's pt_inception-2015-12-05-6726825d.pth, or another one
with the same names.
"""

from __future__ import annotations

import os
from typing import Any

import flax.traverse_util
import numpy as np

from parti_jax.importers import files
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import inception

_PARTS = {
  'kernel': 'conv.weight',
  'scale': 'bn.weight',
  'bias': 'bn.bias',
  'mean': 'bn.running_mean',
  'variance': 'bn.running_var',
}
# Not part of the FID's network: the biases of the classes, the counters of batch normalization, and
# the second classifier that helps training.
IGNORED = (r'fc\.bias', r'.*\.num_batches_tracked', r'AuxLogits\..*')


def key_map(module: inception.Inception = inception.PUBLISHED) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of a network."""
  return {path: _source(path) for path in _shapes(module)}


def _source(path: str) -> key_map_lib.Source:
  if path == 'classes':
    return key_map_lib.one('fc.weight', key_map_lib.linear)
  *modules, part = path.split('/')
  modules[0] = modules[0].capitalize()
  change = key_map_lib.convolution if part == 'kernel' else key_map_lib.unchanged
  return key_map_lib.one('.'.join([*modules, _PARTS[part]]), change)


def _shapes(module: inception.Inception) -> dict[str, tuple[int, ...]]:
  found = flax.traverse_util.flatten_dict(inception.abstract_params(module), sep='/')
  return {path: leaf.shape for path, leaf in found.items()}


def check(
  arrays: dict[str, Any], where: str, module: inception.Inception = inception.PUBLISHED
) -> None:
  """Raises UserError, naming the arrays, unless these are the weights of the network.

  Args:
    arrays: {name: array} of a file.
    where: the file, for the message.
    module: the network.
  """
  key_map_lib.check(key_map(module), arrays, _shapes(module), where, IGNORED)


def read(
  path: str | os.PathLike, module: inception.Inception = inception.PUBLISHED
) -> tuple[dict[str, Any], str]:
  """Reads the parameters of a network.

  Args:
    path: the file; torch's or safetensors.
    module: the network.

  Returns:
    A tree of float32 numpy arrays, and the SHA-256 of the file.

  Raises:
    UserError: the file is missing or damaged, or holds other weights.
  """
  weights = files.open_weights([os.fspath(path)])
  check(dict(weights.arrays), os.fspath(path), module)
  found = key_map_lib.convert(key_map(module), weights.arrays)
  params = {path: np.asarray(array) for path, array in found.items()}
  return flax.traverse_util.unflatten_dict(params, sep='/'), weights.digest()

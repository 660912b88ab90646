"""Adapters (LoRA) of a network of a model folder: their file, and the network with them.

The file is one of safetensors with the matrices of `parti_jax.models.lora`. Its metadata has the name of
the network, rank, alpha and the fingerprint of the base, the network that they were trained on: added
to any other parameters, they mean nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import numpy as np
import safetensors
import safetensors.numpy

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.models import lora

# Identifies the file, in its metadata.
_FORMAT = 'parti_jax.lora'
_VERSION = '1'
# A file is read as a whole. Adapters of rank 64 for all projections of the 20B model have 2.5 GB.
_LARGEST = 1 << 34
_MOST_RANK = 1 << 16
_AGAIN = 'write it again with `parti-jax export --no-merge`'


class Adapters(NamedTuple):
  """Adapters of one network.

  Attributes:
    network: its name in `model_folder.NETWORKS`.
    settings: their rank, alpha and targets.
    params: the tree of their matrices, without axis names.
    base: fingerprint of the parameters that they were trained on (`fingerprints.of_parameters`).
    steps: number of training steps; None if unknown.
  """

  network: str
  settings: lora.Settings
  params: dict[str, Any]
  base: str
  steps: int | None = None


class AdaptedArray(parameter_files.StoredArray):
  """A kernel with its adapters, W + scale · A · B, of which only what is used is computed.

  It is read like a `parameter_files.StoredArray`.

  Attributes:
    shape: its shape.
    dtype: the dtype that it is converted to when it is computed; the computation is in float32.
  """

  def __init__(
    self,
    kernel: Any,
    members: Sequence[tuple[lora.Projection, np.ndarray, np.ndarray]],
    scale: float,
    dtype: np.dtype | type = np.float32,
    layer: int | None = None,
  ):
    """Refers to the arrays.

    Args:
      kernel: W, a NumPy array or one that is read when it is used; of all layers of a stack.
      members: the projections that have this kernel, each with its A and B.
      scale: what A · B is multiplied by.
      dtype: the dtype to convert it to.
      layer: the layer of a stack; None for all of them.
    """
    self._kernel, self._members, self._scale = kernel, list(members), scale
    self._layer, self._form = layer, self._members[0][0]
    self.shape = tuple(kernel.shape) if layer is None else tuple(kernel.shape)[1:]
    self.dtype = np.dtype(dtype)

  def astype(self, dtype: Any) -> AdaptedArray:
    """Returns the same array, to be converted to another dtype."""
    return AdaptedArray(self._kernel, self._members, self._scale, np.dtype(dtype), self._layer)

  def __getitem__(self, index: int | tuple[slice, ...]) -> AdaptedArray | np.ndarray:
    if isinstance(index, int):
      place = range(self.shape[0])[index]
      if self._form.stacked and self._layer is None:
        return AdaptedArray(self._kernel, self._members, self._scale, self.dtype, place)
      whole = (slice(None),) * (self.ndim - 1)
      return self._values((slice(place, place + 1), *whole))[0]
    return self._values(tuple(index))

  def _values(self, where: tuple[slice, ...]) -> np.ndarray:
    """Returns a part; raises UserError if it has values that the dtype can't hold."""
    with np.errstate(over='ignore', invalid='ignore'):
      found = self._exact(where).astype(self.dtype, copy=False)
    self._check_finite(found)
    return found

  def _exact(self, where: tuple[slice, ...]) -> np.ndarray:
    """Returns a part in float32."""
    if not self._form.stacked:
      return self._of_layer(None, where)
    if self._layer is not None:
      return self._of_layer(self._layer, where)
    layers = range(*where[0].indices(self.shape[0]))
    shape = [len(range(*part.indices(size))) for part, size in zip(where, self.shape)]
    found = np.empty(shape, np.float32)
    for place, layer in enumerate(layers):
      found[place] = self._of_layer(layer, where[1:])
    return found

  def _of_layer(self, layer: int | None, where: tuple[slice, ...]) -> np.ndarray:
    of_stack = lambda array: array if layer is None else array[layer]
    found = np.array(of_stack(self._kernel)[where], np.float32)
    inputs = self._form.inputs
    for one, a, b in self._members:
      outputs = where[inputs:] if one.part is None else where[inputs + 1 :]
      product = np.tensordot(
        np.asarray(of_stack(a), np.float32)[where[:inputs]],
        np.asarray(of_stack(b), np.float32)[(slice(None), *outputs)],
        1,
      )
      if one.part is None or one.parts is None:
        found += np.float32(self._scale) * product
      elif one.part in (chosen := range(*where[inputs].indices(one.parts))):
        place: tuple[Any, ...] = (*(slice(None),) * inputs, chosen.index(one.part))
        found[place] += np.float32(self._scale) * product
    return found

  def _check_finite(self, found: np.ndarray) -> None:
    if not np.all(np.isfinite(found)):
      names = ', '.join(one.name for one, *_ in self._members)
      raise UserError(
        f'{names}: with its adapters times {self._scale:g}, the kernel is not finite in {found.dtype}; '
        'give a smaller factor or another dtype, or check whether the training diverged'
      )


def projections(network: str, config: Any) -> list[lora.Projection]:
  """Returns the projections of a network of a model folder.

  Args:
    network: its name in `model_folder.NETWORKS`.
    config: its config.
  """
  return lora.projections(model_folder.abstract(network, config))


def adapted(
  params: Mapping[str, Any],
  adapters: Adapters,
  known: Iterable[lora.Projection],
  strength: float = 1.0,
) -> dict[str, Any]:
  """Returns the parameters of a network with adapters; computes nothing yet.

  Args:
    params: the parameters, NumPy arrays or lazily read ones.
    adapters: the adapters.
    known: the result of `projections`.
    strength: what the adapters' own scale is multiplied by.
  """
  flat = flax.traverse_util.flatten_dict(dict(params))
  scale = strength * adapters.settings.scale
  for path, members in lora.by_kernel(known, adapters.params):
    arrays = [(one, np.asarray(a), np.asarray(b)) for one, a, b in members]
    flat[(*path, 'kernel')] = AdaptedArray(flat[(*path, 'kernel')], arrays, scale)
  return flax.traverse_util.unflatten_dict(flat)


def check_base(name: str, base: str, params: Mapping[str, Any], where: str) -> None:
  """Raises UserError unless adapters belong to these parameters.

  Args:
    name: name of the adapters, for messages.
    base: the fingerprint of their base.
    params: the parameters.
    where: where the parameters are from, for messages.
  """
  found = fingerprints.of_parameters(params)
  if found != base:
    raise UserError(
      f'{name}: the adapters were trained on the base {base}, but {where} has {found}; give the '
      'model that they were trained on'
    )


def with_adapters(
  model: model_folder.Model, given: Sequence[str] | str, name: str
) -> tuple[model_folder.Model, str]:
  """Returns a model with adapters added to its networks, and a name that says so.

  Args:
    model: the model.
    given: a file of adapters, or several, with ':' and a factor after it or not, such as
      'pets.safetensors:0.5'. Several files for one network add up.
    name: name of the model.

  Raises:
    UserError: if a file is missing or damaged, has adapters of a network that the model lacks, or
      was trained on other parameters.
  """
  files = [given] if isinstance(given, str) else list(given)
  changed: dict[str, model_folder.Part] = {}
  for text in files:
    file, strength = parsed(text)
    found = read(file)
    networks = model.networks if found.network in model_folder.REQUIRED else model.parts
    if found.network not in networks:
      raise UserError(
        f'{file} has adapters of a {found.network}, which {name} does not have; give the model '
        'that they were trained on'
      )
    part = networks[found.network]
    check_base(file, found.base, part.params, f'the {found.network} of {name}')
    known = projections(found.network, part.config)
    check(found, known, file)
    now = changed.get(found.network, part)
    params = adapted(now.params, found, known, strength)
    changed[found.network] = now._replace(params=params)
  required = {
    f'{network}_params': changed[network].params
    for network in model_folder.REQUIRED
    if network in changed
  }
  parts = model_folder.LazyParts(
    model.parts, lambda network: changed.get(network) or model.parts[network]
  )
  shown = ' + '.join([name, *map(storage.name, files)])
  return (dataclasses.replace(model, parts=parts, **required) if files else model), shown


def parsed(text: str) -> tuple[str, float]:
  """Returns the file and the factor of 'FILE' or 'FILE:FACTOR'.

  Raises:
    UserError: if the factor is not a finite number.
  """
  text = checks.text('lora', text)
  file, colon, factor = text.rpartition(':')
  try:
    number = float(factor)
  except ValueError:
    if file and not storage.exists(text) and storage.exists(file):
      raise UserError(
        f'lora={text!r}: the factor {factor!r} after the file is not a number'
      ) from None
    return text, 1.0
  if not colon or not file:
    return text, 1.0
  if not math.isfinite(number):
    raise UserError(f'lora={text!r}: the factor {factor} must be a finite number')
  return file, number


def write(path: str | os.PathLike[str], adapters: Adapters) -> None:
  """Writes adapters to a file, in float32.

  Raises:
    UserError: if a value is not finite.
  """
  flat = flax.traverse_util.flatten_dict(nn.meta.unbox(adapters.params), sep='/')
  arrays = {name: np.asarray(leaf, np.float32) for name, leaf in sorted(flat.items())}
  for name, array in arrays.items():
    if not np.all(np.isfinite(array)):
      raise UserError(
        f'{path}: {name} has values that are not finite; check whether the training diverged'
      )
  metadata = {
    'format': _FORMAT,
    'version': _VERSION,
    'network': adapters.network,
    'rank': str(adapters.settings.rank),
    'alpha': repr(float(adapters.settings.alpha)),
    'targets': json.dumps(adapters.settings.targets),
    'base': adapters.base,
    **({} if adapters.steps is None else {'steps': str(adapters.steps)}),
  }
  storage.write(path, safetensors.numpy.save(arrays, metadata))


def read(path: str | os.PathLike[str]) -> Adapters:
  """Reads a file of adapters; `check` compares it with a network.

  Args:
    path: a path or a URL.

  Raises:
    UserError: if the file is missing, damaged, or not one of adapters.
  """
  path = checks.text('lora', os.fspath(path))
  if storage.is_folder(path):
    raise UserError(f'{path} is a folder; give the file that `parti-jax export --no-merge` wrote')
  if not storage.exists(path):
    raise UserError(
      f'{path}: file not found; give the file that `parti-jax export --no-merge` wrote'
    )
  content = storage.read(path, _LARGEST)
  try:
    # First, since it checks the header.
    arrays = safetensors.numpy.load(content)
    size = int.from_bytes(content[:8], 'little')
    metadata = json.loads(content[8 : 8 + size]).get('__metadata__', {})
  except (safetensors.SafetensorError, ValueError, AttributeError, KeyError) as error:
    raise UserError(
      f'{path} is damaged, or not a file of safetensors ({error}); {_AGAIN}'
    ) from error
  if metadata.get('format') != _FORMAT:
    raise UserError(f'{path} is not a file of adapters of this package; {_AGAIN}')
  if metadata.get('version') != _VERSION:
    raise UserError(
      f'{path}: adapters of the format version {metadata.get("version")}, of which this version '
      f'of parti_jax knows {_VERSION}'
    )
  try:
    rank, alpha = int(metadata['rank']), float(metadata['alpha'])
    network, base = metadata['network'], metadata['base']
    targets = tuple(str(target) for target in json.loads(metadata['targets']))
    steps = int(metadata['steps']) if 'steps' in metadata else None
    if network not in model_folder.NETWORKS or not 1 <= rank <= _MOST_RANK:
      raise ValueError(f'network {network!r}, rank {rank}')
    if not math.isfinite(alpha):
      raise ValueError(f'alpha {alpha}')
  except (ValueError, KeyError, TypeError) as error:
    raise UserError(f'{path}: its metadata is damaged ({error}); {_AGAIN}') from error
  for name, array in arrays.items():
    if array.dtype not in (np.float32, np.float16) or not np.all(np.isfinite(array)):
      raise UserError(f'{path}: {name} is not an array of finite floating-point numbers; {_AGAIN}')
  params = {name: array.astype(np.float32) for name, array in arrays.items()}
  try:
    tree = flax.traverse_util.unflatten_dict(params, sep='/')
  except (TypeError, ValueError, AttributeError) as error:
    raise UserError(f'{path}: names of its arrays contradict each other; {_AGAIN}') from error
  return Adapters(network, lora.Settings(rank, alpha, targets), tree, base, steps)


def check(adapters: Adapters, known: Iterable[lora.Projection], name: str) -> None:
  """Raises UserError unless the matrices are those of the projections that the targets choose.

  A part of the network, such as the text encoder, may have none, since its run may have frozen it.

  Args:
    adapters: the adapters.
    known: the projections of the network.
    name: name of the adapters, for messages.
  """
  flat = flax.traverse_util.flatten_dict(adapters.params, sep='/')
  known = list(known)
  expected = {
    f'{one.name}/{matrix}': shape
    for one in known
    for matrix, (shape, _) in one.form(adapters.settings.rank).items()
  }
  for path, array in flat.items():
    module, _, matrix = path.rpartition('/')
    other = f'{module}/{lora.B if matrix == lora.A else lora.A}'
    if path not in expected:
      raise UserError(f'{name}: {path} is not of a projection of the {adapters.network}; {_AGAIN}')
    if tuple(array.shape) != expected[path]:
      raise UserError(
        f'{name}: {path} has the shape {list(array.shape)} instead of {list(expected[path])}; {_AGAIN}'
      )
    if other not in flat:
      raise UserError(f'{name}: {other} is missing; {_AGAIN}')
  if not flat:
    raise UserError(f'{name} has no adapters; {_AGAIN}')
  found = {path.rpartition('/')[0] for path in flat}
  parts = {one.partition('/')[0] for one in found}
  chosen = lora.select(known, adapters.settings.targets, f'{name}: targets')
  wanted = {one.name for one in chosen if one.name.partition('/')[0] in parts}
  if found != wanted:
    first, *more = sorted(found ^ wanted)
    others = f', nor do {len(more)} others' if more else ''
    raise UserError(f'{name}: {first} does not have adapters as the targets say{others}; {_AGAIN}')


def merged(part: model_folder.Part, adapters: Adapters) -> model_folder.Part:
  """Returns a network with adapters added to its kernels; computes nothing yet."""
  known = projections(adapters.network, part.config)
  return part._replace(params=adapted(part.params, adapters, known))


def count(adapters: Mapping[str, Any]) -> int:
  """Returns the number of values of a tree of adapters."""
  return sum(math.prod(np.shape(leaf)) for leaf in jax.tree.leaves(adapters))

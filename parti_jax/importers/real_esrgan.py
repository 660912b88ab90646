"""Reads published weights of Real-ESRGAN and ESRGAN into `parti_jax.models.real_esrgan`.

| network | weights |
|---|---|
| RRDBNet | RealESRGAN_x4plus, x2plus and x4plus_anime_6B; RealESRNet; ESRGAN and BSRGAN |
| SRVGGNetCompact | realesr-general-x4v3 and its wdn variant; realesr-animevideov3 |

The names of the arrays tell the network apart, and their shapes its sizes. RRDBNet has three sets of
names: those of Real-ESRGAN, those of ESRGAN's later code, and those of its first code, where modules
are counted.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import real_esrgan

FORMAT = 'real-esrgan'
Config = real_esrgan.RRDBNetConfig | real_esrgan.SRVGGNetCompactConfig
Arrays = Mapping[str, key_map_lib.StoredArray]
Shapes = Mapping[str, tuple[int, ...]]

# A file may hold the network twice; averaged weights are preferred, as in the original code.
_PREFERRED = ('params_ema.', 'params.')
# Names of RRDBNet's modules, by those of ours; {} stands for numbers of modules.
_NAMES: Mapping[str, Mapping[str, str]] = {
  'real_esrgan': {
    'head': 'conv_first',
    'dense': 'body.{}.rdb{}.conv{}',
    'trunk': 'conv_body',
    'doubling': 'conv_up{}',
    'hidden': 'conv_hr',
    'tail': 'conv_last',
  },
  'esrgan': {
    'head': 'conv_first',
    'dense': 'RRDB_trunk.{}.RDB{}.conv{}',
    'trunk': 'trunk_conv',
    'doubling': 'upconv{}',
    'hidden': 'HRconv',
    'tail': 'conv_last',
  },
  'counted': {'head': 'model.0', 'dense': 'model.1.sub.{}.RDB{}.conv{}.0'},
}
_COMPACT = 'compact'
# More than any network of these has; 2 to the power of a number in a damaged file may not fit in memory.
_MOST_DOUBLINGS = 8
# Names that occur in all files of a set of names, and in no others.
_ANCHORS = {
  style: f'{names["dense"].format(0, 1, 1)}.weight' for style, names in _NAMES.items()
} | {_COMPACT: 'body.0.weight'}


def config_of(arrays: Arrays) -> Config:
  """Infers the sizes of a network from its arrays.

  Args:
    arrays: {name: array} of a file.

  Raises:
    UserError: if they aren't weights of these networks, or lack arrays that determine the sizes.
  """
  prefix, style = _located(arrays)
  shapes = {
    name.removeprefix(prefix): tuple(array.shape)
    for name, array in arrays.items()
    if name.startswith(prefix)
  }
  try:
    return _compact_config(shapes) if style == _COMPACT else _rrdb_config(shapes, style)
  except (KeyError, IndexError, ValueError) as error:
    raise UserError(
      f'the weights of the format {FORMAT} lack an array, or it has another shape: {error}'
    ) from error


def key_map(config: Config, arrays: Arrays) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of a network.

  Args:
    config: the result of `config_of`.
    arrays: {name: array} of the file.

  Raises:
    UserError: if they aren't weights of these networks.
  """
  prefix, style = _located(arrays)
  if isinstance(config, real_esrgan.SRVGGNetCompactConfig):
    return _compact_key_map(config, prefix)
  return _rrdb_key_map(config, prefix, style)


def ignored(arrays: Arrays) -> tuple[str, ...]:
  """Returns regular expressions of names in a file that the network does not need.

  Raises:
    UserError: if they aren't weights of these networks.
  """
  prefix, _ = _located(arrays)
  # Such as the weights that aren't averaged.
  return (f'(?!{re.escape(prefix)}).*',) if prefix else ()


def expected(config: Config) -> Shapes:
  """Returns {path: shape} of the parameters of a network."""
  return parameter_files.shapes(model_folder.abstract('super_resolution', config))


def _located(arrays: Arrays) -> tuple[str, str]:
  """Returns the prefix of the network's names in a file, and the set of names after it."""
  for style, anchor in _ANCHORS.items():
    prefixes = key_map_lib.prefixes(arrays, anchor)
    preferred = [prefix for prefix in _PREFERRED if prefix in prefixes]
    if preferred or len(prefixes) == 1:
      return (preferred or prefixes)[0], style
    if prefixes:
      raise UserError(
        f'the weights of the format {FORMAT} are there {len(prefixes)} times, under '
        f'{", ".join(map(repr, sorted(prefixes)))}; save the one to read alone'
      )
  raise UserError(
    f'the weights are not of the format {FORMAT}: there is none of {", ".join(_ANCHORS.values())}'
  )


def _rrdb_config(shapes: Shapes, style: str) -> real_esrgan.RRDBNetConfig:
  names = _NAMES[style]
  blocks = key_map_lib.count(lambda place: f'{names["dense"].format(place, 1, 1)}.weight' in shapes)
  if style == 'counted':
    # Each doubling has three modules: upsampling, a convolution, an activation. Two convolutions
    # with an activation between them follow.
    numbers = [int(found[1]) for name in shapes if (found := re.match(r'model\.(\d+)\.', name))]
    doublings, rest = divmod(max(numbers) - 4, 3)
    if rest or doublings < 0:
      raise ValueError(f'the last of its modules is model.{max(numbers)}')
  else:
    doublings = key_map_lib.count(
      lambda place: f'{names["doubling"].format(place + 1)}.weight' in shapes
    )
  if doublings > _MOST_DOUBLINGS:
    raise ValueError(f'it doubles height and width {doublings} times')
  width, channels, *_ = shapes[f'{names["head"]}.weight']
  unshuffle = math.isqrt(channels // 3)
  if not unshuffle or channels != 3 * unshuffle**2 or 2**doublings % unshuffle:
    raise ValueError(
      f'{names["head"]}.weight takes {channels} channels, with {doublings} doublings after it'
    )
  return real_esrgan.RRDBNetConfig(
    factor=2**doublings // unshuffle,
    blocks=blocks,
    width=width,
    growth=shapes[f'{names["dense"].format(0, 1, 1)}.weight'][0],
    unshuffle=unshuffle,
    dtype='float32',
  )


def _compact_config(shapes: Shapes) -> real_esrgan.SRVGGNetCompactConfig:
  # Convolutions and activations alternate; the last convolution has none.
  convolutions = key_map_lib.count(lambda place: f'body.{2 * place}.weight' in shapes)
  features = shapes[f'body.{2 * convolutions - 2}.weight'][0]
  factor = math.isqrt(features // 3)
  if convolutions < 3 or features != 3 * factor**2:
    raise ValueError(f'body has {convolutions} convolutions, the last one of {features} features')
  return real_esrgan.SRVGGNetCompactConfig(
    factor=factor,
    layers=convolutions - 2,
    width=shapes['body.0.weight'][0],
    dtype='float32',
  )


def _rrdb_key_map(config: real_esrgan.RRDBNetConfig, prefix: str, style: str) -> key_map_lib.KeyMap:
  names, doublings = _NAMES[style], config.doublings
  places = {'trunk': f'model.1.sub.{config.blocks}'} | {
    'hidden': f'model.{2 + 3 * doublings}',
    'tail': f'model.{4 + 3 * doublings}',
  }
  found = {}
  for module in ('head', 'trunk', 'hidden', 'tail'):
    found[module] = names.get(module) or places[module]
  for place in range(1, doublings + 1):
    found[f'doubling_{place}'] = names.get('doubling', f'model.{3 * place}').format(place)
  arrays = {}
  for module, name in found.items():
    from_pixels = functools.partial(_from_pixels, side=config.unshuffle)
    change = from_pixels if module == 'head' else key_map_lib.convolution
    arrays[f'{module}/kernel'] = key_map_lib.one(f'{prefix}{name}.weight', change)
    arrays[f'{module}/bias'] = key_map_lib.one(f'{prefix}{name}.bias')
  for dense in range(1, real_esrgan.DENSE_BLOCKS + 1):
    for place in range(1, real_esrgan.CONVOLUTIONS + 1):
      name, path = names['dense'].format('{}', dense, place), f'layers/dense_{dense}/conv_{place}'
      arrays[f'{path}/kernel'] = key_map_lib.layers(
        f'{prefix}{name}.weight', config.blocks, key_map_lib.convolution
      )
      arrays[f'{path}/bias'] = key_map_lib.layers(f'{prefix}{name}.bias', config.blocks)
  return arrays


def _compact_key_map(config: real_esrgan.SRVGGNetCompactConfig, prefix: str) -> key_map_lib.KeyMap:
  name = lambda number, kind: f'{prefix}body.{number}.{kind}'
  numbers = range(2, 2 * config.layers + 2, 2)
  stacked = lambda names, change=key_map_lib.unchanged: key_map_lib.Source(
    tuple(names), change, stacked=True
  )
  last = 2 * config.layers + 2
  to_pixels = functools.partial(_to_pixels, side=config.factor)
  return {
    'head/conv/kernel': key_map_lib.one(name(0, 'weight'), key_map_lib.convolution),
    'head/conv/bias': key_map_lib.one(name(0, 'bias')),
    'head/activation/slope': key_map_lib.one(name(1, 'weight')),
    'layers/conv/kernel': stacked(
      (name(number, 'weight') for number in numbers), key_map_lib.convolution
    ),
    'layers/conv/bias': stacked(name(number, 'bias') for number in numbers),
    'layers/activation/slope': stacked(name(number + 1, 'weight') for number in numbers),
    'tail/kernel': key_map_lib.one(
      name(last, 'weight'), lambda array: to_pixels(key_map_lib.convolution(array))
    ),
    'tail/bias': key_map_lib.one(name(last, 'bias'), to_pixels),
  }


def _from_pixels(array: np.ndarray, side: int) -> np.ndarray:
  """Converts a convolution of squares of pixels, whose values torch orders by channel first."""
  features, channels, *kernel = array.shape
  array = array.reshape(features, channels // side**2, side**2, *kernel).swapaxes(1, 2)
  return key_map_lib.convolution(array.reshape(features, channels, *kernel))


def _to_pixels(array: np.ndarray, side: int) -> np.ndarray:
  """Orders the features on the last axis, squares of pixels, by position first."""
  *others, features = array.shape
  array = array.reshape(*others, features // side**2, side**2).swapaxes(-1, -2)
  return array.reshape(*others, features)

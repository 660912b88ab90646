"""What the readers of networks of torch's Transformers share: arrays, and transformers' configs."""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import preprocessing
from parti_jax.importers import key_map
from parti_jax.models import config_checks

Arrays = Mapping[str, key_map.StoredArray]
_Channels = tuple[float, float, float]

# Names of Pillow's resampling filters, by which configs name them.
_RESAMPLING = {2: 'bilinear', 3: 'bicubic'}


def prefix(arrays: Arrays, marker: str) -> str | None:
  """Returns the prefix of the array names in a file, such as 'state_dict.'.

  Args:
    arrays: {name: array in the file}.
    marker: a name that the network always has.

  Returns:
    The text before the marker; None if there is no such array.

  Raises:
    UserError: if there are several, such as of weights and of their averages.
  """
  found = key_map.prefixes(arrays, marker)
  if len(found) > 1:
    raise UserError(f'the file has {marker} more than once: after {", ".join(map(repr, found))}')
  return found[0] if found else None


def shape(arrays: Arrays, name: str, axes: int) -> tuple[int, ...]:
  """Returns the shape of an array.

  Raises:
    UserError: if the array is missing or has another number of axes, or no values.
  """
  if name not in arrays:
    raise UserError(f'the array {name} is missing')
  found = tuple(arrays[name].shape)
  if len(found) != axes or 0 in found:
    raise UserError(f'the array {name} {list(found)} should have {axes} axes')
  return found


def count_layers(arrays: Arrays, template: str) -> int:
  """Counts the layers by an array that each of them has; `template` has {} for the layer.

  Raises:
    UserError: if there is none.
  """
  found = 0
  while template.format(found) in arrays:
    found += 1
  if not found:
    raise UserError(f'the array {template.format(0)} is missing')
  return found


def grid(patches: int, where: str) -> int:
  """Returns the side of a square of patches.

  Raises:
    UserError: if their number isn't a square.
  """
  side = math.isqrt(patches)
  if side * side != patches or not side:
    raise UserError(f'{where} has positions of {patches} patches, which is not a square number')
  return side


def to_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a conversion of a torch Linear's weight [out, in] to a kernel [in, heads, head_dim]."""

  def change(array):
    _, width = array.shape
    return array.T.reshape(width, heads, -1)

  return change


def from_heads(heads: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a conversion of a torch Linear's [out, in] to a kernel [heads, head_dim, out]."""

  def change(array):
    width, _ = array.shape
    return array.T.reshape(heads, -1, width)

  return change


def split_bias(heads: int) -> Callable[[np.ndarray], np.ndarray]:
  """Returns a conversion of a bias [out] to a bias [heads, head_dim]."""
  return lambda array: array.reshape(heads, -1)


def fused(
  part: int, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[np.ndarray], np.ndarray]:
  """Changes query (0), key (1) or value (2) of an array in which they follow one another."""
  return lambda array: change(array.reshape((3, -1) + array.shape[1:])[part])


def patches(array: np.ndarray) -> np.ndarray:
  """Returns the kernel [patch, out] of a torch Conv2d's weight [out, 3, height, width]."""
  return key_map.convolution(array).reshape(-1, array.shape[0])


def norm(ours: str, theirs: str) -> dict[str, key_map.Source]:
  """Returns the sources of a torch LayerNorm."""
  return {
    f'{ours}/scale': key_map.one(f'{theirs}.weight'),
    f'{ours}/bias': key_map.one(f'{theirs}.bias'),
  }


def stacked(
  ours: str,
  theirs: str,
  count: int,
  kernel: Callable[[np.ndarray], np.ndarray] = key_map.linear,
  bias: Callable[[np.ndarray], np.ndarray] | None = None,
  last: str = 'kernel',
) -> dict[str, key_map.Source]:
  """Returns the sources of a torch Linear, or with `last='scale'` a LayerNorm, of all layers."""
  weight = (kernel,) if last == 'kernel' else ()
  return {
    f'{ours}/{last}': key_map.layers(f'{theirs}.weight', count, *weight),
    f'{ours}/bias': key_map.layers(f'{theirs}.bias', count, *((bias,) if bias else ())),
  }


def transformers_layers(
  ours: str, theirs: str, count: int, heads: int
) -> dict[str, key_map.Source]:
  """Returns the sources of the blocks of a tower, by the names of transformers.

  Args:
    ours: path of our blocks, such as 'image_encoder/transformer/layers'.
    theirs: prefix of their names, such as 'vision_model.encoder.layers'.
    count: number of blocks.
    heads: number of attention heads.
  """
  block = theirs + '.{}'
  found: dict[str, key_map.Source] = {}
  for part in ('query', 'key', 'value'):
    found |= stacked(
      f'{ours}/attention/{part}',
      f'{block}.self_attn.{part[0]}_proj',
      count,
      to_heads(heads),
      split_bias(heads),
    )
  return (
    found
    | stacked(f'{ours}/attention/out', f'{block}.self_attn.out_proj', count, from_heads(heads))
    | stacked(f'{ours}/attention_norm', f'{block}.layer_norm1', count, last='scale')
    | stacked(f'{ours}/mlp_norm', f'{block}.layer_norm2', count, last='scale')
    | stacked(f'{ours}/mlp/project_in', f'{block}.mlp.fc1', count)
    | stacked(f'{ours}/mlp/project_out', f'{block}.mlp.fc2', count)
  )


def section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
  """Returns the section of a tower in a config.json of transformers.

  An old-style section, such as `text_config_dict`, takes precedence, as in transformers.

  Raises:
    UserError: if it isn't a JSON object.
  """
  found = config.get(f'{name}_dict')
  found = config.get(name) if found is None else found
  found = {} if found is None else found
  if not isinstance(found, Mapping):
    raise UserError(f'{name} in its config is {checks.shown_as_json(found)} instead of an object')
  return found


def whole(part: Mapping[str, Any], name: str, default: int) -> int:
  """Returns a size in a config, or its default if the config lacks it."""
  value = part.get(name)
  value = default if value is None else value
  return checks.whole_number(name, value, 1, config_checks.MAX_SIZE, show=checks.shown_as_json)


def check_sizes(part: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
  """Checks that a config is of the weights, as the heads and the activation are taken from it.

  Args:
    part: a part of the config.
    sizes: {name in the config: what the arrays say}; the config may lack names.

  Raises:
    UserError: if they differ.
  """
  for name, size in sizes.items():
    if part.get(name) is not None and part[name] != size:
      raise UserError(
        f'{name}={checks.shown_as_json(part[name])} in its config, but the arrays have {size}; '
        'give the config of these weights'
      )


def check_epsilon(part: Mapping[str, Any], expected: float) -> None:
  """Raises UserError unless the epsilon of layer norms is the expected one."""
  value = part.get('layer_norm_eps')
  if value is not None and value != expected:
    raise UserError(
      f'layer_norm_eps={checks.shown_as_json(value)} is not supported; it is {expected} in the '
      'published models'
    )


def image_size(said: int | None, patch_size: int, side: int) -> int:
  """Returns the height and width of pictures, which must give a grid of `side` × `side` patches.

  Args:
    said: size in the config; None for the smallest possible one.
    patch_size: height and width of a patch.
    side: number of patches in a row, and in a column.

  Raises:
    UserError: if they give another grid.
  """
  found = said or side * patch_size
  if found // patch_size != side:
    raise UserError(
      f'image_size={found} gives {found // patch_size}² patches of {patch_size} pixels, but the '
      f'weights have positions of {side}²'
    )
  return found


class Processor(NamedTuple):
  """The preparation of pictures.

  Attributes:
    how: resizing and cropping.
    mean: mean of red, green and blue in [0, 1], which is subtracted from pixels.
    std: standard deviation, by which the difference is divided.
  """

  how: preprocessing.Preprocessing
  mean: _Channels
  std: _Channels


def read_processor(config: Mapping[str, Any], size: int, default: Processor) -> Processor:
  """Reads a preprocessor_config.json of transformers, or open_clip's `preprocess_cfg`.

  Args:
    config: contents of the file.
    size: height and width of the network's pictures.
    default: the library's defaults.

  Raises:
    UserError: if the file asks for something that is not supported, or for another size.
  """
  config = config.get('image_processor', config)
  if not isinstance(config, Mapping):
    raise UserError('image_processor in its config is not an object')
  open_clip = bool({'mean', 'std', 'interpolation', 'resize_mode'} & set(config))
  for name in ('size', 'crop_size'):
    if (given := config.get(name)) is not None and _sides(given) != {size}:
      raise UserError(
        f'{name}={checks.shown_as_json(given)} in its preprocessing, but the network takes '
        f'pictures of {size} × {size} pixels'
      )
  return Processor(
    _open_clip_way(config) if open_clip else _transformers_way(config, default.how),
    _channels(config, 'mean' if open_clip else 'image_mean', default.mean),
    _channels(config, 'std' if open_clip else 'image_std', default.std),
  )


def _sides(size: Any) -> set[int] | None:
  """Returns the different sides of a size in a config: a number, two numbers, or an object."""
  sides = list(size.values()) if isinstance(size, Mapping) else size
  sides = sides if isinstance(sides, list) else [sides]
  return set(sides) if all(type(side) is int for side in sides) else None


def _transformers_way(config, default: preprocessing.Preprocessing) -> preprocessing.Preprocessing:
  for name in ('do_resize', 'do_rescale', 'do_normalize'):
    _require(config, name, True)
  _require(config, 'do_pad', False)
  factor = config.get('rescale_factor')
  if factor is not None and (not isinstance(factor, float) or abs(factor * 255 - 1) > 1e-6):
    raise UserError(f'rescale_factor={checks.shown_as_json(factor)} is not 1 / 255')
  code = config.get('resample')
  if code is not None and code not in tuple(_RESAMPLING):
    raise UserError(f'resample={checks.shown_as_json(code)} is not one of {_RESAMPLING}')
  fit = default.fit
  if config.get('do_center_crop') is not None:
    fit = 'crop' if config['do_center_crop'] else 'stretch'
  size = config.get('size')
  square = isinstance(size, Mapping) and size.keys() == {'height', 'width'}
  if size is not None and square != (fit == 'stretch'):
    raise UserError(
      f'size={checks.shown_as_json(size)} with do_center_crop={fit == "crop"} is not supported'
    )
  return preprocessing.Preprocessing(fit, default.resampling if code is None else _RESAMPLING[code])


def _open_clip_way(config) -> preprocessing.Preprocessing:
  _require(config, 'mode', 'RGB')
  _require(config, 'fill_color', 0)
  fits = {'shortest': 'crop', 'squash': 'stretch'}
  mode, resampling = config.get('resize_mode', 'shortest'), config.get('interpolation', 'bicubic')
  if mode not in tuple(fits):
    raise UserError(f'resize_mode={checks.shown_as_json(mode)} is not one of {", ".join(fits)}')
  resampling = 'bicubic' if resampling == 'random' else resampling
  return preprocessing.Preprocessing(fits[mode], resampling, 'even')


def _require(config, name: str, expected) -> None:
  value = config.get(name)
  if value is not None and value != expected:
    raise UserError(f'{name}={checks.shown_as_json(value)} in its preprocessing is not supported')


def _channels(config, name: str, default: _Channels) -> _Channels:
  value = config.get(name)
  if value is None:
    return default
  return checks.typed(name, value, tuple[float, float, float], 0, 1, show=checks.shown_as_json)

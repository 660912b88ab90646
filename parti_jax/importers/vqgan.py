"""Reads published weights of convolutional image tokenizers into `parti_jax.models.vqgan`.

| format | weights |
|---|---|
| taming | VQGAN of taming-transformers, such as f16 with 1,024 or 16,384 codes; torch |
| dalle-mini | the same network with the names of vqgan-jax, for pixels in [0, 1]; Flax |
| llamagen | VQ-16 and VQ-8 of LlamaGen; torch |
| ibq | tokenizers of IBQ, with averaged weights where the file has them; torch |
| maskgit | MaskGIT-VQGAN; Flax |

Files of taming and IBQ have the same names, but their networks find codes differently, so the
format can't be inferred from a file; the user gives it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

from parti_jax.core.errors import UserError
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import parameter_files
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import vqgan

Arrays = Mapping[str, key_map_lib.StoredArray]
Shapes = Mapping[str, tuple[int, ...]]

# Files of a training run hold the network several times; averaged weights are preferred.
_PREFERRED = ('ema.', 'model.', 'state_dict.')
_LOSS = r'loss\..*'

# Replacements, in this order, that turn paths of our parameters into taming's names.
_TAMING_NAMES = (
  (r'^encoder/project_codes', 'quant_conv'),
  (r'^decoder/project_codes', 'post_quant_conv'),
  (r'^quantizer/codebook/table', 'quantize/embedding/weight'),
  (r'^encoder/downsample_(\d+)', r'encoder/down/\1/downsample/conv'),
  (r'^decoder/upsample_(\d+)', r'decoder/up/\1/upsample/conv'),
  (r'/level_(\d+)/block_(\d+)', r'/level_\1/block/\2'),
  (r'/level_(\d+)/attention_(\d+)', r'/level_\1/attn/\2'),
  (r'^encoder/level_', 'encoder/down/'),
  (r'^decoder/level_', 'decoder/up/'),
  (r'/middle/block_0', '/mid/block_1'),
  (r'/middle/attention_0', '/mid/attn_1'),
  (r'/middle/block_1', '/mid/block_2'),
  (r'/(norm|conv)_(\d)/', r'/\1\2/'),
  (r'/shortcut/', '/nin_shortcut/'),
  (r'/query/', '/q/'),
  (r'/key/', '/k/'),
  (r'/value/', '/v/'),
  (r'/out/', '/proj_out/'),
  (r'/(kernel|scale)$', '/weight'),
  (r'/', '.'),
)


def _taming(path: str, config: vqgan.VQGANConfig) -> str:
  del config
  name = path
  for pattern, replacement in _TAMING_NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def _llamagen(path: str, config: vqgan.VQGANConfig) -> str:
  last = len(config.multipliers) - 1
  name = _taming(path, config).replace('encoder.down.', 'encoder.conv_blocks.')
  # The decoder's levels are counted in the order of their use.
  name = re.sub(
    r'^decoder\.up\.(\d+)', lambda found: f'decoder.conv_blocks.{last - int(found[1])}', name
  )
  name = re.sub(r'(conv_blocks\.\d+)\.block\.', r'\1.res.', name)
  for place, module in enumerate(('block_1', 'attn_1', 'block_2')):
    name = name.replace(f'.mid.{module}.', f'.mid.{place}.')
  return name


def _vqgan_jax(path: str, config: vqgan.VQGANConfig) -> str:
  name = re.sub(r'\.(\d+)', r'_\1', _taming(path, config)).replace('.', '/')
  if path == 'quantizer/codebook/table':
    return name.replace('/weight', '/embedding')
  return name.replace('/weight', f'/{path.rpartition("/")[2]}')


def _averaged(path: str, config: vqgan.VQGANConfig) -> str:
  return f'model_ema.{_taming(path, config).replace(".", "")}'


def _maskgit(path: str, config: vqgan.VQGANConfig) -> str:
  """Flax's automatic names: modules of one class are counted in the order of their use."""
  if path == 'quantizer/codebook/table':
    return 'quantizer/codebook'
  side, module, *rest = path.split('/')
  last = len(config.multipliers) - 1
  if module == 'norm_out':
    return f'{side}/GroupNorm_0/{rest[0]}'
  if module.startswith(('conv', 'upsample')):
    convolutions = ['conv_in']
    if side == 'decoder':
      convolutions += [f'upsample_{level}' for level in range(last, 0, -1)]
    convolutions.append('conv_out')
    return f'{side}/Conv_{convolutions.index(module)}/{rest[0]}'
  levels = [f'level_{level}' for level in range(last + 1)]
  order = [*levels, 'middle'] if side == 'encoder' else ['middle', *reversed(levels)]
  block = order.index(module) * config.res_blocks + int(rest[0].removeprefix('block_'))
  layers = {
    'norm_1': 'GroupNorm_0',
    'conv_1': 'Conv_0',
    'norm_2': 'GroupNorm_1',
    'conv_2': 'Conv_1',
    'shortcut': 'Conv_2',
  }
  return f'{side}/ResBlock_{block}/{layers[rest[1]]}/{rest[2]}'


class _Format(NamedTuple):
  """The array names of one format.

  Attributes:
    name: maps the path of our parameter to the array's name.
    anchor: a name that occurs in all files of the format, and in no others.
    options: fields of the config that array shapes don't show.
    ignored: regular expressions of arrays that the network does not need.
    flax: whether kernels have Flax's layout.
  """

  name: Callable[[str, vqgan.VQGANConfig], str]
  anchor: str
  options: Mapping[str, Any]
  ignored: tuple[str, ...] = ()
  flax: bool = False


_FIRST = 'encoder.down.0.block.0.conv1.weight'
_PLAIN_COPIES = r'(encoder|decoder|quantize|quant_conv|post_quant_conv)\..*'
# If a format has several entries, the first one that fits the file is used.
_FORMATS: Mapping[str, tuple[_Format, ...]] = {
  'taming': (_Format(_taming, _FIRST, {'quantizer': 'euclidean'}, (_LOSS,)),),
  'dalle-mini': (
    _Format(
      _vqgan_jax,
      'encoder/down_0/block_0/conv1/kernel',
      {'quantizer': 'euclidean', 'pixel_range': (0.0, 1.0)},
      flax=True,
    ),
  ),
  'llamagen': (
    _Format(
      _llamagen,
      'encoder.conv_blocks.0.res.0.conv1.weight',
      {'quantizer': 'cosine'},
      (r'quantize\.codebook_used', _LOSS),
    ),
  ),
  'ibq': (
    _Format(
      _averaged,
      'model_ema.encoderdown0block0conv1weight',
      {'quantizer': 'dot'},
      (_LOSS, _PLAIN_COPIES, r'model_ema\.(decay|num_updates|loss.*)'),
    ),
    _Format(_taming, _FIRST, {'quantizer': 'dot'}, (_LOSS,)),
  ),
  'maskgit': (
    _Format(
      _maskgit,
      'encoder/ResBlock_0/Conv_0/kernel',
      {
        'quantizer': 'euclidean',
        'pixel_range': (0.0, 1.0),
        'z_channels': None,
        'attention': False,
        'middle_attention': False,
        'downsampling': 'average',
        'bias': False,
        'shortcut': 'output',
      },
      flax=True,
    ),
  ),
}
FORMATS = tuple(_FORMATS)


def config_of(
  arrays: Arrays,
  file_format: str,
  image_size: int = 256,
  pixel_range: tuple[float, float] | None = None,
) -> vqgan.VQGANConfig:
  """Infers the sizes of a network from its arrays.

  Args:
    arrays: {name: array} of a file.
    file_format: one of FORMATS.
    image_size: height and width of the images that the network was trained with.
    pixel_range: values of black and white inside the network; None for those of the format.

  Raises:
    UserError: if the file has another format, or lacks arrays that determine the sizes.
  """
  prefix, found = _located(arrays, file_format)
  shapes = {name: tuple(array.shape) for name, array in _within(arrays, prefix).items()}
  try:
    sizes = _maskgit_sizes(shapes) if file_format == 'maskgit' else _taming_sizes(shapes, found)
  except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
    raise UserError(
      f'the weights of the format {file_format} lack an array, or it has another shape: {error}'
    ) from error
  options = dict(found.options) | ({} if pixel_range is None else {'pixel_range': pixel_range})
  return vqgan.VQGANConfig(
    image_size=image_size, output='pixels', dtype='float32', **sizes, **options
  )


def key_map(config: vqgan.VQGANConfig, arrays: Arrays, file_format: str) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of `vqgan.VQGAN(config)`.

  Args:
    config: the result of `config_of`.
    arrays: {name: array} of the file.
    file_format: one of FORMATS.

  Raises:
    UserError: if the file has another format.
  """
  prefix, found = _located(arrays, file_format)

  def source(path: str) -> key_map_lib.Source:
    name = prefix + found.name(path, config)
    if path.endswith('/kernel') and not found.flax:
      return key_map_lib.one(name, key_map_lib.convolution)
    return key_map_lib.one(name)

  return {path: source(path) for path in expected(config)}


def ignored(arrays: Arrays, file_format: str) -> tuple[str, ...]:
  """Returns regular expressions of names in a file that the network does not need.

  Raises:
    UserError: if the file has another format.
  """
  prefix, found = _located(arrays, file_format)
  start = re.escape(prefix)
  # Arrays outside of the network, such as the state of an optimizer.
  outside = (f'(?!{start}).*',) if prefix else ()
  return (*outside, *(f'{start}{pattern}' for pattern in found.ignored))


def expected(config: vqgan.VQGANConfig) -> Shapes:
  """Returns {path: shape} of the parameters of `vqgan.VQGAN(config)`."""
  return parameter_files.shapes(model_folder.abstract('tokenizer', config))


def _located(arrays: Arrays, file_format: str) -> tuple[str, _Format]:
  """Returns the prefix of the network's names in a file, and the names after it."""
  if file_format not in _FORMATS:
    raise UserError(f'format={file_format!r} is not one of {", ".join(FORMATS)}')
  for found in _FORMATS[file_format]:
    prefixes = key_map_lib.prefixes(arrays, found.anchor)
    preferred = [prefix for prefix in _PREFERRED if prefix in prefixes]
    if preferred or len(prefixes) == 1:
      return (preferred or prefixes)[0], found
    if prefixes:
      raise UserError(
        f'the weights of the format {file_format} are there {len(prefixes)} times, under '
        f'{", ".join(map(repr, sorted(prefixes)))}; save the one to read alone'
      )
  others = [
    name
    for name, formats in _FORMATS.items()
    if any(key_map_lib.prefixes(arrays, found.anchor) for found in formats)
  ]
  hint = f'; they may be of {" or ".join(others)}' if others else ''
  raise UserError(
    f'the weights are not of the format {file_format}: there is no '
    f'{_FORMATS[file_format][-1].anchor}{hint}'
  )


def _within(arrays: Arrays, prefix: str) -> Arrays:
  return {
    name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
  }


def _taming_sizes(shapes: Shapes, found: _Format) -> dict[str, Any]:
  """Returns the sizes of a network with taming's modules."""

  def name(path: str, levels: int = 1) -> str:
    return found.name(path, vqgan.VQGANConfig(multipliers=(1,) * levels))

  def features(path: str) -> int:
    return shapes[name(path)][-1 if found.flax else 0]

  count = lambda template, levels=1: key_map_lib.count(
    lambda place: name(template.format(place), levels) in shapes
  )
  levels = count('encoder/level_{}/block_0/conv_1/kernel')
  last = f'encoder/level_{levels - 1}'
  channels = features('encoder/conv_in/kernel')
  return {
    'channels': channels,
    'multipliers': tuple(
      features(f'encoder/level_{level}/block_0/conv_1/kernel') // channels
      for level in range(levels)
    ),
    'res_blocks': count('encoder/level_0/block_{}/conv_1/kernel'),
    'decoder_res_blocks': count('decoder/level_0/block_{}/conv_1/kernel', levels),
    'attention': name(f'{last}/attention_0/query/kernel') in shapes,
    'middle_attention': name('encoder/middle/attention_0/query/kernel') in shapes,
    'z_channels': features('encoder/conv_out/kernel'),
    'code_dim': features('encoder/project_codes/kernel'),
    'codebook_size': shapes[name('quantizer/codebook/table')][0],
  }


def _maskgit_sizes(shapes: Shapes) -> dict[str, Any]:
  """Returns the sizes of MaskGIT-VQGAN."""
  channels = shapes['encoder/Conv_0/kernel'][-1]
  # The decoder has a convolution at its start, one at its end and one between two levels.
  levels = key_map_lib.count(lambda place: f'decoder/Conv_{place}/kernel' in shapes) - 1
  blocks = key_map_lib.count(lambda place: f'encoder/ResBlock_{place}/Conv_0/kernel' in shapes)
  blocks //= levels + 1
  codebook_size, code_dim = shapes['quantizer/codebook']
  return {
    'channels': channels,
    'multipliers': tuple(
      shapes[f'encoder/ResBlock_{level * blocks}/Conv_0/kernel'][-1] // channels
      for level in range(levels)
    ),
    'res_blocks': blocks,
    'decoder_res_blocks': blocks,
    'middle_blocks': blocks,
    'code_dim': code_dim,
    'codebook_size': codebook_size,
  }

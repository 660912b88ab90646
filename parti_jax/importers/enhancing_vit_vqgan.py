"""Reads the weights of enhancing-transformers' ViT-VQGAN into `parti_jax.models.enhancing_vit_vqgan`."""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Mapping

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import enhancing_vit_vqgan

Arrays = Mapping[str, key_map_lib.StoredArray]

FORMAT = 'enhancing-transformers'
_ANCHOR = 'encoder.to_patch_embedding.0.weight'
# All published networks have this dimension of attention heads.
_HEAD_DIM = 64


def config_of(arrays: Arrays) -> enhancing_vit_vqgan.EnhancingViTVQGANConfig:
  """Infers the sizes of a network from its arrays.

  Args:
    arrays: {name: array} of a file.

  Raises:
    UserError: if the file is of another network, or lacks arrays that determine the sizes.
  """
  prefix = _prefix(arrays)

  def shape(name: str, axes: int) -> tuple[int, ...]:
    found = arrays.get(prefix + name)
    if found is None or len(found.shape) != axes:
      problem = 'is missing' if found is None else f'has the shape {list(found.shape)}'
      raise UserError(
        f'{prefix}{name} {problem}; these are not the weights of a {FORMAT} ViT-VQGAN'
      )
    return tuple(found.shape)

  width, _, patch_size, _ = shape('encoder.to_patch_embedding.0.weight', 4)
  tokens = shape('encoder.en_pos_embedding', 3)[1]
  side = round(tokens**0.5)
  joined = shape('encoder.transformer.layers.0.0.fn.to_qkv.weight', 2)[0] // 3
  if side**2 != tokens or joined != width or width % _HEAD_DIM:
    raise UserError(
      f'a network of {tokens} tokens, width {width} and {joined} features in all attention heads '
      f'is not read: images must be squares, and heads of {_HEAD_DIM} features must divide the width'
    )
  pattern = re.compile(
    re.escape(prefix) + r'encoder\.transformer\.layers\.(\d{1,4})\.0\.norm\.weight'
  )
  codebook_size, code_dim = shape('quantizer.embedding.weight', 2)
  return enhancing_vit_vqgan.EnhancingViTVQGANConfig(
    image_size=side * patch_size,
    patch_size=patch_size,
    layers=1 + max(int(found[1]) for found in map(pattern.fullmatch, arrays) if found),
    width=width,
    mlp_width=shape('encoder.transformer.layers.0.1.fn.net.0.weight', 2)[0],
    heads=width // _HEAD_DIM,
    codebook_size=codebook_size,
    code_dim=code_dim,
    dtype='float32',
  )


def key_map(
  config: enhancing_vit_vqgan.EnhancingViTVQGANConfig, arrays: Arrays
) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of the network.

  Args:
    config: the result of `config_of`.
    arrays: {name: array} of the file.

  Raises:
    UserError: if the file is of another network.
  """
  prefix = _prefix(arrays)
  patch = config.patch_size
  one = lambda name, change=key_map_lib.unchanged: key_map_lib.one(prefix + name, change)
  found = {
    'quantizer/codebook/table': one('quantizer.embedding.weight'),
    'encoder/project_patches/kernel': one(
      'encoder.to_patch_embedding.0.weight',
      lambda array: array.transpose(2, 3, 1, 0).reshape(-1, config.width),
    ),
    'encoder/project_patches/bias': one('encoder.to_patch_embedding.0.bias'),
    'decoder/project_patches/kernel': one(
      f'decoder.to_pixel.{_output(arrays, prefix)}.weight',
      lambda array: array.transpose(0, 2, 3, 1).reshape(config.width, -1),
    ),
    # One bias for each color, the same for all pixels of a patch.
    'decoder/project_patches/bias': one(
      f'decoder.to_pixel.{_output(arrays, prefix)}.bias',
      lambda array: np.broadcast_to(array, (patch**2, 3)).reshape(-1),
    ),
  }
  for ours, theirs in (('encoder', 'pre_quant'), ('decoder', 'post_quant')):
    found[f'{ours}/project_codes/kernel'] = one(f'{theirs}.weight', key_map_lib.linear)
    found[f'{ours}/project_codes/bias'] = one(f'{theirs}.bias')
  for side, positions in (('encoder', 'en_pos_embedding'), ('decoder', 'de_pos_embedding')):
    found |= _stack(config, arrays, prefix, side, positions)
  return found


def ignored(arrays: Arrays) -> tuple[str, ...]:
  """Returns regular expressions of names in a file that the network does not need."""
  start = re.escape(_prefix(arrays))
  return (*((f'(?!{start}).*',) if start else ()), rf'{start}loss\..*')


def _stack(
  config: enhancing_vit_vqgan.EnhancingViTVQGANConfig,
  arrays: Arrays,
  prefix: str,
  side: str,
  positions: str,
) -> dict[str, key_map_lib.Source]:
  """Returns the sources of the Transformer of one side, and of what surrounds it."""
  start = f'{prefix}{side}.'
  # Earlier versions of the code had the final norm within the Transformer.
  norm = 'norm' if f'{start}norm.weight' in arrays else 'transformer.norm'
  found = {
    f'{side}/stack/position_embedding/table': key_map_lib.one(
      start + positions, lambda array: array[0]
    ),
    f'{side}/stack/norm/scale': key_map_lib.one(f'{start}{norm}.weight'),
    f'{side}/stack/norm/bias': key_map_lib.one(f'{start}{norm}.bias'),
  }
  features = config.heads, config.width // config.heads

  def third(place: int) -> Callable[[np.ndarray], np.ndarray]:
    part = slice(place * config.width, (place + 1) * config.width)
    return lambda array: array[part].T.reshape(config.width, *features)

  names: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    'attention_norm/scale': ('0.norm.weight', key_map_lib.unchanged),
    'attention_norm/bias': ('0.norm.bias', key_map_lib.unchanged),
    'attention/query/kernel': ('0.fn.to_qkv.weight', third(0)),
    'attention/key/kernel': ('0.fn.to_qkv.weight', third(1)),
    'attention/value/kernel': ('0.fn.to_qkv.weight', third(2)),
    'attention/out/kernel': (
      '0.fn.to_out.weight',
      lambda array: array.T.reshape(*features, config.width),
    ),
    'attention/out/bias': ('0.fn.to_out.bias', key_map_lib.unchanged),
    'mlp_norm/scale': ('1.norm.weight', key_map_lib.unchanged),
    'mlp_norm/bias': ('1.norm.bias', key_map_lib.unchanged),
    'mlp/project_in/kernel': ('1.fn.net.0.weight', key_map_lib.linear),
    'mlp/project_in/bias': ('1.fn.net.0.bias', key_map_lib.unchanged),
    'mlp/project_out/kernel': ('1.fn.net.2.weight', key_map_lib.linear),
    'mlp/project_out/bias': ('1.fn.net.2.bias', key_map_lib.unchanged),
  }
  return found | {
    f'{side}/stack/transformer/layers/{path}': key_map_lib.layers(
      f'{start}transformer.layers.{{}}.{name}', config.layers, change
    )
    for path, (name, change) in names.items()
  }


def _output(arrays: Arrays, prefix: str) -> str:
  """Returns the name of the last layer, which earlier versions of the code did not name."""
  return 'conv_out' if f'{prefix}decoder.to_pixel.conv_out.weight' in arrays else '1'


def _prefix(arrays: Arrays) -> str:
  """Returns the prefix of the network's names in a file.

  Raises:
    UserError: if the file is of another network, or has several.
  """
  prefixes = key_map_lib.prefixes(arrays, _ANCHOR)
  if len(prefixes) != 1:
    raise UserError(
      f'the weights are not of the format {FORMAT}: there is no {_ANCHOR}'
      if not prefixes
      else f'the weights are there {len(prefixes)} times, under '
      f'{", ".join(map(repr, sorted(prefixes)))}; save the one to read alone'
    )
  return prefixes[0]

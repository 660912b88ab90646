"""Reads the weights of enhancing-transformers' ViT-VQGAN into `parti_jax.models.enhancing_vit_vqgan`."""

from __future__ import annotations

import re

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.importers import clip_names
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import enhancing_vit_vqgan

FORMAT = 'enhancing-transformers'
_ANCHOR = 'encoder.to_patch_embedding.0.weight'
# Beginning of the names of one layer's arrays, {} for the layer.
_LAYER = 'transformer.layers.{}.'
# All published networks have this dimension of attention heads.
_HEAD_DIM = 64


def config_of(arrays: clip_names.Arrays) -> enhancing_vit_vqgan.EnhancingViTVQGANConfig:
  """Infers the sizes of a network from its arrays.

  Args:
    arrays: {name: array} of a file.

  Raises:
    UserError: if the file is of another network, or lacks arrays that determine the sizes.
  """
  prefix = _prefix(arrays)
  shape = lambda name, axes: clip_names.shape(arrays, prefix + name, axes)
  width, _, patch_size, _ = shape(_ANCHOR, 4)
  tokens = shape('encoder.en_pos_embedding', 3)[1]
  side = round(tokens**0.5)
  joined = shape('encoder.transformer.layers.0.0.fn.to_qkv.weight', 2)[0] // 3
  if side**2 != tokens or joined != width or width % _HEAD_DIM:
    raise UserError(
      f'a network of {tokens} tokens, width {width} and {joined} features in all attention heads '
      f'is not read: images must be squares, and heads of {_HEAD_DIM} features must divide the width'
    )
  codebook_size, code_dim = shape('quantizer.embedding.weight', 2)
  return enhancing_vit_vqgan.EnhancingViTVQGANConfig(
    image_size=side * patch_size,
    patch_size=patch_size,
    layers=clip_names.count_layers(arrays, prefix + 'encoder.' + _LAYER + '0.norm.weight'),
    width=width,
    mlp_width=shape('encoder.transformer.layers.0.1.fn.net.0.weight', 2)[0],
    heads=width // _HEAD_DIM,
    codebook_size=codebook_size,
    code_dim=code_dim,
    dtype='float32',
  )


def key_map(
  config: enhancing_vit_vqgan.EnhancingViTVQGANConfig, arrays: clip_names.Arrays
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
    'encoder/project_patches/kernel': one(_ANCHOR, clip_names.patches),
    'encoder/project_patches/bias': one('encoder.to_patch_embedding.0.bias'),
    'decoder/project_patches/kernel': one(
      f'decoder.to_pixel.{_output(arrays, prefix)}.weight',
      lambda array: array.transpose(0, 2, 3, 1).reshape(config.width, -1),
    ),
    # One bias for each color, the same for all pixels of a patch.
    'decoder/project_patches/bias': one(
      f'decoder.to_pixel.{_output(arrays, prefix)}.bias',
      lambda array: np.broadcast_to(array.reshape(3), (patch**2, 3)).reshape(-1),
    ),
  }
  for ours, theirs in (('encoder', 'pre_quant'), ('decoder', 'post_quant')):
    found[f'{ours}/project_codes/kernel'] = one(f'{theirs}.weight', key_map_lib.linear)
    found[f'{ours}/project_codes/bias'] = one(f'{theirs}.bias')
  for side, positions in (('encoder', 'en_pos_embedding'), ('decoder', 'de_pos_embedding')):
    found |= _stack(config, arrays, prefix, side, positions)
  return found


def ignored(arrays: clip_names.Arrays) -> tuple[str, ...]:
  """Returns regular expressions of names in a file that the network does not need."""
  start = re.escape(_prefix(arrays))
  return (*((f'(?!{start}).*',) if start else ()), rf'{start}loss\..*')


def _stack(
  config: enhancing_vit_vqgan.EnhancingViTVQGANConfig,
  arrays: clip_names.Arrays,
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
      start + positions, lambda array: array.reshape(array.shape[1:])
    ),
    **clip_names.norm(f'{side}/stack/norm', f'{start}{norm}'),
  }
  norms = clip_names.norm('attention_norm', '0.norm') | clip_names.norm('mlp_norm', '1.norm')
  changes = {path: (source.names[0], source.change) for path, source in norms.items()}
  to_heads = clip_names.to_heads(config.heads)
  for part, path in enumerate(('query', 'key', 'value')):
    changes[f'attention/{path}/kernel'] = '0.fn.to_qkv.weight', clip_names.fused(part, to_heads)
  changes['attention/out/kernel'] = '0.fn.to_out.weight', clip_names.from_heads(config.heads)
  changes['attention/out/bias'] = '0.fn.to_out.bias', key_map_lib.unchanged
  for path, place in (('project_in', 0), ('project_out', 2)):
    changes[f'mlp/{path}/kernel'] = f'1.fn.net.{place}.weight', key_map_lib.linear
    changes[f'mlp/{path}/bias'] = f'1.fn.net.{place}.bias', key_map_lib.unchanged
  return found | {
    f'{side}/stack/transformer/layers/{path}': key_map_lib.layers(
      f'{start}{_LAYER}{name}', config.layers, change
    )
    for path, (name, change) in changes.items()
  }


def _output(arrays: clip_names.Arrays, prefix: str) -> str:
  """Returns the name of the last layer, which earlier versions of the code did not name."""
  return 'conv_out' if f'{prefix}decoder.to_pixel.conv_out.weight' in arrays else '1'


def _prefix(arrays: clip_names.Arrays) -> str:
  """Returns the prefix of the network's names in a file.

  Raises:
    UserError: if the file is of another network, or has several.
  """
  found = clip_names.prefix(arrays, _ANCHOR)
  if found is None:
    raise UserError(f'the weights are not of the format {FORMAT}: there is no {_ANCHOR}')
  return found

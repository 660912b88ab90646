"""Reads DALL·E mini and DALL·E mega by the names of dalle-mini's Flax files.

The files have more rows of image tokens than the image tokenizer has codes: the row of the first
input, and in mega some that nothing uses. Our network has the first input as a parameter of its own,
and neither rows nor logits for the others, which could only be sampled by mistake.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import dalle_mini

Arrays = Mapping[str, key_map_lib.StoredArray]

_TEXT_TABLE = 'model/encoder/embed_tokens/embedding'
_TEXT_POSITIONS = 'model/encoder/embed_positions/embedding'
_IMAGE_TABLE = 'model/decoder/embed_tokens/embedding'
_IMAGE_POSITIONS = 'model/decoder/embed_positions/embedding'
_ENCODER_LAYERS = 'model/encoder/layers/FlaxBartEncoderLayers'
_DECODER_LAYERS = 'model/decoder/layers/FlaxBartDecoderLayers'
# The published models have 64 features in a head; array shapes don't show it.
_HEAD_DIM = 64
# Rows of image tokens beyond the codes; mini has one, mega 32.
_MOST_OTHER_ROWS = 128
# What a config.json may say about the blocks, besides sizes.
_FIXED = {
  'model_type': 'dallebart',
  'activation_function': 'gelu',
  'force_ln_scale': False,
  'ln_positions': 'normformer',
  'ln_type': 'layernorm',
  'scale_embedding': False,
  'sinkhorn_iters': 1,
  'tie_word_embeddings': False,
  'use_absolute_position_embeddings': True,
  'use_alibi': False,
  'use_bias': False,
  'use_cosine_attention': False,
  'use_deepnet_scaling': False,
  'use_final_ln_decoder': True,
  'use_final_ln_encoder': True,
  'use_glu': True,
  'use_head_scale': False,
  'use_swin_position_embeddings': False,
}
# Names in a config.json -> what they say about our sizes.
_SIZES = {
  'd_model': 'width',
  'encoder_layers': 'encoder_layers',
  'decoder_layers': 'decoder_layers',
  'encoder_ffn_dim': 'mlp_width',
  'decoder_ffn_dim': 'mlp_width',
  'encoder_vocab_size': 'text_vocabulary',
  'max_text_length': 'text_length',
}


def config_of(
  arrays: Arrays,
  settings: Mapping[str, Any] | None,
  codebook_size: int,
  grid: tuple[int, int],
) -> dalle_mini.DalleMiniConfig:
  """Returns the config of the network in a file.

  Args:
    arrays: {name: array in the file}.
    settings: contents of the model's config.json; None if there is none, which leaves it at 64
      features in a head.
    codebook_size: number of codes of its image tokenizer.
    grid: rows and columns of an image's tokens.

  Raises:
    UserError: if the file doesn't hold such a network, the settings are of another model or of blocks
      that are not supported, or the image tokenizer doesn't fit.
  """
  shape = functools.partial(_shape, arrays, _prefix(arrays))
  sizes: dict[str, Any] = {}
  sizes['text_vocabulary'], sizes['width'] = shape(_TEXT_TABLE, 2)
  sizes['text_length'] = shape(_TEXT_POSITIONS, 2)[0]
  sizes['encoder_layers'], _, sizes['mlp_width'] = shape(
    f'{_ENCODER_LAYERS}/GLU_0/Dense_0/kernel', 3
  )
  sizes['decoder_layers'] = shape(f'{_DECODER_LAYERS}/GLU_0/Dense_0/kernel', 3)[0]
  rows, positions = shape(_IMAGE_TABLE, 2)[0], shape(_IMAGE_POSITIONS, 2)[0]
  heads = max(sizes['width'] // _HEAD_DIM, 1)
  if settings is not None:
    heads = _checked(settings, sizes, rows, positions)
  if not 0 < rows - codebook_size <= _MOST_OTHER_ROWS or positions != grid[0] * grid[1]:
    raise UserError(
      f'the image tokenizer has {codebook_size:,} codes and {grid[0]}×{grid[1]} tokens for an image, '
      f'but the weights have rows for {rows - 1:,} codes and the first input, and {positions} '
      'positions; give the image tokenizer that belongs to them, with its --image_size if it is given '
      'as weights'
    )
  return dalle_mini.DalleMiniConfig(
    **sizes, heads=heads, codebook_size=codebook_size, grid=grid, dtype='float32'
  )


def first_input(
  arrays: Arrays, settings: Mapping[str, Any] | None, config: dalle_mini.DalleMiniConfig
) -> int:
  """Returns the row of the image tokens' table that is the first input.

  Args:
    arrays: {name: array in the file}.
    settings: contents of the model's config.json; None if there is none. Both published ones name
      16,384, the row after the codes, which is also the default.
    config: the result of `config_of`.

  Raises:
    UserError: if the settings name no row.
  """
  rows = _shape(arrays, _prefix(arrays), _IMAGE_TABLE, 2)[0]
  settings = {} if settings is None else settings
  found = settings.get('decoder_start_token_id', config.codebook_size)
  return checks.whole_number(
    'config.json: decoder_start_token_id', found, 0, rows - 1, show=checks.shown_as_json
  )


def key_map(config: dalle_mini.DalleMiniConfig, arrays: Arrays, start: int) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of a `DalleMini`.

  Args:
    config: the result of `config_of`.
    arrays: {name: array in the file}.
    start: the result of `first_input`.
  """
  prefix = _prefix(arrays)
  one = lambda name, change=key_map_lib.unchanged: key_map_lib.one(prefix + name, change)
  codes = config.codebook_size
  found = {
    'text_encoder/token_embedding/table': one(_TEXT_TABLE),
    'text_encoder/position_embedding/table': one(_TEXT_POSITIONS),
    'text_encoder/encoder/norm/bias': one('model/encoder/final_ln/bias'),
    'image_decoder/token_embedding/table': one(_IMAGE_TABLE, lambda array: array[:codes]),
    'image_decoder/begin': one(_IMAGE_TABLE, lambda array: array[start]),
    'image_decoder/position_embedding/table': one(_IMAGE_POSITIONS),
    'image_decoder/decoder/norm/bias': one('model/decoder/final_ln/bias'),
    'image_decoder/logits/kernel': one('lm_head/kernel', lambda array: array[:, :codes]),
  }
  for part, name in (('text_encoder', 'encoder'), ('image_decoder', 'decoder')):
    for leaf in ('scale', 'bias'):
      source = one(f'model/{name}/layernorm_embedding/{leaf}')
      found[f'{part}/embedding_norm/{leaf}'] = source
  attentions: dict[str, tuple[str, ...]] = {'attention': ('q', 'k', 'v')}
  found |= _layers(
    config,
    'text_encoder/encoder/layers',
    prefix + _ENCODER_LAYERS,
    attentions,
  )
  attentions |= {'cross': ('k', 'v')}
  found |= _layers(
    config,
    'image_decoder/decoder/layers',
    prefix + _DECODER_LAYERS,
    attentions,
  )
  return found


def _layers(
  config: dalle_mini.DalleMiniConfig,
  ours: str,
  theirs: str,
  attentions: Mapping[str, tuple[str, ...]],
) -> dict[str, key_map_lib.Source]:
  """Returns the sources of a tower's layers, whose arrays have layers as their first axis.

  Args:
    config: sizes of the network.
    ours: path of our layers.
    theirs: path of theirs.
    attentions: our name of each attention, without 'attention', and the projections that share a
      kernel of ours.
  """
  heads = config.heads, config.head_dim
  # The other axes must be there as they are.
  into_heads = lambda array: np.reshape(array, (*array.shape[:-1], *heads))
  from_heads = lambda array: np.reshape(array, (*array.shape[:1], *heads, *array.shape[2:]))
  found = {}
  for place, (name, together) in enumerate(attentions.items()):
    projection = f'{theirs}/FlaxBartAttention_{place}/{{}}_proj/kernel'.format
    module = f'{ours}/{"attention" if name == "attention" else f"{name}_attention"}'
    joined = key_map_lib.together(map(projection, together), 2, into_heads)
    found[f'{module}/project_{"in" if "q" in together else "memory"}/kernel'] = joined
    if 'q' not in together:
      found[f'{module}/project_query/kernel'] = key_map_lib.one(projection('q'), into_heads)
    found[f'{module}/project_out/kernel'] = key_map_lib.one(projection('out'), from_heads)
    before, after = (f'{theirs}/LayerNorm_{2 * place + number}' for number in range(2))
    found[f'{ours}/{name}_norm/bias'] = key_map_lib.one(f'{before}/bias')
    for leaf in ('scale', 'bias'):
      found[f'{ours}/{name}_out_norm/{leaf}'] = key_map_lib.one(f'{after}/{leaf}')
  mlp = {
    'mlp_norm/bias': 'LayerNorm_0/bias',
    'mlp/project_gate/kernel': 'Dense_0/kernel',
    'mlp/project_in/kernel': 'Dense_1/kernel',
    'mlp/norm/bias': 'LayerNorm_1/bias',
    'mlp/project_out/kernel': 'Dense_2/kernel',
  }
  return found | {
    f'{ours}/{path}': key_map_lib.one(f'{theirs}/GLU_0/{name}') for path, name in mlp.items()
  }


def _prefix(arrays: Arrays) -> str:
  """Returns what precedes the network's names in a file."""
  found = key_map_lib.prefixes(arrays, _TEXT_TABLE)
  if len(found) != 1:
    raise UserError(
      f'the weights are not of dalle-mini: {len(found)} of their {len(arrays)} arrays are '
      f'{_TEXT_TABLE}'
    )
  return found[0]


def _shape(arrays: Arrays, prefix: str, name: str, axes: int) -> tuple[int, ...]:
  """Returns the shape of an array with this number of axes."""
  if prefix + name not in arrays:
    raise UserError(f'the weights are not of dalle-mini: they lack the array {prefix}{name}')
  shape = tuple(arrays[prefix + name].shape)
  if len(shape) != axes:
    raise UserError(f'{prefix}{name} is of the shape {list(shape)}, and must have {axes} axes')
  return shape


def _checked(
  settings: Mapping[str, Any], sizes: Mapping[str, int], rows: int, positions: int
) -> int:
  """Returns the number of heads in a config.json; raises UserError unless it fits the arrays."""
  for name, supported in _FIXED.items():
    if (value := settings.get(name, supported)) != supported:
      raise UserError(
        f'config.json: {name} is {checks.shown_as_json(value)}, but only '
        f'{checks.shown_as_json(supported)} is supported, as in the published mini and mega'
      )
  expected = {theirs: sizes[ours] for theirs, ours in _SIZES.items()}
  expected |= {'image_vocab_size': rows - 1, 'image_length': positions}
  for name, size in expected.items():
    if (value := settings.get(name, size)) != size:
      raise UserError(
        f'config.json: {name} is {checks.shown_as_json(value)}, but the arrays have {size}; give the '
        'config.json of this model'
      )
  heads = [settings.get(f'{tower}_attention_heads') for tower in ('encoder', 'decoder')]
  if type(heads[0]) is not int or heads[0] < 1 or heads[0] != heads[1]:
    raise UserError(
      'config.json: encoder_attention_heads and decoder_attention_heads must be one number of '
      f'heads; they are {checks.shown_as_json(heads[0])} and {checks.shown_as_json(heads[1])}'
    )
  return heads[0]

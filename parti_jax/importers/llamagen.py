"""Reads LlamaGen's generators by the names of its torch files, of classes (c2i) or of texts (t2i).

The files of a training run have the network under `model` or `module`, and those of FSDP have it bare.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from parti_jax.core.errors import UserError
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import llamagen
from parti_jax.models import parti_config

Arrays = Mapping[str, key_map_lib.StoredArray]
Shapes = Mapping[str, tuple[int, ...]]

# Where a file has the network, the preferred place first.
_PREFIXES = ('', 'model.', 'module.')
_TOKENS = 'tok_embeddings.weight'
_CLASSES = 'cls_embedding.embedding_table.weight'
_NO_TEXT = 'cls_embedding.uncond_embedding'
_TEXT_IN, _TEXT_OUT = 'cls_embedding.cap_proj.fc1.weight', 'cls_embedding.cap_proj.fc2.weight'
# Array shapes don't show the number of heads; these are of the published widths, B to 7B.
_HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 2048: 32, 2560: 40, 3200: 32, 4096: 32}
# Buffers of masks, of rotations and of caches, which some files have.
_BUFFERS = r'freqs_cis|causal_mask|layers\.\d+\.attention\.kv_cache\..*'


def prefix_of(arrays: Arrays) -> str:
  """Returns what comes before the names of the network in a file.

  Raises:
    UserError: if the file doesn't hold a generator of LlamaGen.
  """
  found = key_map_lib.prefixes(arrays, _TOKENS)
  for prefix in _PREFIXES:
    if prefix in found:
      return prefix
  raise UserError(
    f'the weights are not a generator of LlamaGen: they have no array {_TOKENS}, alone or under '
    'model or module; give c2i_*.pt or t2i_*.pt'
  )


def ignored(arrays: Arrays) -> tuple[str, ...]:
  """Returns regular expressions of names that the network does not need."""
  prefix = prefix_of(arrays)
  others = () if prefix == '' else (f'(?!{re.escape(prefix)}).*',)
  return (f'{re.escape(prefix)}({_BUFFERS})', *others)


def is_of_texts(arrays: Arrays) -> bool:
  """Returns whether the network takes texts rather than classes."""
  return prefix_of(arrays) + _NO_TEXT in arrays


def class_count(arrays: Arrays) -> int:
  """Returns the number of classes of a network that takes classes."""
  return _matrix(arrays, prefix_of(arrays) + _CLASSES)[0] - 1


def config_of(
  arrays: Arrays,
  grid: tuple[int, int],
  text_encoder: parti_config.TextEncoderConfig | None,
  heads: int | None = None,
) -> llamagen.LlamaGenConfig:
  """Returns the config of the network in a file.

  Args:
    arrays: {name: array in the file}.
    grid: rows and columns of an image's tokens.
    text_encoder: the text encoder of a network that takes texts; its text length becomes the
      network's.
    heads: number of attention heads; None for that of the published model of the same width.

  Raises:
    UserError: if the file doesn't hold such a network, or the text encoder doesn't fit it.
  """
  prefix = prefix_of(arrays)
  codebook_size, width = _matrix(arrays, prefix + _TOKENS)
  if heads is None and width not in _HEADS:
    raise UserError(
      f'LlamaGen published no model of the width {width}, so the number of attention heads is '
      f'unknown; set --heads'
    )
  layers = {
    found[1] for name in arrays if (found := re.match(rf'{re.escape(prefix)}layers\.(\d+)\.', name))
  }
  sizes: dict[str, Any] = {
    'decoder_layers': len(layers),
    'width': width,
    'mlp_width': _matrix(arrays, f'{prefix}layers.0.feed_forward.w1.weight')[0],
    'heads': _HEADS[width] if heads is None else heads,
    'codebook_size': codebook_size,
    'grid': grid,
  }
  if not is_of_texts(arrays):
    if text_encoder is not None:
      raise UserError('--text_encoder: the network takes classes, not texts; leave it out')
    return llamagen.LlamaGenConfig(**sizes, classes=class_count(arrays))
  if text_encoder is None:
    raise UserError(
      '--text_encoder is required: the network takes the features of texts; give the folder that '
      '`parti-jax import text_encoder` wrote, for the published models of flan-t5-xl'
    )
  length, features = _matrix(arrays, prefix + _NO_TEXT)
  if text_encoder.width != features:
    raise UserError(
      f'--text_encoder has {text_encoder.width} features of a text token, but the network takes '
      f'{features}; the published models take those of flan-t5-xl'
    )
  if text_encoder.text_length != length:
    raise UserError(
      f'--text_encoder has {text_encoder.text_length} text tokens, but the network takes {length}; '
      f'import it again with --text_length={length}'
    )
  return llamagen.LlamaGenConfig(
    **sizes, classes=None, text_encoder=text_encoder, guidance_slots='text'
  )


def _matrix(arrays: Arrays, name: str) -> tuple[int, int]:
  """Returns the shape of a matrix in the file."""
  if name not in arrays or len(arrays[name].shape) != 2:
    raise UserError(f'the weights are not a generator of LlamaGen: they have no matrix {name}')
  rows, columns = arrays[name].shape
  return rows, columns


def key_map(config: llamagen.LlamaGenConfig, arrays: Arrays) -> key_map_lib.KeyMap:
  """Returns the sources of our parameters, without those of a text encoder from elsewhere."""
  prefix, heads, head_dim = prefix_of(arrays), config.heads, config.head_dim
  one = lambda name, change=key_map_lib.unchanged: key_map_lib.one(prefix + name, change)
  layers = functools.partial(_layers, prefix, config.decoder_layers)
  in_layers = {
    'attention_norm/scale': layers('attention_norm.weight'),
    'attention/project_in/kernel': layers(
      'attention.wqkv.weight',
      lambda array: array.T.reshape(*array.shape[1:], 3, heads, head_dim),
    ),
    'attention/project_out/kernel': layers(
      'attention.wo.weight', lambda array: array.T.reshape(heads, head_dim, *array.shape[:-1])
    ),
    'mlp_norm/scale': layers('ffn_norm.weight'),
    'mlp/project_gate/kernel': layers('feed_forward.w1.weight', key_map_lib.linear),
    'mlp/project_in/kernel': layers('feed_forward.w3.weight', key_map_lib.linear),
    'mlp/project_out/kernel': layers('feed_forward.w2.weight', key_map_lib.linear),
  }
  found = {f'image_decoder/decoder/layers/{path}': source for path, source in in_layers.items()}
  found |= {
    'image_decoder/token_embedding/table': one(_TOKENS),
    'image_decoder/decoder/norm/scale': one('norm.weight'),
    'image_decoder/logits/kernel': one('output.weight', key_map_lib.linear),
  }
  if config.text_encoder is None:
    return found | {'text_encoder/embedding/table': one(_CLASSES)}
  return found | {
    'image_decoder/no_text': one(_NO_TEXT),
    'image_decoder/project_text/project_in/kernel': one(_TEXT_IN, key_map_lib.linear),
    'image_decoder/project_text/project_out/kernel': one(_TEXT_OUT, key_map_lib.linear),
  }


def _layers(prefix: str, count: int, name: str, change=key_map_lib.unchanged) -> key_map_lib.Source:
  return key_map_lib.layers(f'{prefix}layers.{{}}.{name}', count, change)

"""Reads T5 encoders by the names of Hugging Face's and t5x's files.

A file may hold the encoder alone or a whole model, whose decoder is ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from collections.abc import Collection
from collections.abc import Mapping
from typing import Any
from typing import NamedTuple

import numpy as np

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import t5_encoder

# Arrays that the encoder does not need. `encoder.embed_tokens` is a second name of `shared`.
IGNORED = (
  r'(shared|encoder\.embed_tokens)\.weight',
  r'(decoder|lm_head)\..*',
  r'target/decoder/.*',
  r'(state|flax_mutables)/.*',
)
# UL2's width, mlp_width, heads and head_dim. It is the only published model with a gated silu.
_UL2 = (4096, 16384, 16, 256)
# Name in a Hugging Face config.json -> in ours.
_SIZES = {
  'num_layers': 'layers',
  'd_model': 'width',
  'd_ff': 'mlp_width',
  'num_heads': 'heads',
  'd_kv': 'head_dim',
  'vocab_size': 'text_vocabulary',
  'relative_attention_num_buckets': 'relative_buckets',
}
# `feed_forward_proj` of a Hugging Face config.json -> our activation, and their `dense_act_fn`.
_ACTIVATIONS = {
  'relu': ('relu', 'relu'),
  'gated-gelu': ('gated_gelu', 'gelu_new'),
  'gated-silu': ('gated_silu', 'silu'),
}


class _Names(NamedTuple):
  """Names of arrays in a format; {} stands for the layer.

  Attributes:
    embeddings: possible names of the embedding table; one suffices.
    relative: name of the table of relative position biases.
    relative_change: conversion of that table to [buckets, heads].
    norm: name of the scale of the final norm.
    layer: {our parameter of a layer, except the MLP's first projections: its name}.
    mlp: names of the MLP's first projections: the one without a gate; the two with a gate.
    transposed: whether the kernels are [out, in].
  """

  embeddings: tuple[str, ...]
  relative: str
  relative_change: Callable[[np.ndarray], np.ndarray]
  norm: str
  layer: Mapping[str, str]
  mlp: tuple[str, str, str]
  transposed: bool

  @property
  def query(self) -> str:
    return self.layer['attention/project_query/kernel']


_HUGGING_FACE = _Names(
  embeddings=('shared.weight', 'encoder.embed_tokens.weight'),
  relative='encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight',
  relative_change=key_map_lib.unchanged,
  norm='encoder.final_layer_norm.weight',
  layer={
    'attention_norm/scale': 'encoder.block.{}.layer.0.layer_norm.weight',
    'attention/project_query/kernel': 'encoder.block.{}.layer.0.SelfAttention.q.weight',
    'attention/project_key/kernel': 'encoder.block.{}.layer.0.SelfAttention.k.weight',
    'attention/project_value/kernel': 'encoder.block.{}.layer.0.SelfAttention.v.weight',
    'attention/project_out/kernel': 'encoder.block.{}.layer.0.SelfAttention.o.weight',
    'mlp_norm/scale': 'encoder.block.{}.layer.1.layer_norm.weight',
    'mlp/project_out/kernel': 'encoder.block.{}.layer.1.DenseReluDense.wo.weight',
  },
  mlp=(
    'encoder.block.{}.layer.1.DenseReluDense.wi.weight',
    'encoder.block.{}.layer.1.DenseReluDense.wi_0.weight',
    'encoder.block.{}.layer.1.DenseReluDense.wi_1.weight',
  ),
  transposed=True,
)
_T5X = _Names(
  embeddings=('target/token_embedder/embedding',),
  relative='target/encoder/relpos_bias/rel_embedding',
  relative_change=np.transpose,
  norm='target/encoder/encoder_norm/scale',
  layer={
    'attention_norm/scale': 'target/encoder/layers_{}/pre_attention_layer_norm/scale',
    'attention/project_query/kernel': 'target/encoder/layers_{}/attention/query/kernel',
    'attention/project_key/kernel': 'target/encoder/layers_{}/attention/key/kernel',
    'attention/project_value/kernel': 'target/encoder/layers_{}/attention/value/kernel',
    'attention/project_out/kernel': 'target/encoder/layers_{}/attention/out/kernel',
    'mlp_norm/scale': 'target/encoder/layers_{}/pre_mlp_layer_norm/scale',
    'mlp/project_out/kernel': 'target/encoder/layers_{}/mlp/wo/kernel',
  },
  mlp=(
    'target/encoder/layers_{}/mlp/wi/kernel',
    'target/encoder/layers_{}/mlp/wi_0/kernel',
    'target/encoder/layers_{}/mlp/wi_1/kernel',
  ),
  transposed=False,
)


def config_of(
  arrays: Mapping[str, key_map_lib.StoredArray], settings: Mapping[str, Any] | None = None
) -> t5_encoder.T5EncoderConfig:
  """Returns the config of the encoder in a file.

  Args:
    arrays: {name: array in the file}.
    settings: contents of the model's config.json (Hugging Face), for what array shapes don't show:
      the activation, the distance of relative positions and the dropout rate. Without it they are
      those of the published models with such arrays.

  Raises:
    UserError: if the file holds no T5 encoder, or the settings are of another model.
  """
  names = _names(arrays)
  shapes = {name: tuple(array.shape) for name, array in arrays.items()}
  gated = names.mlp[1].format(0) in shapes
  rows, width = _matrix(shapes, _embedding(names, shapes))
  buckets, heads = _matrix(shapes, names.relative, transposed=names is _T5X)
  _, joined = _matrix(shapes, names.query.format(0), names.transposed)
  _, mlp_width = _matrix(shapes, names.mlp[1 if gated else 0].format(0), names.transposed)
  if not heads or joined % heads:
    raise UserError(f'{heads} heads do not divide the {joined} features of {names.query.format(0)}')
  sizes: dict[str, Any] = {
    'layers': _count_layers(names, shapes),
    'width': width,
    'mlp_width': mlp_width,
    'heads': heads,
    'head_dim': joined // heads,
    'text_vocabulary': rows,
    'relative_buckets': buckets,
  }
  others: dict[str, Any] = {'activation': _usual_activation(sizes, gated)}
  if settings is not None:
    _check_settings(settings, sizes)
    others = _of_settings(settings, gated)
  return t5_encoder.T5EncoderConfig(**sizes, **others)


def key_map(config: t5_encoder.T5EncoderConfig, arrays: Collection[str]) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of a `T5Encoder`.

  Args:
    config: the result of `config_of`.
    arrays: names of the arrays in the file.
  """
  names = _names(arrays)
  layer = dict(names.layer)
  if config.gated:
    layer['mlp/project_gate/kernel'], layer['mlp/project_in/kernel'] = names.mlp[1:]
  else:
    layer['mlp/project_in/kernel'] = names.mlp[0]
  found = {
    'token_embedding/table': key_map_lib.one(_embedding(names, arrays)),
    'encoder/relative_bias/table': key_map_lib.one(names.relative, names.relative_change),
    'encoder/norm/scale': key_map_lib.one(names.norm),
  }
  for path, template in layer.items():
    change = _layer_change(path, config, names.transposed)
    found[f'encoder/layers/{path}'] = key_map_lib.layers(template, config.layers, change)
  return found


def _layer_change(
  path: str, config: t5_encoder.T5EncoderConfig, transposed: bool
) -> Callable[[np.ndarray], np.ndarray]:
  """Returns the conversion of a foreign array of one layer to our parameter."""
  kernel = key_map_lib.linear if transposed else key_map_lib.unchanged
  features = (config.heads, config.head_dim)
  match path.split('/'):
    case [_, 'scale']:
      return key_map_lib.unchanged
    case ['attention', 'project_out', _]:
      return lambda array: kernel(array).reshape(*features, config.width)
    case ['attention', *_]:
      return lambda array: kernel(array).reshape(config.width, *features)
  return kernel


def _names(arrays: Collection[str]) -> _Names:
  """Returns the names of a file's format."""
  for names in (_HUGGING_FACE, _T5X):
    if any(name in arrays for name in names.embeddings):
      return names
  raise UserError(
    f'no T5 encoder is in these files: none of their {len(arrays)} arrays is '
    f'{", ".join(_HUGGING_FACE.embeddings + _T5X.embeddings)}'
  )


def _embedding(names: _Names, arrays: Collection[str]) -> str:
  """Returns the name of the embedding table in a file."""
  return next(name for name in names.embeddings if name in arrays)


def _matrix(
  shapes: Mapping[str, tuple[int, ...]], name: str, transposed: bool = False
) -> tuple[int, int]:
  """Returns the sizes of a matrix."""
  shape = shapes.get(name)
  if shape is None:
    raise UserError(f'no T5 encoder is in these files: they lack the array {name}')
  if len(shape) != 2:
    raise UserError(f'{name} is of the shape {list(shape)}, and must be a matrix')
  return (shape[1], shape[0]) if transposed else (shape[0], shape[1])


def _count_layers(names: _Names, shapes: Mapping[str, tuple[int, ...]]) -> int:
  """Returns the number of layers, including those in between that a file lacks."""
  if _HUGGING_FACE.relative.replace('.0.', '.1.', 1) in shapes:
    raise UserError('each layer has relative positions of its own, as in umT5, which is not read')
  pattern = re.compile(re.escape(names.query).replace(r'\{\}', r'(\d{1,6})'))
  found = [int(match[1]) for match in map(pattern.fullmatch, shapes) if match]
  return max(found) + 1


def _usual_activation(sizes: Mapping[str, int], gated: bool) -> str:
  """Returns the activation of the published models with these sizes."""
  if not gated:
    return 'relu'
  ul2 = tuple(sizes[name] for name in ('width', 'mlp_width', 'heads', 'head_dim')) == _UL2
  return 'gated_silu' if ul2 else 'gated_gelu'


def _check_settings(settings: Mapping[str, Any], sizes: Mapping[str, int]):
  """Raises UserError unless a config.json is of a T5 with these sizes."""
  kind = settings.get('model_type', 't5')
  if kind not in ('t5', 'mt5'):
    raise UserError(
      f'config.json: model_type {checks.shown(kind)} is not read, only t5 and mt5 are'
    )
  for theirs, ours in _SIZES.items():
    if settings.get(theirs, sizes[ours]) != sizes[ours]:
      raise UserError(
        f'config.json: {theirs} is {checks.shown(settings[theirs])}, but the arrays have '
        f'{sizes[ours]}; give the config.json of this model'
      )
  if (epsilon := settings.get('layer_norm_epsilon', t5_encoder.EPSILON)) != t5_encoder.EPSILON:
    raise UserError(
      f'config.json: layer_norm_epsilon {checks.shown(epsilon)} is not read, only '
      f'{t5_encoder.EPSILON} is'
    )


def _of_settings(settings: Mapping[str, Any], gated: bool) -> dict[str, Any]:
  """Returns the fields of our config that a config.json states and array shapes don't show."""
  default = 'gated-gelu' if settings.get('model_type') == 'mt5' else 'relu'
  name = settings.get('feed_forward_proj', default)
  activation, function = _ACTIVATIONS.get(name if isinstance(name, str) else '', ('', ''))
  if not activation or settings.get('dense_act_fn', function) != function:
    raise UserError(
      f'config.json: feed_forward_proj {checks.shown(name)} with dense_act_fn '
      f'{checks.shown(settings.get("dense_act_fn"))} is not read; known: '
      f'{", ".join(f"{name} with {function}" for name, (_, function) in _ACTIVATIONS.items())}'
    )
  if activation.startswith('gated') != gated:
    raise UserError(
      f'config.json: feed_forward_proj is {name}, but the arrays are {"" if gated else "not "}'
      'those of a gated MLP; give the config.json of this model'
    )
  return {
    'activation': activation,
    'relative_distance': settings.get('relative_attention_max_distance', 128),
    'dropout': settings.get('dropout_rate', 0.1),
  }

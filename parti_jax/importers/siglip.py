"""Reads SigLIP's and SigLIP 2's weights by the names of big_vision and of transformers.

It reads networks of one picture size, and not the NaFlex ones, which take any size.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import preprocessing
from parti_jax.importers import clip_names
from parti_jax.importers import key_map as key_map_lib
from parti_jax.models import siglip

# Arrays that are not parameters: position ids and the state of training.
IGNORED = (r'(.*\.)?embeddings\.position_ids', r'(opt|chrono)/.*')
_EPSILON = 1e-6
_MEAN = (0.5, 0.5, 0.5)
_IMAGE = 'img/embedding/kernel'
_TRANSFORMERS_IMAGE = 'vision_model.embeddings.patch_embedding.weight'
# Width of an encoder -> number of its heads, in the published models: B, L, So400m, g-opt.
_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}
# The values in SigLIP 2's preprocessor_config.json.
SIGLIP_2 = preprocessing.Preprocessing('stretch', 'bilinear')


def config_of(
  arrays: clip_names.Arrays,
  settings: Mapping[str, Any] | None = None,
  processor: Mapping[str, Any] | None = None,
) -> siglip.SigLIPConfig:
  """Returns the config of a SigLIP, from the shapes of its arrays and from its own config.

  Args:
    arrays: {name: array in the file}.
    settings: contents of its config.json (transformers); None if there is none. The numbers of
      heads and the size of pictures are then those of the published models.
    processor: contents of its preprocessor_config.json, whose mean and deviation must be 0.5.

  Raises:
    UserError: if arrays are missing or contradict the config, or the config asks for something
      that is not supported.
  """
  start = clip_names.prefix(arrays, _IMAGE)
  if start is not None:
    found = _config_of_big_vision(arrays, start)
  else:
    found = _config_of_transformers(arrays, _prefix(arrays), settings)
  if processor:
    preprocessing_of(processor, found)
  return found


def preprocessing_of(
  processor: Mapping[str, Any] | None, sizes: siglip.SigLIPConfig
) -> preprocessing.Preprocessing:
  """Returns how a SigLIP's pictures are resized.

  Args:
    processor: contents of its preprocessor_config.json; None for SigLIP 2's.
    sizes: the result of `config_of`.

  Raises:
    UserError: if the file asks for something that is not supported.
  """
  if processor is None:
    return SIGLIP_2
  default = clip_names.Processor(preprocessing.Preprocessing('stretch'), _MEAN, _MEAN)
  found = clip_names.read_processor(processor, sizes.image_size, default)
  if (found.mean, found.std) != (_MEAN, _MEAN):
    raise UserError(f'image_mean={found.mean} and image_std={found.std} must be 0.5')
  return found.how


def key_map(config: siglip.SigLIPConfig, arrays: clip_names.Arrays) -> key_map_lib.KeyMap:
  """Returns the arrays that make up the parameters of `siglip.SigLIP`.

  Args:
    config: the result of `config_of`.
    arrays: {name: array in the file}.
  """
  start = clip_names.prefix(arrays, _IMAGE)
  if start is not None:
    return _big_vision_key_map(arrays, start, config)
  return _transformers_key_map(_prefix(arrays), config)


def _prefix(arrays: clip_names.Arrays) -> str:
  """Returns the prefix of the names of transformers.

  Raises:
    UserError: if they are not SigLIP's.
  """
  start = clip_names.prefix(arrays, _TRANSFORMERS_IMAGE)
  if start is None:
    raise UserError(
      f"these aren't the arrays of a SigLIP: neither {_IMAGE} (big_vision) nor "
      f'{_TRANSFORMERS_IMAGE} (transformers) is among them'
    )
  return start


def _check_patches(arrays: clip_names.Arrays, name: str) -> tuple[int, ...]:
  """Returns the shape of the patches' kernel; raises UserError for a NaFlex network."""
  if name in arrays and len(arrays[name].shape) == 2:
    raise UserError(
      f'{name} has two axes, as in a NaFlex network, which takes pictures of any size; only '
      'networks of one size are read, such as siglip2_b16_256'
    )
  return clip_names.shape(arrays, name, 4)


def _config_of_big_vision(arrays: clip_names.Arrays, start: str) -> siglip.SigLIPConfig:
  patch_size, _, _, width = _check_patches(arrays, start + _IMAGE)
  positions = f'{start}img/pos_embedding'
  side = clip_names.grid(clip_names.shape(arrays, positions, 3)[1], positions)
  image = _blocks(arrays, f'{start}img/Transformer')
  text = _blocks(arrays, f'{start}txt/Encoder_0')
  vocabulary, text_width = clip_names.shape(arrays, f'{start}txt/Embed_0/embedding', 2)
  return siglip.SigLIPConfig(
    image_size=_published_size(patch_size, side),
    patch_size=patch_size,
    image_width=width,
    text_vocabulary=vocabulary,
    text_length=clip_names.shape(arrays, f'{start}txt/pos_embedding', 3)[1],
    text_width=text_width,
    **{f'image_{name}': value for name, value in image.items()},
    **{f'text_{name}': value for name, value in text.items()},
  )


def _published_size(patch_size: int, side: int) -> int:
  """Returns the size of pictures; SigLIP's So400m/14 of 384 pixels ignores six of them."""
  return 384 if (patch_size, side) == (14, 27) else patch_size * side


def _blocks(arrays: clip_names.Arrays, tower: str) -> dict[str, Any]:
  """Returns the numbers of layers and heads and the MLP's width of a tower of big_vision."""
  query, mlp = (
    'MultiHeadDotProductAttention_0/query/kernel',
    'MlpBlock_0/Dense_0/kernel',
  )
  if f'{tower}/encoderblock/{query}' in arrays:
    count, _, heads, _ = clip_names.shape(arrays, f'{tower}/encoderblock/{query}', 4)
    width = clip_names.shape(arrays, f'{tower}/encoderblock/{mlp}', 3)[2]
  else:
    count = clip_names.count_layers(arrays, f'{tower}/encoderblock_{{}}/{query}')
    heads = clip_names.shape(arrays, f'{tower}/encoderblock_0/{query}', 3)[1]
    width = clip_names.shape(arrays, f'{tower}/encoderblock_0/{mlp}', 2)[1]
  return {'layers': count, 'heads': heads, 'mlp_width': width}


def _big_vision_key_map(
  arrays: clip_names.Arrays, start: str, config: siglip.SigLIPConfig
) -> dict[str, key_map_lib.Source]:
  first = lambda array: array.reshape(array.shape[1:])
  scalar = lambda array: array.reshape(())
  kernel_and_bias = lambda ours, theirs: {
    f'{ours}/{last}': key_map_lib.one(f'{start}{theirs}/{last}') for last in ('kernel', 'bias')
  }
  norm = lambda ours, theirs: {
    f'{ours}/{last}': key_map_lib.one(f'{start}{theirs}/{last}') for last in ('scale', 'bias')
  }
  head, ours = 'img/MAPHead_0', 'image_encoder/pooling'
  found = {
    'log_scale': key_map_lib.one(f'{start}t', scalar),
    'bias': key_map_lib.one(f'{start}b', scalar),
    'image_encoder/patch_embedding/kernel': key_map_lib.one(
      start + _IMAGE, lambda array: array.reshape(-1, array.shape[-1])
    ),
    'image_encoder/patch_embedding/bias': key_map_lib.one(f'{start}img/embedding/bias'),
    'image_encoder/position_embedding/table': key_map_lib.one(f'{start}img/pos_embedding', first),
    f'{ours}/probe': key_map_lib.one(f'{start}{head}/probe', lambda array: first(first(array))),
    'text_encoder/token_embedding/table': key_map_lib.one(f'{start}txt/Embed_0/embedding'),
    'text_encoder/position_embedding/table': key_map_lib.one(f'{start}txt/pos_embedding', first),
    **norm('image_encoder/norm', 'img/Transformer/encoder_norm'),
    **norm(f'{ours}/norm', f'{head}/LayerNorm_0'),
    **kernel_and_bias(f'{ours}/mlp/project_in', f'{head}/MlpBlock_0/Dense_0'),
    **kernel_and_bias(f'{ours}/mlp/project_out', f'{head}/MlpBlock_0/Dense_1'),
    **norm('text_encoder/norm', 'txt/Encoder_0/encoder_norm'),
    **kernel_and_bias('text_projection', 'txt/head'),
  }
  for part in ('query', 'key', 'value', 'out'):
    found |= kernel_and_bias(
      f'{ours}/attention/{part}', f'{head}/MultiHeadDotProductAttention_0/{part}'
    )
  for tower, theirs, count in (
    ('image_encoder', f'{start}img/Transformer', config.image_layers),
    ('text_encoder', f'{start}txt/Encoder_0', config.text_layers),
  ):
    found |= _big_vision_layers(arrays, f'{tower}/transformer/layers', theirs, count)
  return found


def _big_vision_layers(
  arrays: clip_names.Arrays, ours: str, theirs: str, count: int
) -> dict[str, key_map_lib.Source]:
  """Returns the sources of the blocks of a tower, whose arrays may be stacked like ours."""
  parts = {
    'attention_norm': ('LayerNorm_0', 'scale'),
    'mlp_norm': ('LayerNorm_1', 'scale'),
    'mlp/project_in': ('MlpBlock_0/Dense_0', 'kernel'),
    'mlp/project_out': ('MlpBlock_0/Dense_1', 'kernel'),
  } | {
    f'attention/{part}': (f'MultiHeadDotProductAttention_0/{part}', 'kernel')
    for part in ('query', 'key', 'value', 'out')
  }
  scanned = f'{theirs}/encoderblock/LayerNorm_0/scale' in arrays
  source = key_map_lib.one if scanned else functools.partial(key_map_lib.layers, count=count)
  block = 'encoderblock' if scanned else 'encoderblock_{}'
  return {
    f'{ours}/{part}/{last}': source(f'{theirs}/{block}/{name}/{last}')
    for part, (name, weight) in parts.items()
    for last in (weight, 'bias')
  }


def _config_of_transformers(
  arrays: clip_names.Arrays, start: str, settings: Mapping[str, Any] | None
) -> siglip.SigLIPConfig:
  image, text = _sections(settings)
  width, _, patch_size, _ = _check_patches(arrays, start + _TRANSFORMERS_IMAGE)
  positions = f'{start}vision_model.embeddings.position_embedding.weight'
  side = clip_names.grid(clip_names.shape(arrays, positions, 2)[0], positions)
  mlp = start + '{}_model.encoder.layers.{}.mlp.fc1.weight'
  image_mlp, text_mlp = mlp.format('vision', '{}'), mlp.format('text', '{}')
  tokens = f'{start}text_model.embeddings.token_embedding.weight'
  vocabulary, text_width = clip_names.shape(arrays, tokens, 2)
  said = _published_size(patch_size, side)
  if image is not None:
    said = clip_names.whole(image, 'image_size', 224)
  found = siglip.SigLIPConfig(
    image_size=clip_names.image_size(said, patch_size, side),
    patch_size=patch_size,
    image_layers=clip_names.count_layers(arrays, image_mlp),
    image_width=width,
    image_mlp_width=clip_names.shape(arrays, image_mlp.format(0), 2)[0],
    image_heads=_heads(image, width),
    text_vocabulary=vocabulary,
    text_length=clip_names.shape(
      arrays, f'{start}text_model.embeddings.position_embedding.weight', 2
    )[0],
    text_layers=clip_names.count_layers(arrays, text_mlp),
    text_width=text_width,
    text_mlp_width=clip_names.shape(arrays, text_mlp.format(0), 2)[0],
    text_heads=_heads(text, text_width),
  )
  for part, tower, others in (
    (image, 'image', {'patch_size': patch_size}),
    (text, 'text', {'vocab_size': vocabulary, 'max_position_embeddings': found.text_length}),
  ):
    sizes = {
      'hidden_size': getattr(found, f'{tower}_width'),
      'intermediate_size': getattr(found, f'{tower}_mlp_width'),
      'num_hidden_layers': getattr(found, f'{tower}_layers'),
    }
    clip_names.check_sizes(part or {}, sizes | others)
  return found


def _sections(settings: Mapping[str, Any] | None):
  """Returns the checked sections of a config.json about both towers; None without a config."""
  if settings is None:
    return None, None
  kind = settings.get('model_type')
  if kind not in (None, 'siglip'):
    raise UserError(f"its config is of {checks.shown_as_json(kind)}, which isn't SigLIP")
  image, text = (clip_names.section(settings, f'{tower}_config') for tower in ('vision', 'text'))
  for part in (image, text):
    clip_names.check_epsilon(part, _EPSILON)
    activation = part.get('hidden_act', 'gelu_pytorch_tanh')
    if activation not in ('gelu_pytorch_tanh', 'gelu_new'):
      raise UserError(f'hidden_act={checks.shown_as_json(activation)} is not supported')
  return image, text


def _heads(part: Mapping[str, Any] | None, width: int) -> int:
  if part is not None:
    return clip_names.whole(part, 'num_attention_heads', 12)
  if width not in _HEADS:
    raise UserError(
      f'an encoder of width {width} is none of the published ones, so that its attention heads '
      "aren't known; give its config.json"
    )
  return _HEADS[width]


def _transformers_key_map(start: str, config: siglip.SigLIPConfig) -> dict[str, key_map_lib.Source]:
  image, text = f'{start}vision_model.', f'{start}text_model.'
  ours, head = 'image_encoder/pooling', f'{image}head.'
  scalar = lambda array: array.reshape(())
  linear = lambda path, theirs, change=key_map_lib.linear: {
    f'{path}/kernel': key_map_lib.one(f'{theirs}.weight', change),
    f'{path}/bias': key_map_lib.one(f'{theirs}.bias'),
  }
  heads = config.image_heads
  found = {
    'log_scale': key_map_lib.one(f'{start}logit_scale', scalar),
    'bias': key_map_lib.one(f'{start}logit_bias', scalar),
    'image_encoder/position_embedding/table': key_map_lib.one(
      f'{image}embeddings.position_embedding.weight'
    ),
    'text_encoder/token_embedding/table': key_map_lib.one(
      f'{text}embeddings.token_embedding.weight'
    ),
    'text_encoder/position_embedding/table': key_map_lib.one(
      f'{text}embeddings.position_embedding.weight'
    ),
    f'{ours}/probe': key_map_lib.one(f'{head}probe', _only_row),
    **linear(
      'image_encoder/patch_embedding', f'{image}embeddings.patch_embedding', clip_names.patches
    ),
    **clip_names.norm('image_encoder/norm', f'{image}post_layernorm'),
    **clip_names.norm('text_encoder/norm', f'{text}final_layer_norm'),
    **linear('text_projection', f'{text}head'),
    **linear(f'{ours}/attention/out', f'{head}attention.out_proj', clip_names.from_heads(heads)),
    **clip_names.norm(f'{ours}/norm', f'{head}layernorm'),
    **linear(f'{ours}/mlp/project_in', f'{head}mlp.fc1'),
    **linear(f'{ours}/mlp/project_out', f'{head}mlp.fc2'),
  }
  for place, part in enumerate(('query', 'key', 'value')):
    kernel, bias = clip_names.to_heads(heads), clip_names.split_bias(heads)
    found |= {
      f'{ours}/attention/{part}/kernel': key_map_lib.one(
        f'{head}attention.in_proj_weight', clip_names.fused(place, kernel)
      ),
      f'{ours}/attention/{part}/bias': key_map_lib.one(
        f'{head}attention.in_proj_bias', clip_names.fused(place, bias)
      ),
    }
  layers = clip_names.transformers_layers
  stack = 'transformer/layers'
  return (
    found
    | layers(f'image_encoder/{stack}', f'{image}encoder.layers', config.image_layers, heads)
    | layers(
      f'text_encoder/{stack}', f'{text}encoder.layers', config.text_layers, config.text_heads
    )
  )


def _only_row(array: np.ndarray) -> np.ndarray:
  """Reshapes [1, 1, embed] to [embed]."""
  return array.reshape(array.shape[2:])

"""Reads min-dalle's files of DALL·E mini and mega, encoder.pt and decoder.pt, under dalle-mini's names.

min-dalle has a file for each tower, an array for each layer, and torch's layout.
`parti_jax.importers.dalle_mini` then reads the arrays.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.importers import files
from parti_jax.importers import key_map

# Names in a file, without those of layers in front -> names of dalle-mini.
_NAMES = {
  'embed_tokens.weight': 'embed_tokens/embedding',
  'embed_positions.weight': 'embed_positions/embedding',
  'layernorm_embedding.weight': 'layernorm_embedding/scale',
  'layernorm_embedding.bias': 'layernorm_embedding/bias',
  'final_ln.bias': 'final_ln/bias',
}
_ATTENTIONS = {'self_attn': 0, 'encoder_attn': 1}
_IN_LAYERS = {
  **{
    f'{attention}.{projection}_proj.weight': f'FlaxBartAttention_{place}/{projection}_proj/kernel'
    for attention, place in _ATTENTIONS.items()
    for projection in ('q', 'k', 'v', 'out')
  },
  **{
    f'pre_{attention}_layer_norm.bias': f'LayerNorm_{2 * place}/bias'
    for attention, place in _ATTENTIONS.items()
  },
  **{
    f'{attention}_layer_norm.{leaf}': f'LayerNorm_{2 * place + 1}/{ours}'
    for attention, place in _ATTENTIONS.items()
    for leaf, ours in (('weight', 'scale'), ('bias', 'bias'))
  },
  **{f'glu.ln{place}.bias': f'GLU_0/LayerNorm_{place}/bias' for place in range(2)},
  **{f'glu.fc{place}.weight': f'GLU_0/Dense_{place}/kernel' for place in range(3)},
}
# Scales that the network doesn't have. torch's modules do, and min-dalle leaves them at 1.
_NO_SCALE = re.compile(r'final_ln\.weight|layers\.\d+\.(pre_\w+_layer_norm|glu\.ln[01])\.weight')
_LOGITS = 'lm_head.weight'
_LAYER = re.compile(r'layers\.(\d{1,6})\.(.+)')


@dataclasses.dataclass(frozen=True)
class _Array:
  """One array, or one of each layer, which a new first axis stacks.

  Attributes:
    parts: the arrays.
    stacked: whether they are those of layers.
    transposed: whether each is torch's [out, in].
  """

  parts: tuple[key_map.StoredArray, ...]
  stacked: bool
  transposed: bool

  @property
  def shape(self) -> tuple[int, ...]:
    shape = tuple(self.parts[0].shape)
    shape = shape[::-1] if self.transposed else shape
    return (len(self.parts), *shape) if self.stacked else shape

  @property
  def dtype(self) -> np.dtype:
    return self.parts[0].dtype

  def read(self) -> np.ndarray:
    found = np.empty(self.shape, self.dtype)
    for target, part in zip(found if self.stacked else (found,), self.parts, strict=True):
      array = part.read()
      target[...] = array.T if self.transposed else array
    return found


def open_weights(paths: Sequence[str]) -> files.Weights:
  """Lists the arrays of both files under dalle-mini's names.

  Args:
    paths: encoder.pt and decoder.pt, or encoder_mini.pt and decoder_mini.pt, in any order.

  Raises:
    UserError: if there are not two such files, or one is damaged.
  """
  opened = [files.open_weights([path]) for path in paths]
  arrays: dict[str, key_map.StoredArray] = {}
  towers = ['decoder' if _LOGITS in weights.arrays else 'encoder' for weights in opened]
  if sorted(towers) != ['decoder', 'encoder']:
    raise UserError(
      f'give the two files of min-dalle, encoder.pt and decoder.pt, of which one has {_LOGITS}; '
      f'{len(opened)} files are given, {towers.count("decoder")} of them with it'
    )
  for path, tower, weights in zip(paths, towers, opened, strict=True):
    arrays |= _renamed(weights.arrays, tower, path)
  return files.Weights(tuple(file for weights in opened for file in weights.files), arrays)


def _renamed(
  stored: Mapping[str, key_map.StoredArray], tower: str, where: str
) -> dict[str, key_map.StoredArray]:
  """Returns the arrays of a file under dalle-mini's names, those of layers stacked."""
  found: dict[str, key_map.StoredArray] = {}
  of_layers: dict[str, dict[int, key_map.StoredArray]] = {}
  for name, array in stored.items():
    if _NO_SCALE.fullmatch(name):
      if not np.all(np.asarray(array.read(), np.float32) == 1):
        raise UserError(f'{where}: {name} is not 1 everywhere, but the network has no such scale')
      continue
    layer = _LAYER.fullmatch(name)
    if layer and layer[2] in _IN_LAYERS:
      stack = f'model/{tower}/layers/FlaxBart{tower.capitalize()}Layers'
      of_layers.setdefault(f'{stack}/{_IN_LAYERS[layer[2]]}', {})[int(layer[1])] = array
    elif name == _LOGITS:
      found['lm_head/kernel'] = _Array((array,), False, True)
    else:  # An unknown name stays, so that the check says that it is left over.
      found[f'model/{tower}/{_NAMES[name]}' if name in _NAMES else name] = array
  for name, parts in of_layers.items():
    ordered = [parts[layer] for layer in sorted(parts)]
    if sorted(parts) != list(range(len(parts))):
      raise UserError(f'{where}: the layers that have {name} are {sorted(parts)}')
    if len({(tuple(part.shape), part.dtype) for part in ordered}) > 1:
      raise UserError(f'{where}: the arrays of {name} have several shapes or dtypes')
    found[name] = _Array(tuple(ordered), True, name.endswith('kernel'))
  return found

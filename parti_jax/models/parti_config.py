"""Sizes of a Parti model (Parti, table 1), bound by gin."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models.nn import attention_patterns

# What models did before it became a setting, for files that do not name it.
BEFORE_IT_WAS_A_SETTING = {'attention_patterns': ('global',), 'conv_kernel': 11}


def by_todays_names(sizes: dict[str, Any]) -> dict[str, Any]:
  """Sizes of a model as a file of an older version has them, by the names of this version.

  Raises:
    UserError: if a size is there by both names, or that of an older version is of another type.
  """
  sizes = dict(sizes)
  if 'attention_pattern' in sizes:  # One pattern for all layers, and 'causal' was 'global'.
    if 'attention_patterns' in sizes:
      raise errors.UserError(
        "it has other fields than PartiConfig: 'attention_pattern' is the "
        "older name of 'attention_patterns', which is there too; remove one"
      )
    older = checks.text('attention_pattern', sizes.pop('attention_pattern'))
    sizes['attention_patterns'] = ('global' if older == 'causal' else older,)
  return BEFORE_IT_WAS_A_SETTING | sizes


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class PartiConfig:
  """Sizes of the text encoder and of the image-token decoder.

  Attributes:
    encoder_layers: blocks of the text encoder.
    decoder_layers: blocks of the image-token decoder.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: attention heads; must divide `width`.
    text_vocabulary: SentencePiece pieces, ids 0 (padding), 1 (end), 2 (unknown) among them.
    text_length: most text tokens.
    codebook_size: image tokens to choose from.
    grid: rows and columns of image tokens; their product is `image_length`.
    dropout: rate of dropout in training.
    dtype: name of the dtype that projections compute in; norms and logits are float32.
    attention_patterns: which earlier image tokens the self-attention of the decoder's layers
      sees: a schedule that is repeated over the layers, of 'conv' (those within a square around
      the position), 'row', 'column' and 'global' (all), see `attention_patterns`. Kept as the
      shortest tuple that gives the same.
    conv_kernel: side of the square of 'conv', odd.
    remat: what the backward pass keeps, a name in `layer_stack.REMAT_POLICIES`.
    unroll: layers laid out in one turn of the scan; changes speed, not results.

  Raises:
    UserError: if `heads` does not divide `width`, or a value is out of its range.
  """

  encoder_layers: int = 12
  decoder_layers: int = 12
  width: int = 1024
  mlp_width: int = 4096
  heads: int = 16
  text_vocabulary: int = 16000
  text_length: int = 128
  codebook_size: int = 8192
  grid: tuple[int, int] = (32, 32)
  dropout: float = 0.1
  dtype: str = 'bfloat16'
  attention_patterns: tuple[str, ...] = ('global',)
  conv_kernel: int = 11
  remat: str = 'everything'
  unroll: int = 1

  BOUNDS = {'dropout': (0, 1)}  # Below 1, see `config_checks.check_dropout`.

  def __post_init__(self):
    patterns = self.attention_patterns
    if not isinstance(patterns, (tuple, list)) or not patterns:
      raise errors.UserError(
        f'PartiConfig.attention_patterns={checks.shown(patterns)} must be a tuple of patterns, '
        "such as ('conv', 'global')"
      )
    config_checks.check(self)
    config_checks.check_divides(self, 'heads', 'width')
    config_checks.check_image_length(self, 'grid')
    self._check_patterns()
    object.__setattr__(
      self, 'attention_patterns', attention_patterns.shortest_period(self.attention_patterns)
    )
    if self.conv_kernel % 2 == 0:
      raise errors.UserError(f'PartiConfig.conv_kernel={self.conv_kernel} must be odd')
    config_checks.check_dropout(self)

  def _check_patterns(self):
    """Raises UserError unless all patterns are known, and their schedule fits the layers."""
    names = self.attention_patterns
    key = f'PartiConfig.attention_patterns={checks.shown(names)}'
    for name in names:
      if name not in attention_patterns.PATTERNS:
        raise errors.UserError(
          f'{key}: {checks.shown(name)} is not one of {", ".join(attention_patterns.PATTERNS)}'
        )
    if self.decoder_layers % len(names):
      raise errors.UserError(
        f'{key}: a schedule of {len(names)} does not divide '
        f'PartiConfig.decoder_layers={self.decoder_layers}; it is repeated over the layers'
      )

  @property
  def patterns(self) -> tuple[attention_patterns.AttentionPattern, ...]:
    """What self-attention sees in the decoder's first layers; the others repeat it."""
    return tuple(
      attention_patterns.AttentionPattern(name, self.grid, self.conv_kernel)
      for name in self.attention_patterns
    )

  def layer_pattern(self, layer: int) -> attention_patterns.AttentionPattern:
    """What self-attention sees in one of the decoder's layers."""
    return self.patterns[layer % len(self.attention_patterns)]

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

"""Sizes of a Parti model (Parti, table 1), bound by gin."""

from __future__ import annotations

import dataclasses

import gin
import jax.numpy as jnp

from parti_jax import errors
from parti_jax.models import attention_patterns
from parti_jax.models import config_checks

# What models did before it became a setting, for files that do not name it.
BEFORE_IT_WAS_A_SETTING = {'attention_pattern': 'causal', 'conv_kernel': 11}


@gin.configurable
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
    attention_pattern: what the decoder's self-attention sees: 'causal' (all earlier image tokens)
      or 'conv' (those within a square around the position), see `attention_patterns`.
    conv_kernel: side of that square, odd.
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
  attention_pattern: str = 'causal'
  conv_kernel: int = 11
  remat: str = 'everything'
  unroll: int = 1

  def __post_init__(self):
    object.__setattr__(self, 'grid', tuple(self.grid))
    config_checks.check(self)
    config_checks.check_divides(self, 'heads', 'width')
    if len(self.grid) != 2 or min(self.grid) < 1:
      raise errors.UserError(f'PartiConfig.grid={self.grid} must be two whole numbers from 1')
    if self.attention_pattern not in attention_patterns.PATTERNS:
      raise errors.UserError(
          f'PartiConfig.attention_pattern={self.attention_pattern!r} is not one of '
          f'{", ".join(attention_patterns.PATTERNS)}')
    if self.conv_kernel % 2 == 0:
      raise errors.UserError(f'PartiConfig.conv_kernel={self.conv_kernel} must be odd')
    if not 0 <= self.dropout < 1:
      raise errors.UserError(f'PartiConfig.dropout={self.dropout} must lie in [0, 1)')

  @property
  def pattern(self) -> attention_patterns.AttentionPattern:
    """What the decoder's self-attention sees."""
    return attention_patterns.AttentionPattern(
        self.attention_pattern, self.grid, self.conv_kernel)

  @property
  def image_length(self) -> int:
    return self.grid[0] * self.grid[1]

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

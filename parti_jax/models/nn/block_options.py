"""Options of Transformer blocks; the defaults are those of Parti."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from parti_jax.models.nn import layers

# Modules of a dtype, and modules of a width, an `mlp_width` and a dtype.
NORMS: dict[str, Callable[[jnp.dtype], nn.Module]] = {
  'layer': layers.LayerNorm,
  'rms': layers.RMSNorm,
  'layer_bias': functools.partial(layers.LayerNorm, epsilon=1e-5, use_scale=False, use_bias=True),
  'layer_scale_bias': functools.partial(layers.LayerNorm, epsilon=1e-5, use_bias=True),
}
MLPS: dict[str, Callable[[int, int, jnp.dtype], nn.Module]] = {
  'gelu': layers.MLP,
  'swiglu': layers.SwiGLU,
  'normed_geglu': layers.NormedGEGLU,
}
# How the image-token decoder learns where a token is.
POSITIONS = ('learned', 'rotary_2d')


@dataclasses.dataclass(frozen=True)
class BlockOptions:
  """What the blocks of a stack consist of.

  Attributes:
    norm: the norm before each attention and MLP, and after the last block; a name in NORMS.
    mlp: a name in MLPS.
    qk_norm: whether an RMSNorm over head_dim follows the projections of queries and keys.
    rotary_grid: rows and columns of the positions by which self-attention rotates queries and keys
      (`rotary.rotate`); None to leave them.
    kv_heads: number of heads of keys and values, each for as many heads of queries; None for one
      for each of them. Only of decoders.
    norm_after_attention: the norm of the output of each attention, before the residual connection,
      as in NormFormer (arXiv 2110.09456); a name in NORMS, or None for none. The MLP has none; one
      inside of it is a matter of `mlp`.
    rotary_inputs: whether `rotary_grid` is of the inputs (`rotary.rotate`).
    cross_attention: whether the blocks of a decoder attend to the text by cross-attention. Otherwise
      the text comes before the image tokens, as a prefix, and self-attention attends to it.
  """

  norm: str = 'layer'
  mlp: str = 'gelu'
  qk_norm: bool = False
  rotary_grid: tuple[int, int] | None = None
  kv_heads: int | None = None
  norm_after_attention: str | None = None
  rotary_inputs: bool = False
  cross_attention: bool = True

  def make_norm(self, dtype: jnp.dtype) -> nn.Module:
    return NORMS[self.norm](dtype)

  def make_norm_after_attention(self, dtype: jnp.dtype) -> nn.Module | None:
    return None if self.norm_after_attention is None else NORMS[self.norm_after_attention](dtype)

  def make_mlp(self, width: int, mlp_width: int, dtype: jnp.dtype) -> nn.Module:
    return MLPS[self.mlp](width, mlp_width, dtype)

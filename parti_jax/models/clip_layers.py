"""Layers with biases and pre-norm blocks: the building blocks of networks that torch users published.

CLIP, SigLIP and the ViT-VQGAN of enhancing-transformers consist of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core.errors import UserError
from parti_jax.models import config_checks
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers

ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
  'quick_gelu': lambda x: x * jax.nn.sigmoid(1.702 * x),
  'gelu': functools.partial(nn.gelu, approximate=False),
  'gelu_tanh': functools.partial(nn.gelu, approximate=True),
  'tanh': nn.tanh,
}


def check_activation(config) -> None:
  """Raises UserError unless `activation` is a name in ACTIVATIONS."""
  if config.activation not in ACTIVATIONS:
    raise UserError(
      f'{type(config).__name__}.activation={config.activation!r} is not one of '
      f'{", ".join(ACTIVATIONS)}'
    )


def check_end(config) -> None:
  """Raises UserError if no token of the vocabulary is the end of a text."""
  if config.end_id >= config.text_vocabulary:
    raise UserError(
      f'{type(config).__name__}.end_id={config.end_id} is not below '
      f'text_vocabulary={config.text_vocabulary}'
    )


def check_patches(config) -> None:
  """Raises UserError if a patch is larger than the picture, or there are too many patches."""
  if config.patch_size > config.image_size:
    raise UserError(
      f'{type(config).__name__}.patch_size={config.patch_size} is larger than '
      f'image_size={config.image_size}'
    )
  if config.patches > config_checks.MAX_SIZE:
    raise UserError(
      f'{type(config).__name__}.image_size={config.image_size} gives {config.patches:,} patches, '
      f'and {config_checks.MAX_SIZE:,} are the most'
    )


class Linear(layers.Projection):
  """`layers.Projection` with a bias; the attributes are the same."""

  @nn.compact
  def __call__(self, x: Float[Array, '*rows_and_contracted']) -> Float[Array, '*rows_and_features']:
    x = super().__call__(x)
    axes = self.axes[self.contracted :]
    bias = layers.parameter(self, 'bias', nn.initializers.zeros, axes, self.features)
    return x + bias.astype(self.dtype)


def layer_norm(epsilon: float, dtype: jnp.dtype, name: str | None = None) -> nn.LayerNorm:
  """Returns a layer norm with scale and bias, whose statistics are float32."""
  return nn.LayerNorm(
    epsilon=epsilon,
    dtype=dtype,
    use_fast_variance=False,
    scale_init=nn.with_logical_partitioning(nn.initializers.ones, ('norm',)),
    bias_init=nn.with_logical_partitioning(nn.initializers.zeros, ('norm',)),
    name=name,
  )


class Attention(nn.Module):
  """Multi-head attention whose projections have biases.

  Attributes:
    width: model dimension `embed`.
    heads: number of heads; must divide `width`.
    dtype: dtype of the computation; parameters are float32.
    qkv_bias: whether the projections of queries, keys and values have biases.
  """

  width: int
  heads: int
  dtype: jnp.dtype = jnp.float32
  qkv_bias: bool = True

  def setup(self):
    split = (self.heads, self.width // self.heads), 1, ('embed', 'heads', 'head_dim'), self.dtype
    projection = Linear if self.qkv_bias else layers.Projection
    self.query = projection(*split)
    self.key = projection(*split)
    self.value = projection(*split)
    self.out = Linear((self.width,), 2, ('heads', 'head_dim', 'embed'), self.dtype)

  def __call__(
    self,
    x: Float[Array, 'batch queries embed'],
    other: Float[Array, 'batch keys embed'],
    causal: bool = False,
  ) -> Float[Array, 'batch queries embed']:
    """Attends from each position of `x` to all of `other`, or if `causal` to those up to it."""
    mask = jnp.tril(jnp.ones((x.shape[1], other.shape[1]), bool)) if causal else None
    return self.out(
      dot_product_attention.attend(self.query(x), self.key(other), self.value(other), mask)
    )


class MLP(nn.Module):
  """Two projections with biases, and an activation between them.

  Attributes:
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    activation: a name in ACTIVATIONS.
    dtype: dtype of the computation.
  """

  width: int
  mlp_width: int
  activation: str
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: Float[Array, 'batch length embed']) -> Float[Array, 'batch length embed']:
    hidden = Linear((self.mlp_width,), 1, ('embed', 'mlp'), self.dtype, name='project_in')(x)
    hidden = nn.with_logical_constraint(
      hidden, ('activation_batch', 'activation_length', 'activation_mlp')
    )
    return Linear((self.width,), 1, ('mlp', 'embed'), self.dtype, name='project_out')(
      ACTIVATIONS[self.activation](hidden)
    )


class Block(nn.Module):
  """Self-attention and MLP, each with a layer norm before it and a residual connection.

  Attributes:
    width: model dimension `embed`.
    mlp_width: hidden dimension of the MLP.
    heads: number of attention heads.
    activation: a name in ACTIVATIONS.
    epsilon: number added to the variance in the layer norms.
    causal: whether a position attends only to itself and to earlier positions.
    dtype: dtype of the computation.
    qkv_bias: whether the projections of queries, keys and values have biases.
  """

  width: int
  mlp_width: int
  heads: int
  activation: str
  epsilon: float
  causal: bool = False
  dtype: jnp.dtype = jnp.float32
  qkv_bias: bool = True

  def setup(self):
    self.attention_norm = layer_norm(self.epsilon, self.dtype)
    self.attention = Attention(self.width, self.heads, self.dtype, self.qkv_bias)
    self.mlp_norm = layer_norm(self.epsilon, self.dtype)
    self.mlp = MLP(self.width, self.mlp_width, self.activation, self.dtype)

  def __call__(self, x: Float[Array, 'batch length embed']) -> Float[Array, 'batch length embed']:
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    normed = self.attention_norm(x)
    x = x + self.attention(normed, normed, self.causal)
    x = x + self.mlp(self.mlp_norm(x))
    return nn.with_logical_constraint(x, layers.ACTIVATION)


class Transformer(nn.Module):
  """A stack of blocks without a final layer norm.

  The attributes that are not listed are those of Block.

  Attributes:
    num_layers: number of blocks.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.
  """

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  activation: str
  epsilon: float
  causal: bool = False
  dtype: jnp.dtype = jnp.float32
  qkv_bias: bool = True
  remat: str = 'everything'
  unroll: int = 1

  @nn.compact
  def __call__(self, x: Float[Array, 'batch length embed']) -> Float[Array, 'batch length embed']:
    block = Block(
      self.width,
      self.mlp_width,
      self.heads,
      self.activation,
      self.epsilon,
      self.causal,
      self.dtype,
      self.qkv_bias,
      parent=None,
    )
    stacked = layer_stack.parameters(self, block, self.num_layers, x[:1])

    def layer(params, pattern_index, x, extra, keys):
      del pattern_index, extra, keys  # All layers are alike, and there is no other input.
      return block.apply({'params': params}, x)

    if self.is_initializing():
      return x
    return layer_stack.LayerStack(layer, self.remat, self.unroll).run(stacked, x)


def whole_patches(
  images: Float[Array, 'batch height width 3'], size: int, patch_size: int
) -> Float[Array, 'batch patches patch']:
  """Cuts pictures into patches, like a convolution without padding.

  Args:
    images: pictures of `size` × `size` pixels.
    size: height and width of the pictures.
    patch_size: height and width of a patch. The remainder at the right and the bottom is left out.

  Raises:
    UserError: if the pictures are of another size.
  """
  if images.shape[1:3] != (size, size):
    raise UserError(
      f'pictures of {images.shape[1]} × {images.shape[2]} pixels for a network of {size} × {size}; '
      'resize them as its preprocessing says'
    )
  seen = size // patch_size * patch_size
  return vit_vqgan.to_patches(images[:, :seen, :seen], patch_size)


def check_length(text_tokens: Int[Array, 'batch text_length'], most: int, exactly: bool = False):
  """Raises UserError if texts have more than `most` tokens, or with `exactly` another number."""
  length = text_tokens.shape[1]
  if length > most or (exactly and length != most):
    raise UserError(f'texts of {length} tokens for a network of {most}')

"""The text encoder of T5 (arXiv 1910.10683), and of T5 v1.1, Flan-T5, mT5 and UL2."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models.nn import dot_product_attention
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers

# Activations of the MLP. A gated one multiplies its result by a second projection.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  'relu': nn.relu,
  'gated_gelu': functools.partial(nn.gelu, approximate=True),
  'gated_silu': nn.silu,
}
# In float16 the activations of the published models overflow.
_DTYPES = ('float32', 'bfloat16')
# Added to the mean square in norms.
EPSILON = 1e-6
# Numbers that the dropout keys of the parts of the network are folded with.
_IN_EMBEDDING, _IN_LAYERS, _IN_OUTPUT = range(3)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class T5EncoderConfig:
  """Sizes of a T5 encoder; the defaults are those of T5 v1.1 Large and Flan-T5 Large.

  Attributes:
    layers: number of blocks.
    width: model dimension, `embed`.
    mlp_width: hidden dimension of the MLPs, `mlp`.
    heads: number of attention heads.
    head_dim: dimension of a head; `heads * head_dim` may differ from `width`.
    text_vocabulary: number of rows of the embedding table. The published tables have more rows than
      their vocabularies have pieces.
    text_length: maximum number of text tokens. The network itself takes texts of any length.
    activation: name of the MLPs' activation: 'relu' (T5), 'gated_gelu' (T5 v1.1, Flan-T5, mT5) or
      'gated_silu' (UL2).
    relative_buckets: number of buckets of relative positions; a multiple of 4. Each bucket has its
      own attention bias.
    relative_distance: distance beyond which all positions share a bucket.
    dropout: dropout rate in training.
    dtype: name of the dtype of the computation, 'float32' or 'bfloat16'. Norms and attention
      scores are float32.
    remat: what to save for the backward pass: a name in `layer_stack.REMAT_POLICIES`.
    unroll: number of layers that each iteration of the scan computes; doesn't change results.

  Raises:
    UserError: if a value is out of range.
  """

  layers: int = 24
  width: int = 1024
  mlp_width: int = 2816
  heads: int = 16
  head_dim: int = 64
  text_vocabulary: int = 32128
  text_length: int = 128
  activation: str = 'gated_gelu'
  relative_buckets: int = 32
  relative_distance: int = 128
  dropout: float = 0.1
  dtype: str = 'bfloat16'
  remat: str = 'everything'
  unroll: int = 1

  # The biases of all pairs of positions are in memory.
  BOUNDS = {
    'text_length': (2, 4096),
    'dropout': (0, 1),
  }  # 1 is excluded by `config_checks.check_dropout`.

  def __post_init__(self):
    config_checks.check(self)
    config_checks.check_dropout(self)
    for name, known in (('activation', tuple(ACTIVATIONS)), ('dtype', _DTYPES)):
      value = getattr(self, name)
      if value not in known:
        raise errors.UserError(
          f'T5EncoderConfig.{name}={checks.shown(value)} is not one of {", ".join(known)}'
        )
    if self.relative_buckets % 4:
      raise errors.UserError(
        f'T5EncoderConfig.relative_buckets={self.relative_buckets} must be a multiple of 4'
      )
    if self.relative_distance <= self.relative_buckets // 4:
      raise errors.UserError(
        f'T5EncoderConfig.relative_distance={self.relative_distance} must be more than a quarter '
        f'of relative_buckets={self.relative_buckets}'
      )

  @property
  def compute_dtype(self):
    return jnp.dtype(self.dtype)

  @property
  def gated(self) -> bool:
    """Whether the MLP multiplies its activation by a second projection."""
    return self.activation.startswith('gated_')


def relative_buckets(length: int, buckets: int, distance: int) -> Int[np.ndarray, 'length length']:
  """Returns the bucket of each key's position relative to each query.

  Half of the buckets are for keys up to the query, the other half for keys after it. In each half,
  the first buckets are for one distance each, and the others are spaced logarithmically up to
  `distance`.

  Returns:
    int32, [query, key].
  """
  relative = np.arange(length)[None, :] - np.arange(length)[:, None]
  each, apart = buckets // 2, np.abs(relative)
  exact = each // 2
  # Rounded in float32 as in the original: it decides the bucket of distances on a boundary.
  ratio = np.log(np.maximum(apart, 1).astype(np.float32) / np.float32(exact))
  far = ratio / np.float32(np.log(distance / exact)) * np.float32(each - exact)
  bucket = np.where(apart < exact, apart, np.minimum(exact + far.astype(np.int32), each - 1))
  return (bucket + each * (relative > 0)).astype(np.int32)


class Attention(nn.Module):
  """Self-attention with a bias on the scores, which are not divided by the root of head_dim."""

  config: T5EncoderConfig

  def setup(self):
    config = self.config
    projection = functools.partial(
      layers.Projection,
      (config.heads, config.head_dim),
      1,
      ('embed', 'heads', 'head_dim'),
      config.compute_dtype,
    )
    # The initial queries are smaller instead.
    self.project_query = projection(scale=1 / config.head_dim)
    self.project_key = projection()
    self.project_value = projection()
    self.project_out = layers.Projection(
      (config.width,), 2, ('heads', 'head_dim', 'embed'), config.compute_dtype
    )
    self.drop = layers.Dropout(config.dropout)

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, 'batch 1 1 length'],
    bias: Float[Array, 'heads length length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    names = ('activation_batch', 'activation_length', 'activation_heads', None)
    query, key, value = (
      nn.with_logical_constraint(projection(x), names)
      for projection in (self.project_query, self.project_key, self.project_value)
    )
    scores = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores + bias, jnp.finfo(jnp.float32).min)
    weights = self.drop(jax.nn.softmax(scores, axis=-1), dropout_keys)
    return self.project_out(jnp.einsum('bhqk,bkhd->bqhd', weights.astype(value.dtype), value))


class MLP(nn.Module):
  """Two projections with an activation between them; three if the activation is gated."""

  config: T5EncoderConfig

  def setup(self):
    config = self.config
    inwards = functools.partial(
      layers.Projection, (config.mlp_width,), 1, ('embed', 'mlp'), config.compute_dtype
    )
    self.project_in = inwards()
    if config.gated:
      self.project_gate = inwards()
    self.project_out = layers.Projection((config.width,), 1, ('mlp', 'embed'), config.compute_dtype)
    self.drop = layers.Dropout(config.dropout)

  def __call__(
    self, x: Float[Array, 'batch length embed'], dropout_keys: layers.DropoutKeys | None = None
  ) -> Float[Array, 'batch length embed']:
    activation = ACTIVATIONS[self.config.activation]
    if self.config.gated:
      hidden = activation(self.project_gate(x)) * self.project_in(x)
    else:
      hidden = activation(self.project_in(x))
    names = ('activation_batch', 'activation_length', 'activation_mlp')
    hidden = self.drop(nn.with_logical_constraint(hidden, names), dropout_keys)
    return self.project_out(hidden)


class Block(nn.Module):
  """Self-attention and MLP, each with a norm before it and a residual connection."""

  config: T5EncoderConfig

  def setup(self):
    self.attention_norm = layers.RMSNorm(self.config.compute_dtype, EPSILON)
    self.attention = Attention(self.config)
    self.mlp_norm = layers.RMSNorm(self.config.compute_dtype, EPSILON)
    self.mlp = MLP(self.config)
    self.drop = layers.Dropout(self.config.dropout)

  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, 'batch 1 1 length'],
    bias: Float[Array, 'heads length length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    keys = [layers.fold(dropout_keys, site) for site in range(4)]
    x = x + self.drop(self.attention(self.attention_norm(x), mask, bias, keys[0]), keys[1])
    x = x + self.drop(self.mlp(self.mlp_norm(x), keys[2]), keys[3])
    return nn.with_logical_constraint(x, layers.ACTIVATION)


class Encoder(nn.Module):
  """Blocks that share the relative position biases, and a final norm."""

  config: T5EncoderConfig

  def setup(self):
    self.block = Block(self.config, parent=None)
    # Bias of the attention scores by the relative position of query and key.
    self.relative_bias = layers.Embedding(
      self.config.relative_buckets,
      self.config.heads,
      ('relative_bucket', 'heads'),
      stddev=self.config.width**-0.5,
    )
    self.norm = layers.RMSNorm(self.config.compute_dtype, EPSILON)

  @nn.compact
  def __call__(
    self,
    x: Float[Array, 'batch length embed'],
    mask: Bool[Array, 'batch 1 1 length'],
    dropout_keys: layers.DropoutKeys | None = None,
  ) -> Float[Array, 'batch length embed']:
    config = self.config
    buckets = relative_buckets(x.shape[1], config.relative_buckets, config.relative_distance)
    bias_of = lambda table: jnp.moveaxis(jnp.take(table, buckets, axis=0), -1, 0)
    table: Any = self.relative_bias.table
    stacked = layer_stack.parameters(
      self, self.block, config.layers, x[:1], mask[:1], bias_of(table)
    )

    def layer(params, pattern_index, x, mask, keys):
      del pattern_index  # All layers are alike.
      params, table = params
      return self.block.apply({'params': params}, x, mask, bias_of(table), keys)

    if not self.is_initializing():
      # A layer in a pipeline gets only what has an axis of layers or of examples. The table is small
      # enough to give each layer a copy; the biases are not.
      tables = jnp.broadcast_to(table, (config.layers, *table.shape))
      stack = layer_stack.LayerStack(layer, config.remat, config.unroll)
      x = stack.run((stacked, tables), x, mask, dropout_keys)
    return self.norm(x)


class T5Encoder(nn.Module):
  """A bidirectional Transformer over SentencePiece tokens, with relative positions.

  Attributes:
    config: sizes.
  """

  config: T5EncoderConfig

  def setup(self):
    config = self.config
    self.token_embedding = layers.Embedding(config.text_vocabulary, config.width, stddev=1.0)
    self.encoder = Encoder(config)
    self.drop = layers.Dropout(config.dropout)

  def __call__(
    self,
    text_tokens: Int[Array, 'batch text_length'],
    dropout_keys: layers.DropoutKeys | None = None,
    masked: tuple[Bool[Array, 'batch text_length'], Float[Array, 'embed']] | None = None,
  ) -> Float[Array, 'batch text_length embed']:
    """Encodes texts.

    Args:
      text_tokens: text tokens, padded with 0, which no position attends to.
      dropout_keys: keys of the encoder; None if dropout is off.
      masked: for masked language modeling: True for each piece to replace, and the mask vector
        that replaces its embedding.

    Returns:
      The encoded tokens, of `config.compute_dtype`.
    """
    pieces = self.token_embedding(text_tokens)
    if masked is not None:
      hidden, vector = masked
      pieces = jnp.where(hidden[..., None], vector, pieces)
    x = pieces.astype(self.config.compute_dtype)
    x = self.drop(x, layers.fold(dropout_keys, _IN_EMBEDDING))
    keys = layers.fold(dropout_keys, _IN_LAYERS)
    x = self.encoder(x, dot_product_attention.text_mask(text_tokens), keys)
    return self.drop(x, layers.fold(dropout_keys, _IN_OUTPUT))


def example_inputs(config: T5EncoderConfig, batch: int = 1):
  """Returns an array with the shape and dtype of `T5Encoder`'s argument, for initialization."""
  return (jnp.ones((batch, config.text_length), jnp.int32),)

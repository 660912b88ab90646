"""Transformer blocks, and stacks of them scanned over layers."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from parti_jax.models import attention
from parti_jax.models import layers

# What the backward pass finds in memory instead of computing it again.
REMAT_POLICIES = {
    'everything': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'block_inputs': jax.checkpoint_policies.nothing_saveable,
}


def remat(body, policy: str):
  """Wraps a block's body so that its backward pass keeps what `policy` says.

  Args:
    body: function of a module and arrays.
    policy: 'everything' (no recomputation), 'dots' (outputs of the projections), or
      'block_inputs' (only the input of each block).

  Raises:
    ValueError: if there is no such policy.
  """
  if policy not in REMAT_POLICIES:
    raise ValueError(f'unknown remat policy {policy!r}; known: {", ".join(REMAT_POLICIES)}')
  if policy == 'everything':
    return body
  return nn.remat(body, policy=REMAT_POLICIES[policy], prevent_cse=False)


def scan_layers(body, length: int, unroll: int = 1, in_axes=0):
  """A body (module, carry, input) -> (carry, output), run over stacked layers.

  Parameters of all layers are one array with a leading axis `layers`.
  """
  return nn.scan(
      body, variable_axes={'params': 0}, split_rngs={'params': True, 'dropout': True},
      in_axes=in_axes, length=length, unroll=min(unroll, length),
      metadata_params={nn.PARTITION_NAME: 'layers'})


class EncoderBlock(nn.Module):
  """Self-attention and MLP, each behind a layer norm and beside a residual path.

  Attributes:
    width: model dimension `embed`.
    mlp_width: hidden dimension `mlp`.
    heads: attention heads.
    dropout: rate at the output of both halves.
    dtype: of the computation.
  """

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.attention_norm = layers.LayerNorm(self.dtype)
    self.attention = attention.SelfAttention(self.width, self.heads, self.dtype)
    self.mlp_norm = layers.LayerNorm(self.dtype)
    self.mlp = layers.MLP(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def __call__(self, x, mask=None, deterministic=True):
    """x: [batch, length, embed]; mask: bool [batch or 1, 1, length or 1, length]."""
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    x = x + self.drop(self.attention(self.attention_norm(x), mask), deterministic)
    x = x + self.drop(self.mlp(self.mlp_norm(x)), deterministic)
    return nn.with_logical_constraint(x, layers.ACTIVATION)


class DecoderBlock(nn.Module):
  """Causal self-attention, cross-attention to the text, MLP. Attributes as EncoderBlock."""

  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32

  def setup(self):
    self.attention_norm = layers.LayerNorm(self.dtype)
    self.attention = attention.SelfAttention(self.width, self.heads, self.dtype)
    self.cross_norm = layers.LayerNorm(self.dtype)
    self.cross_attention = attention.CrossAttention(self.width, self.heads, self.dtype)
    self.mlp_norm = layers.LayerNorm(self.dtype)
    self.mlp = layers.MLP(self.width, self.mlp_width, self.dtype)
    self.drop = layers.Dropout(self.dropout)

  def _feed_forward(self, x, deterministic):
    x = x + self.drop(self.mlp(self.mlp_norm(x)), deterministic)
    return nn.with_logical_constraint(x, layers.ACTIVATION)

  def __call__(self, x, encoded, mask, text_mask, deterministic=True):
    """All positions at once.

    Args:
      x: [batch, length, embed].
      encoded: [batch, text_length, embed].
      mask: bool [1, 1, length, length].
      text_mask: bool [batch, 1, 1, text_length].
      deterministic: whether dropout is off.
    """
    x = nn.with_logical_constraint(x, layers.ACTIVATION)
    x = x + self.drop(self.attention(self.attention_norm(x), mask), deterministic)
    memory = self.cross_attention.memory(encoded)
    attended = self.cross_attention(self.cross_norm(x), memory, text_mask)
    x = x + self.drop(attended, deterministic)
    return self._feed_forward(x, deterministic)

  def memory(self, encoded):
    """Keys and values of the text: two of [batch, heads, text_length, head_dim]."""
    return tuple(part.swapaxes(1, 2) for part in self.cross_attention.memory(encoded))

  def step(self, x, cache, memory, text_mask, position):
    """One position; arguments and result as SelfAttention.step, with the text's `memory`."""
    attended, cache = self.attention.step(self.attention_norm(x), cache, position)
    x = x + attended
    x = x + self.cross_attention.step(self.cross_norm(x), memory, text_mask)
    return self._feed_forward(x, True), cache


class Encoder(nn.Module):
  """Scanned encoder blocks and a last layer norm.

  Attributes:
    num_layers: number of blocks.
    remat: name in REMAT_POLICIES.
    unroll: how many layers are laid out in one turn of the scan.
    Others as EncoderBlock.
  """

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'everything'
  unroll: int = 1

  def setup(self):
    self.layers = EncoderBlock(self.width, self.mlp_width, self.heads, self.dropout, self.dtype)
    self.norm = layers.LayerNorm(self.dtype)

  def __call__(self, x, mask=None, deterministic=True):
    """x: [batch, length, embed]; mask: bool [batch or 1, 1, length or 1, length]. As x."""

    def body(block, x, _):
      return block(x, mask, deterministic), None

    x, _ = scan_layers(remat(body, self.remat), self.num_layers, self.unroll)(
        self.layers, x, None)
    return self.norm(x)


class Decoder(nn.Module):
  """Scanned decoder blocks and a last layer norm. Attributes as Encoder."""

  num_layers: int
  width: int
  mlp_width: int
  heads: int
  dropout: float = 0.0
  dtype: jnp.dtype = jnp.float32
  remat: str = 'everything'
  unroll: int = 1

  def setup(self):
    self.layers = DecoderBlock(self.width, self.mlp_width, self.heads, self.dropout, self.dtype)
    self.norm = layers.LayerNorm(self.dtype)

  def __call__(self, x, encoded, mask, text_mask, deterministic=True):
    """All positions at once; arguments as DecoderBlock. Returns [batch, length, embed]."""

    def body(block, x, _):
      return block(x, encoded, mask, text_mask, deterministic), None

    x, _ = scan_layers(remat(body, self.remat), self.num_layers, self.unroll)(
        self.layers, x, None)
    return self.norm(x)

  def _block(self):
    """One block that is not part of the stack; its parameters are given when it is applied."""
    return DecoderBlock(
        self.width, self.mlp_width, self.heads, self.dropout, self.dtype, parent=None)

  def start(self, encoded):
    """What every step needs, computed once for all positions.

    The blocks' parameters are taken apart here: a step that sliced them out of the stack would
    copy them all at every position, which costs as much as the step itself.

    Args:
      encoded: [batch, text_length, embed].

    Returns:
      A list with, for each layer, its parameters and its memory: the text's keys and values,
      [batch, heads, text_length, head_dim] each.
    """
    stacked = nn.meta.unbox(self.variables['params']['layers'])
    blocks = []
    for layer in range(self.num_layers):
      params = jax.tree.map(lambda leaf, layer=layer: leaf[layer], stacked)
      memory = self._block().apply({'params': params}, encoded, method='memory')
      blocks.append((params, memory))
    return blocks

  def step(self, x, caches, blocks, text_mask, position):
    """One position through all layers.

    Args:
      x: [batch, 1, embed].
      caches: a list with, for each layer, keys and values
        [batch, heads, length, head_dim].
      blocks: of `start()`.
      text_mask: bool [batch, 1, 1, text_length].
      position: int32 [].

    Returns:
      The output [batch, 1, embed] and the caches with this position written.
    """
    written = []
    for cache, (params, memory) in zip(caches, blocks, strict=True):
      x, cache = self._block().apply(
          {'params': params}, x, cache, memory, text_mask, position, method='step')
      written.append(cache)
    return self.norm(x), written

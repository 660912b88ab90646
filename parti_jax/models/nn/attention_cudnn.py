"""Attention by cuDNN's fused kernel on NVIDIA GPUs, which keeps the scores on the chip.

The kernel takes causal attention and attention to the first keys of a sequence. Other patterns keep
the forms in `dot_product_attention.py`, which don't compute what the pattern masks.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Int

from parti_jax.models.nn import attention_patterns
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.partitioning import rules as rules_lib

# What cuDNN supports for the forward and the backward pass on every GPU from Ampere on:
# https://docs.nvidia.com/deeplearning/cudnn/frontend/latest/operations/Attention.html
_LEAST_CAPABILITY = (8, 0)
_LARGEST_HEAD = 128
_HEAD_MULTIPLE = 8
# Shorter sequences have few scores to store, and cuDNN before version 9 refuses them.
_LEAST_LENGTH = 64
_DTYPES = (jnp.bfloat16, jnp.float16)


def cudnn_fits(
  platform: str,
  capability: tuple[int, int] | None,
  dtype: DTypeLike,
  length: int,
  key_length: int,
  head_dim: int,
  pattern: attention_patterns.AttentionPattern | None = None,
) -> bool:
  """Returns whether cuDNN can compute attention on a device.

  Args:
    platform: platform of the device.
    capability: its CUDA compute capability; None if it has none.
    dtype: dtype of queries, keys and values.
    length: number of queries.
    key_length: number of keys.
    head_dim: size of a head.
    pattern: the pattern of self-attention; None for attention to all keys.
  """
  return (
    platform == 'gpu'
    and capability is not None
    and capability >= _LEAST_CAPABILITY
    and jnp.dtype(dtype) in _DTYPES
    and min(length, key_length) >= _LEAST_LENGTH
    and head_dim % _HEAD_MULTIPLE == 0
    and head_dim <= _LARGEST_HEAD
    and (pattern is None or pattern.name == 'global')
  )


def fits(
  query: Float[Array, 'batch query_length heads head_dim'],
  key: Float[Array, 'batch key_length heads head_dim'],
  pattern: attention_patterns.AttentionPattern | None = None,
) -> bool:
  """Returns whether `attend` can compute attention of these sizes on the current mesh.

  Args:
    query: queries.
    key: keys.
    pattern: the pattern of self-attention; None for attention to all keys.
  """
  platform = mesh_lib.platform()
  capability = mesh_lib.compute_capability() if platform == 'gpu' else None
  batch, length, heads, head_dim = query.shape
  return (
    cudnn_fits(platform, capability, query.dtype, length, key.shape[1], head_dim, pattern)
    and batch % rules_lib.ways('activation_batch') == 0
    and heads % rules_lib.ways('activation_heads') == 0
  )


def attend(
  query: Float[Array, 'batch query_length heads head_dim'],
  key: Float[Array, 'batch key_length heads head_dim'],
  value: Float[Array, 'batch key_length heads head_dim'],
  key_mask: Bool[Array, '#batch 1 1 key_length'] | None = None,
  causal: bool = False,
  implementation: Literal['cudnn', 'xla'] = 'cudnn',
) -> Float[Array, 'batch query_length heads head_dim']:
  """`dot_product_attention.attend` with a mask of the keys, or causal.

  Args:
    query: queries.
    key: keys.
    value: values.
    key_mask: True where a key may be attended to: the first ones of each example; None for all.
      Queries that may attend to no key attend to all of them evenly.
    causal: whether a query attends only to keys up to its own position.
    implementation: that of `jax.nn.dot_product_attention`; 'xla' works on any platform.
  """
  lengths = None
  if key_mask is not None:
    lengths = jnp.sum(key_mask[:, 0, 0], axis=-1, dtype=jnp.int32)
    lengths = jnp.broadcast_to(lengths, key.shape[:1])
    # The kernel needs at least one key. Queries of 0 weigh all keys evenly.
    query = jnp.where((lengths > 0)[:, None, None, None], query, 0)
    lengths = jnp.where(lengths > 0, lengths, key.shape[1])
  local = functools.partial(_attend, causal=causal, implementation=implementation)
  if mesh_lib.current() is not None:
    # Each device computes its own examples and heads.
    part = rules_lib.spec('activation_batch', None, 'activation_heads', None)
    local = jax.shard_map(
      local,
      in_specs=(part, part, part, rules_lib.spec('activation_batch')),
      out_specs=part,
      check_vma=False,
      axis_names=rules_lib.free_axes(),
    )
  return local(query, key, value, lengths)


def _attend(
  query: Float[Array, 'batch query_length heads head_dim'],
  key: Float[Array, 'batch key_length heads head_dim'],
  value: Float[Array, 'batch key_length heads head_dim'],
  lengths: Int[Array, 'batch'] | None,
  causal: bool,
  implementation: Literal['cudnn', 'xla'],
) -> Float[Array, 'batch query_length heads head_dim']:
  """Attention on one device, to the first `lengths` keys of each example."""
  return jax.nn.dot_product_attention(
    query,
    key,
    value,
    is_causal=causal,
    key_value_seq_lengths=lengths,
    implementation=implementation,
  )

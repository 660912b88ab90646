"""Computes FLOPs of the attention kernel, which its program doesn't state.

Splash attention computes whole blocks of queries and keys, and skips blocks that the pattern masks
completely. So its FLOPs follow from the pattern and the block sizes.
"""

from __future__ import annotations

import numpy as np

from parti_jax.models.nn import attention
from parti_jax.models.nn import attention_patterns
from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import hlo_text

SOURCE = 'FLOPs of attention kernels: computed from the blocks that the pattern leaves'


def splash_flops(patterns: tuple[attention_patterns.AttentionPattern, ...]) -> hlo_cost.KernelFlops:
  """Returns a function for `hlo_cost.costs` that returns the FLOPs of a kernel.

  Args:
    patterns: patterns of the decoder's layers; a kernel's scope names its pattern.
  """
  masks = {attention.KERNEL_SCOPE + pattern.name: pattern.ordered_mask for pattern in patterns}

  def flops(instruction: hlo_text.Instruction, operands: list[hlo_text.Shape]) -> float | None:
    name = instruction.op_name
    query = next((shape for shape in operands if len(shape.dims) == 4), None)
    mask = next((mask for scope, mask in masks.items() if scope in name), None)
    if 'splash' not in name or query is None or mask is None or query.dims[2] != len(mask):
      return None
    forward = 'splash_mha_fwd' in name
    side = lambda key: int(instruction.attribute(rf'\b{key}\\*": (\d+)') or len(mask))
    keys = ('block_q', 'block_kv_compute') if forward else ('block_q_dkv', 'block_kv_dkv_compute')
    rows, columns = map(side, keys)
    batch, heads, _, head_dim = query.dims
    blocks = _blocks_with_work(mask, rows, columns)
    product = 2.0 * batch * heads * blocks * rows * columns * head_dim
    return product * _products(name, instruction)

  return flops


def _products(name: str, instruction: hlo_text.Instruction) -> int:
  """Returns the matrix products per block: scores and values forward, the gradients backward."""
  if 'splash_mha_fwd' in name:
    return 2
  if 'splash_mha_dq' in name:
    return 3
  # One kernel may compute all three gradients; then it computes scores and their gradient once.
  gradients = [shape for shape in instruction.shape.arrays() if len(shape.dims) >= 4]
  return 5 if len(gradients) == 3 else 4


def _blocks_with_work(mask: np.ndarray, rows: int, columns: int) -> int:
  length = len(mask)
  blocks = mask.reshape(length // rows, rows, length // columns, columns)
  return int(blocks.any(axis=(1, 3)).sum())

"""Counts FLOPs of matrix products and convolutions in HLO.

The TPU's compiler turns products into convolutions, and batch dimensions into windows with dilated
inputs. So only the positions count where a window meets an element of the input, not padding or
the holes of dilation. Elementwise work isn't counted; it runs in parallel with the matrix units.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from parti_jax.planning.hlo import hlo_text


@dataclasses.dataclass(frozen=True)
class Window:
  """XLA's window of a convolution along one spatial dimension."""

  size: int
  stride: int = 1
  low: int = 0
  high: int = 0
  base_dilation: int = 1
  dilation: int = 1


def product_flops(instruction: hlo_text.Instruction, computation: hlo_text.Computation) -> float:
  """Returns the FLOPs of a `dot` or a `convolution`; 0 for other instructions.

  Args:
    instruction: an instruction of `computation`.
    computation: the computation, for the shapes of the operands.
  """
  if instruction.opcode == 'dot':
    left = computation[instruction.operands[0]].shape
    contracted = instruction.attribute(r'lhs_contracting_dims=\{([\d,]*)\}') or ''
    depth = 1
    for dimension in filter(None, contracted.split(',')):
      depth *= left.dims[int(dimension)]
    return 2.0 * instruction.shape.size * depth
  if instruction.opcode == 'convolution':
    shapes = [computation[name].shape for name in instruction.operands]
    return _convolution_flops(instruction, *shapes)
  return 0.0


def _convolution_flops(
  instruction: hlo_text.Instruction, inputs: hlo_text.Shape, kernel: hlo_text.Shape
) -> float:
  labels = instruction.attribute(r'dim_labels=([^,\s]+)')
  if labels is None:
    raise ValueError(f'HLO instruction {instruction.name} has no dim_labels')
  input_labels, kernel_labels, output_labels = re.split(r'_|->', labels)
  batch = inputs.dims[input_labels.index('b')]
  features = kernel.dims[kernel_labels.index('i')]  # Those of one feature group.
  out_features = kernel.dims[kernel_labels.index('o')]
  batch_groups = int(instruction.attribute(r'batch_group_count=(\d+)') or 1)
  pairs = 1
  for dimension, window in enumerate(_windows(instruction.attributes)):
    pairs *= _meetings(
      inputs.dims[input_labels.index(str(dimension))],
      instruction.shape.dims[output_labels.index(str(dimension))],
      window,
    )
  return 2.0 * features * out_features * (batch // batch_groups) * pairs


def _windows(attributes: str) -> list[Window]:
  """Returns the windows of all spatial dimensions."""
  text = re.search(r'window=\{([^}]*)\}', attributes)
  if not text:
    return []
  fields = dict(field.split('=') for field in text.group(1).split())
  numbers = lambda name: [int(n) for n in fields[name].split('x')] if name in fields else None
  sizes = numbers('size') or []
  ones = [1] * len(sizes)
  padding = (
    [tuple(map(int, pad.split('_'))) for pad in fields['pad'].split('x')]
    if 'pad' in fields
    else [(0, 0)] * len(sizes)
  )
  return [
    Window(size, stride, low, high, base, dilation)
    for size, stride, (low, high), base, dilation in zip(
      sizes,
      numbers('stride') or ones,
      padding,
      numbers('lhs_dilate') or ones,
      numbers('rhs_dilate') or ones,
    )
  ]


@functools.cache
def _meetings(length: int, out_length: int, window: Window) -> int:
  """Counts the pairs of a window element and an output that meet an element of the input."""
  dilated = (length - 1) * window.base_dilation + 1
  count = 0
  for element in range(window.size):
    for out in range(out_length):
      position = out * window.stride - window.low + element * window.dilation
      count += 0 <= position < dilated and position % window.base_dilation == 0
  return count

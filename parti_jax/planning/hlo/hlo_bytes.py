"""Counts the bytes that HLO instructions move between a device and its main memory.

An instruction reads its operands and writes its result. Arrays in on-chip memory don't count. If
an operand is sliced or gathered from, only the slices count; if a result is written in place, only
the update counts.
"""

from __future__ import annotations

from collections.abc import Sequence

from parti_jax.planning.hlo import hlo_text

# Instructions that move nothing: they name, regroup or wait.
_FREE = {
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'after-all',
  'partition-id',
  'replica-id',
  'add-dependency',
  'opt-barrier',
  'optimization-barrier',
  'domain',
  'while',
  'conditional',
  'call',
  'get-dimension-size',
  'rng-get-and-update-state',
}
# Custom calls of the TPU's compiler that move nothing.
_FREE_CALLS = {
  'AllocateBuffer',
  'ConcatBitcast',
  'AsyncCollectiveStart',
  'AsyncCollectiveDone',
  'AssumeGatherIndicesInBound',
  'GatherScatterIndicesBitpacked',
  'Sharding',
  'SPMDFullToShardShape',
  'SPMDShardToFullShape',
  'MoveToHost',
  'MoveToDevice',
  'annotate_device_placement',
}
_SLICES = ('slice', 'dynamic-slice', 'gather')
_UPDATES = {'dynamic-update-slice': 1, 'scatter': 2}  # opcode -> index of the update's operand.
COLLECTIVES = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)


def is_part_of_chain(instruction: hlo_text.Instruction) -> bool:
  """Returns whether a collective is split over several fusions, to overlap with their work."""
  return instruction.opcode in COLLECTIVES and 'chain_id' in instruction.attributes


class Traffic:
  """Counts bytes in one memory space.

  Args:
    module: the program.
    memory_space: the memory space, such as `hlo_text.MAIN_MEMORY`.
  """

  def __init__(self, module: hlo_text.Module, memory_space: int = hlo_text.MAIN_MEMORY):
    self._module, self._space = module, memory_space
    self._reads: dict[tuple[str, int], float | None] = {}

  def of(self, instruction: hlo_text.Instruction, computation: hlo_text.Computation) -> float:
    """Returns the bytes that one execution of an instruction outside of fusions moves."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(('-done', '-update')):
      return 0.0
    if opcode == 'custom-call' and _target(instruction) in _FREE_CALLS:
      return 0.0
    names = instruction.operands
    if opcode == 'custom-call':
      names = tuple(
        dict.fromkeys(names)
      )  # A kernel may get parts of one array as several operands.
    operands = [computation[name].shape for name in names]
    if opcode == 'fusion':
      return self._of_fusion(instruction, operands)
    if opcode in ('send', 'recv'):
      return self._bytes(instruction.shape.elements[0])
    if opcode.endswith('-start'):
      return self._of_start(instruction, operands)
    if opcode in _SLICES:
      return self._bytes_as(instruction.shape, operands[0]) + self._bytes(instruction.shape)
    if opcode in _UPDATES:
      update = operands[_UPDATES[opcode]]
      return self._bytes(update) + self._bytes_as(update, instruction.shape)
    return sum(map(self._bytes, operands)) + self._bytes(instruction.shape)

  def _bytes(self, shape: hlo_text.Shape) -> float:
    return shape.padded_bytes(self._space)

  def _bytes_as(self, part: hlo_text.Shape, whole: hlo_text.Shape) -> float:
    """Returns the bytes of `part`, or 0 if `whole` is in another memory space."""
    return part.padded_bytes() if whole.memory_space == self._space else 0.0

  def _of_start(self, instruction: hlo_text.Instruction, operands: list[hlo_text.Shape]) -> float:
    """Returns the bytes of an asynchronous copy or slice: a tuple of operand, result, signals."""
    if instruction.opcode.removesuffix('-start') in COLLECTIVES:
      return sum(map(self._bytes, operands)) + self._bytes(_start_result(instruction))
    arrays = [
      array for element in instruction.shape.elements for array in element.arrays() if array.dims
    ]
    if instruction.opcode == 'copy-start':
      return self._bytes(arrays[0]) + self._bytes(operands[0])
    moved = min(arrays, key=lambda array: array.padded_bytes())
    return (
      self._bytes(arrays[-1])
      if len(arrays) == 1
      else (self._bytes_as(moved, operands[0]) + self._bytes_as(moved, arrays[-1]))
    )

  def _of_fusion(self, instruction: hlo_text.Instruction, operands: list[hlo_text.Shape]) -> float:
    fused = self._module.called(instruction, 'calls')
    if fused.root.opcode == 'custom-call' and _target(fused.root) == 'AsyncCollectiveDone':
      return 0.0  # The start counts operand and result.
    if fused.root.opcode == 'custom-call' and _target(fused.root) == 'AsyncCollectiveStart':
      return self._bytes(instruction.shape)
    total = 0.0
    for number, operand in enumerate(operands):
      read = self._read(fused, number)
      for array in operand.arrays():
        if array.memory_space == self._space:
          full = array.padded_bytes()
          total += full if read is None else min(read, full)
    outer: Sequence[hlo_text.Shape] = [instruction.shape]
    results: Sequence[str] = [fused.root_name]
    if fused.root.opcode == 'tuple':
      outer, results = instruction.shape.elements, fused.root.operands
    return total + sum(self._written(fused, name, shape) for name, shape in zip(results, outer))

  def _read(self, fused: hlo_text.Computation, number: int) -> float | None:
    """Returns the bytes of a parameter that a fusion reads; None for all of them."""
    key = (fused.name, number)
    if key not in self._reads:
      parameter = fused.parameters.get(number)
      self._reads[key] = self._used_bytes(fused, parameter) if parameter else 0.0
    return self._reads[key]

  def _used_bytes(self, fused: hlo_text.Computation, value: hlo_text.Instruction) -> float | None:
    """Returns the bytes of `value` that a fusion reads; None for all of them."""
    total = 0.0
    part: float | None
    for user in fused.users.get(value.name, ()):
      if user.opcode in _SLICES and user.operands[0] == value.name:
        part = user.shape.padded_bytes()
      elif user.opcode in _UPDATES and value.name not in user.operands[1:]:
        part = 0.0  # Written in place.
      elif user.opcode == 'tuple' or is_part_of_chain(user):
        part = 0.0  # Passed on, or counted with the collective's start.
      elif user.opcode in ('bitcast', 'get-tuple-element'):
        part = self._used_bytes(fused, user)
      elif user.opcode == 'fusion':
        part = self._used_by_inner(fused, user, value.name)
      else:
        part = None
      if part is None:
        return None
      total += part
    return total

  def _used_by_inner(
    self, fused: hlo_text.Computation, fusion: hlo_text.Instruction, name: str
  ) -> float | None:
    """Returns the bytes of the value `name` that a fusion within a fusion reads; None for all."""
    inner = self._module.called(fusion, 'calls')
    parts = [
      self._read(inner, index) for index, operand in enumerate(fusion.operands) if operand == name
    ]
    source = inner.root
    while source.opcode == 'bitcast':
      source = inner[source.operands[0]]
    if source.opcode == 'parameter' and fusion.operands[source.number] == name:
      # The inner fusion passes the value on under another name.
      parts.append(self._used_bytes(fused, fusion))
    known = [part for part in parts if part is not None]
    return sum(known) if len(known) == len(parts) else None

  def _written(self, fused: hlo_text.Computation, name: str, outer: hlo_text.Shape) -> float:
    """Returns the bytes that a fusion writes for a result with the shape and memory of `outer`."""
    if outer.dtype == 'tuple':
      return self._bytes(outer)
    result = fused[name]
    while result.opcode == 'bitcast':
      result = fused[result.operands[0]]
    if result.opcode in _UPDATES:
      return self._bytes_as(fused[result.operands[_UPDATES[result.opcode]]].shape, outer)
    if result.opcode == 'fusion':
      inner = self._module.called(result, 'calls')
      return self._written(inner, inner.root_name, outer)
    if result.opcode == 'parameter' or is_part_of_chain(result):
      return 0.0
    return self._bytes(outer)


def _start_result(instruction: hlo_text.Instruction) -> hlo_text.Shape:
  """Returns the result in the tuple of a collective's start: (operands, results, signals ...)."""
  elements = instruction.shape.elements
  return elements[1] if len(elements) > 1 else instruction.shape


def _target(instruction: hlo_text.Instruction) -> str:
  return instruction.attribute(r'custom_call_target="([^"]*)"') or ''

"""Parses the text of a compiled HLO module into instructions with shapes.

It keeps only what the costs depend on: names, shapes with their layouts, operands, and the text of
the attributes. The grammar is that of XLA's HLO text format.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_ITEM_BITS = {'pred': 8, 'bf16': 16, 'c64': 64, 'c128': 128, 'token': 0, 'opaque': 0}
# Memory spaces, S(n) in a layout: 0, the default, is the device's main memory and 5 the host's.
# The others (VMEM, CMEM, SMEM and so on) are on the chip.
MAIN_MEMORY, HOST_MEMORY = 0, 5

_ARRAY = re.compile(r'([a-z][a-z0-9]*)\[([^\]]*)\](?:\{([^}]*)\})?')
_NAME = re.compile(r'%([\w.\-]+)')
_COMPUTATION = re.compile(r'(ENTRY )?%([\w.\-]+) \(.*\{$')
_END = re.compile(r'\}(, execution_thread="[^"]*")?')
_INSTRUCTION = re.compile(r'\s*(ROOT )?%([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([a-z][\w\-]*)\(')
_COMMENT = re.compile(r'/\*.*?\*/')


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of an array or a tuple.

  Attributes:
    dtype: name of the element type; 'tuple' for a tuple.
    dims: sizes of an array's dimensions.
    minor_to_major: order of the dimensions in memory, the fastest one first.
    tile: the first tiling of the layout, over the fastest dimensions; empty for none.
    memory_space: n of S(n).
    elements: shapes of a tuple's elements.
  """

  dtype: str
  dims: tuple[int, ...] = ()
  minor_to_major: tuple[int, ...] = ()
  tile: tuple[int, ...] = ()
  memory_space: int = 0
  elements: tuple[Shape, ...] = ()

  @property
  def size(self) -> int:
    """Number of an array's elements."""
    return math.prod(self.dims)

  @functools.cached_property
  def item_bytes(self) -> float:
    """Bytes of an element; a fraction for types smaller than a byte."""
    if self.dtype in _ITEM_BITS:
      return _ITEM_BITS[self.dtype] / 8
    bits = re.search(r'\d+', self.dtype)
    if bits is None:
      raise ValueError(f'HLO: unknown element type {self.dtype!r}')
    return int(bits.group()) / 8

  def arrays(self) -> Iterator[Shape]:
    """Yields the arrays in the shape, including those of nested tuples."""
    if self.dtype == 'tuple':
      for element in self.elements:
        yield from element.arrays()
    else:
      yield self

  def logical_bytes(self) -> float:
    """Returns the bytes of all elements, without padding."""
    return sum(array.size * array.item_bytes for array in self.arrays())

  def padded_bytes(self, memory_space: int | None = None) -> float:
    """Returns the bytes in memory, including the padding of the layout's tiles.

    Args:
      memory_space: count only arrays in this memory space; None for all.
    """
    return sum(
      array._array_bytes() for array in self.arrays() if memory_space in (None, array.memory_space)
    )

  def _array_bytes(self) -> float:
    dims = list(self.dims)
    order = self.minor_to_major
    for size, dimension in zip(reversed(self.tile), order):
      dims[dimension] = -(-dims[dimension] // size) * size
    return math.prod(dims) * self.item_bytes


@dataclasses.dataclass
class Instruction:
  """An instruction of a computation.

  Attributes:
    name: name without %.
    opcode: opcode, such as 'fusion'.
    shape: shape of the result.
    operands: names of the operands, in the same computation.
    literal: the text between the opcode's brackets, such as a parameter's number.
    attributes: the text after the operands.
  """

  name: str
  opcode: str
  shape: Shape
  operands: tuple[str, ...]
  literal: str
  attributes: str

  def attribute(self, pattern: str) -> str | None:
    """Returns the first group of a pattern in the attributes."""
    found = re.search(pattern, self.attributes)
    return found and found.group(1)

  @functools.cached_property
  def number(self) -> int:
    """A parameter's number, or the index of a get-tuple-element."""
    text = self.literal if self.opcode == 'parameter' else self.attribute(r'index=(\d+)')
    if text is None:
      raise ValueError(f'HLO instruction {self.name} has no index')
    return int(text)

  @property
  def op_name(self) -> str:
    """The instruction's origin in the traced program."""
    return self.attribute(r'op_name="([^"]*)"') or self.name


@dataclasses.dataclass
class Computation:
  """A computation: a sequence of instructions.

  Attributes:
    name: name without %.
    instructions: name -> Instruction, in their order.
    root_name: name of the instruction with the computation's result; it need not be the last one.
  """

  name: str
  instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
  root_name: str = ''

  def __getitem__(self, name: str) -> Instruction:
    return self.instructions[name]

  @property
  def root(self) -> Instruction:
    """The instruction with the computation's result."""
    return self.instructions[self.root_name]

  @functools.cached_property
  def parameters(self) -> dict[int, Instruction]:
    """Parameters by number."""
    return {i.number: i for i in self.instructions.values() if i.opcode == 'parameter'}

  @functools.cached_property
  def users(self) -> dict[str, list[Instruction]]:
    """Instructions by the names of their operands."""
    users: dict[str, list[Instruction]] = {}
    for instruction in self.instructions.values():
      for operand in dict.fromkeys(instruction.operands):
        users.setdefault(operand, []).append(instruction)
    return users


@dataclasses.dataclass
class Module:
  """A compiled program.

  Attributes:
    computations: the computations by name.
    entry: the computation where the program begins.
  """

  computations: dict[str, Computation]
  entry: Computation

  def __getitem__(self, name: str) -> Computation:
    return self.computations[name]

  def called(self, instruction: Instruction, *attributes: str) -> Computation:
    """Returns the computation that an instruction calls.

    Args:
      instruction: the instruction.
      *attributes: attributes that may hold the name of the computation, such as 'calls'.

    Raises:
      ValueError: if the instruction has none of these attributes.
    """
    for attribute in attributes:
      name = instruction.attribute(rf'\b{attribute}=%([\w.\-]+)')
      if name is not None:
        return self[name]
    raise ValueError(f'HLO instruction {instruction.name} has no attribute {attributes[0]}')


def parse(text: str) -> Module:
  """Parses the text of a module, the result of `compiled.as_text()`.

  Raises:
    ValueError: if there is no entry computation, or a line can't be parsed.
  """
  computations: dict[str, Computation] = {}
  current: Computation | None = None
  entry: Computation | None = None
  for line in _logical_lines(text):
    if header := _COMPUTATION.match(line):
      current = computations[header.group(2)] = Computation(header.group(2))
      entry = current if header.group(1) else entry
    elif match := _INSTRUCTION.match(line):
      assert current is not None  # `_logical_lines` begins with a header.
      instruction = _instruction(match.group(2), _COMMENT.sub('', line[match.end() :]))
      current.instructions[instruction.name] = instruction
      if match.group(1):
        current.root_name = instruction.name
  if entry is None:
    raise ValueError('the HLO text has no ENTRY computation')
  return Module(computations, entry)


def _logical_lines(text: str) -> Iterator[str]:
  """Yields headers and instructions as one line each; kernels' attributes may span several."""
  parts: list[str] = []
  inside = False
  for line in text.splitlines():
    ends = _END.fullmatch(line)
    if parts and (ends or _INSTRUCTION.match(line)):
      yield ' '.join(parts)
      parts = []
    if ends:
      inside = False
    elif inside:
      parts.append(line)
    elif _COMPUTATION.match(line):
      inside = True
      yield line


def _instruction(name: str, text: str) -> Instruction:
  shape, end = _shape(text, 0)
  opcode = _OPCODE.match(text, end)
  if not opcode:
    raise ValueError(f'HLO instruction {name}: no opcode in {text[end : end + 80]!r}')
  close = _closing(text, opcode.end() - 1)
  literal = text[opcode.end() : close]
  operands = () if opcode.group(1) in ('parameter', 'constant') else _NAME.findall(literal)
  return Instruction(name, opcode.group(1), shape, tuple(operands), literal, text[close + 1 :])


def _closing(text: str, start: int) -> int:
  """Returns the position where the bracket that opens at `start` closes."""
  depth, quoted = 0, False
  for found in re.compile(r'[()"]').finditer(text, start):
    mark = found.group()
    if mark == '"':
      quoted = not quoted
    elif not quoted:
      depth += 1 if mark == '(' else -1
      if depth == 0:
        return found.start()
  raise ValueError(f'HLO: no closing bracket in {text[start : start + 80]!r}')


def _shape(text: str, start: int) -> tuple[Shape, int]:
  """Returns the shape at `start`, and the position where it ends."""
  if text[start] != '(':
    return _array_shape(text, start)
  elements, position = [], start + 1
  while text[position] != ')':
    if text[position] in ', ':
      position += 1
      continue
    element, position = _shape(text, position)
    elements.append(element)
  return Shape('tuple', elements=tuple(elements)), position + 1


def _array_shape(text: str, start: int) -> tuple[Shape, int]:
  found = _ARRAY.match(text, start)
  if not found:
    raise ValueError(f'HLO: no shape in {text[start : start + 80]!r}')
  return _parsed_array(*found.groups()), found.end()


@functools.cache
def _parsed_array(dtype: str, sizes: str, layout: str | None) -> Shape:
  dims = tuple(int(size.removeprefix('<=')) for size in sizes.split(',') if size)
  order, _, details = (layout or '').partition(':')
  minor_to_major = tuple(map(int, filter(None, order.split(','))))
  tile = re.match(r'T\(([\d,]+)\)', details)
  space = re.search(r'S\((\d+)\)', details)
  return Shape(
    dtype,
    dims,
    minor_to_major or tuple(reversed(range(len(dims)))),
    tuple(map(int, tile.group(1).split(','))) if tile else (),
    int(space.group(1)) if space else MAIN_MEMORY,
  )

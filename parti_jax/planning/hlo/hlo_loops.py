"""Finds the trip counts of loops in an HLO program.

XLA writes `known_trip_count` if it has kept it. The TPU's compiler doesn't, so this module derives
the count from the loop itself: a counter that begins at a constant, grows by a constant and is
compared with a constant.
"""

from __future__ import annotations

from parti_jax.planning.hlo import hlo_text

# Known constants in a tuple: index -> value.
Constants = dict[int, int]

_SAME_VALUE = ('copy', 'convert', 'bitcast', 'reshape')


def constant(computation: hlo_text.Computation, name: str, known: Constants) -> int | None:
  """Returns the value of an integer if it is a constant, else None.

  Args:
    computation: the computation of the instruction.
    name: the instruction's name.
    known: constants in the computation's parameter, if that is a loop's tuple.
  """
  instruction = _source(computation, name)
  if instruction.opcode == 'constant':
    return int(instruction.literal) if instruction.literal.lstrip('-').isdigit() else None
  if instruction.opcode == 'get-tuple-element':
    if computation[instruction.operands[0]].opcode == 'parameter':
      return known.get(instruction.number)
  return None


def loop_constants(
  loop: hlo_text.Instruction,
  computation: hlo_text.Computation,
  module: hlo_text.Module,
  known: Constants,
) -> Constants:
  """Returns the constants in a loop's tuple that its body doesn't change."""
  elements = _tuple_elements(computation, loop.operands[0])
  body = module.called(loop, 'body')
  results = _tuple_elements(body, body.root_name)
  found = {}
  for index, name in enumerate(elements):
    value = constant(computation, name, known)
    if value is not None and index < len(results) and _is_element(body, results[index], index):
      found[index] = value
  return found


def trip_count(
  loop: hlo_text.Instruction,
  computation: hlo_text.Computation,
  module: hlo_text.Module,
  known: Constants,
) -> int | None:
  """Returns the trip count of a `while`; None if it can't be determined.

  Args:
    loop: the instruction.
    computation: the computation of the instruction.
    module: the program.
    known: constants in the computation's parameter.
  """
  stated = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
  if stated is not None:
    return int(stated)
  condition, body = module.called(loop, 'condition'), module.called(loop, 'body')
  compared = _comparison(condition, module)
  elements = _tuple_elements(computation, loop.operands[0])
  if compared is None or not elements:
    return None
  counter, limit, inclusive = compared
  inside = loop_constants(loop, computation, module, known)
  stop = constant(condition, limit, inside)
  start = constant(computation, elements[counter], known)
  step = _increment(body, counter)
  if stop is None or start is None or step is None or step <= 0:
    return None
  return max(0, -(-(stop + inclusive - start) // step))


def _comparison(
  condition: hlo_text.Computation, module: hlo_text.Module
) -> tuple[int, str, int] | None:
  """Returns the counter's index, the limit's name, and 1 if the limit is inclusive, else 0."""
  root = condition.root
  compared: list[str | None] = list(root.operands)
  if root.opcode == 'fusion':
    inner, outer_names = module.called(root, 'calls'), root.operands
    root = inner.root
    operands = [inner[name] for name in root.operands]
    compared = [
      outer_names[operand.number] if operand.opcode == 'parameter' else None for operand in operands
    ]
  direction = root.attribute(r'direction=(\w+)')
  if root.opcode != 'compare' or direction not in ('LT', 'LE', 'GT', 'GE'):
    return None
  left, right = compared
  if direction in ('GT', 'GE'):
    left, right = right, left
  if left is None or right is None:
    return None
  counter = _source(condition, left)
  if counter.opcode != 'get-tuple-element':
    return None
  return counter.number, right, int(direction in ('LE', 'GE'))


def _increment(body: hlo_text.Computation, counter: int) -> int | None:
  results = _tuple_elements(body, body.root_name)
  added = _source(body, results[counter]) if counter < len(results) else None
  if added is None or added.opcode != 'add':
    return None
  steps = [constant(body, name, {}) for name in added.operands]
  others = [name for name, step in zip(added.operands, steps) if step is None]
  if len(others) != 1 or not _is_element(body, others[0], counter):
    return None
  return next(step for step in steps if step is not None)


def _source(computation: hlo_text.Computation, name: str) -> hlo_text.Instruction:
  instruction = computation[name]
  while instruction.opcode in _SAME_VALUE:
    instruction = computation[instruction.operands[0]]
  return instruction


def _tuple_elements(computation: hlo_text.Computation, name: str) -> tuple[str, ...]:
  instruction = computation[name]
  return instruction.operands if instruction.opcode == 'tuple' else ()


def _is_element(body: hlo_text.Computation, name: str, index: int) -> bool:
  """Returns whether an instruction is an unchanged element of the body's parameter."""
  source = _source(body, name)
  return (
    source.opcode == 'get-tuple-element'
    and source.number == index
    and body[source.operands[0]].opcode == 'parameter'
  )

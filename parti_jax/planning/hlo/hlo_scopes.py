"""Sums the traffic of a program by module and pass.

The name of an instruction's origin lists the transformations and scopes around it, such as
'jit(step)/transpose(jvp(Parti))/decoder/while/body/checkpoint/block/mlp/project_in/dot_general'.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

# Parts of a name that stand for no module.
_STRUCTURE = {
  'while',
  'body',
  'cond',
  'closed_call',
  'checkpoint',
  'rematted_computation',
  'shard_map',
  'pallas_call',
  'scan',
  'branch',
}
_WRAPPED = re.compile(r'(?:jvp|transpose|vmap)\((.*)\)')
_LIMIT = 40


@dataclasses.dataclass(frozen=True)
class Share:
  """Traffic of a module in a pass.

  Attributes:
    scope: path of the module, such as 'image_decoder/decoder/block/mlp'; an opcode, such as 'copy',
      for instructions of the compiler alone.
    part: 'forward', 'recomputed' in the backward pass, 'backward', or 'update' for what is outside of
      the model.
    bytes: bytes read and written per step.
    share: part of the program's traffic.
  """

  scope: str
  part: str
  bytes: float
  share: float


def largest(traffic: Mapping[str, float], limit: int = _LIMIT) -> list[Share]:
  """Returns the largest shares of a program's traffic.

  Args:
    traffic: origin of instructions -> bytes.
    limit: maximum number of shares.
  """
  sums: dict[tuple[str, str], float] = {}
  for origin, size in traffic.items():
    key = module_of(origin), pass_of(origin)
    sums[key] = sums.get(key, 0.0) + size
  whole = sum(sums.values())
  found = sorted(sums.items(), key=lambda item: -item[1])[:limit]
  return [Share(*key, size, size / whole) for key, size in found]


def pass_of(origin: str) -> str:
  """Returns the pass of an instruction from the name of its origin."""
  if 'rematted_computation' in origin:
    return 'recomputed'
  if 'transpose(' in origin:
    return 'backward'
  return 'forward' if 'jvp(' in origin else 'update'


def module_of(origin: str) -> str:
  """Returns the path of modules in the name of an instruction's origin."""
  *parts, operation = origin.split('/')
  path = []
  for part in parts:
    while found := _WRAPPED.fullmatch(part):
      part = found.group(1)
    # Methods are named 'module.method'; the module's own name precedes or follows.
    if part and part not in _STRUCTURE and not part.startswith('jit(') and '.' not in part:
      path.append(part)
  return '/'.join(path) or operation

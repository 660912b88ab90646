"""Computes what one step of a compiled program costs a device: FLOPs, bytes, collectives.

XLA's cost analysis counts the body of a loop once and ignores Pallas kernels. This module walks
the program from its entry and multiplies loops by their trip counts.
"""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from parti_jax.planning.hlo import hlo_bytes
from parti_jax.planning.hlo import hlo_flops
from parti_jax.planning.hlo import hlo_loops
from parti_jax.planning.hlo import hlo_text
from parti_jax.planning.hlo import replica_groups

# Type of transfer between slices -> the collective that it counts as.
_BETWEEN_SLICES = {
  'ALL_REDUCE': 'all-reduce',
  'ALL_GATHER': 'all-gather',
  'REDUCE_SCATTER': 'reduce-scatter',
  'ALL_TO_ALL': 'all-to-all',
  'ONE_TO_ONE': 'collective-permute',
}
_KERNEL_TARGETS = ('tpu_custom_call', '__gpu$xla.gpu.triton', 'mosaic_gpu')


@dataclasses.dataclass
class Collective:
  """A collective of the program.

  Attributes:
    kind: 'all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all' or 'collective-permute'.
    whole: bytes of an all-gather's result, of a reduce-scatter's or an all-reduce's operand, or of
      one device's part for the other kinds.
    groups: int [groups, size], indices of the devices in the mesh; for a collective-permute,
      sources and targets [pairs, 2].
    count: number of executions per step.
    op_name: its origin in the traced program.
  """

  kind: str
  whole: float
  groups: np.ndarray
  count: float
  op_name: str

  @property
  def sent(self) -> float:
    """Bytes that a device sends per execution, along a ring."""
    size = self.groups.shape[1]
    share = (size - 1) / size
    if self.kind == 'collective-permute':
      return self.whole
    return self.whole * share * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass
class Costs:
  """Costs of one step on one device.

  Attributes:
    product_flops: FLOPs of dots and convolutions.
    kernel_flops: FLOPs of Pallas kernels.
    hbm_bytes: bytes read from and written to the device's main memory.
    host_bytes: bytes moved between the device and its host's memory.
    collectives: the collective instructions, with their counts.
    kernels: name of a Pallas kernel -> number of executions.
    traffic: origin of instructions in the traced program -> their part of `hbm_bytes`.
    notes: a line for each thing that could not be read from the program.
  """

  product_flops: float = 0.0
  kernel_flops: float = 0.0
  hbm_bytes: float = 0.0
  host_bytes: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)
  kernels: dict[str, float] = dataclasses.field(default_factory=dict)
  traffic: dict[str, float] = dataclasses.field(default_factory=dict)
  notes: set[str] = dataclasses.field(default_factory=set)

  @property
  def flops(self) -> float:
    return self.product_flops + self.kernel_flops

  def add(self, other: Costs, times: float = 1):
    """Adds another part's costs, multiplied by `times`."""
    self.product_flops += times * other.product_flops
    self.kernel_flops += times * other.kernel_flops
    self.hbm_bytes += times * other.hbm_bytes
    self.host_bytes += times * other.host_bytes
    self.collectives += [
      dataclasses.replace(collective, count=times * collective.count)
      for collective in other.collectives
    ]
    for mine, others in ((self.kernels, other.kernels), (self.traffic, other.traffic)):
      for name, count in others.items():
        mine[name] = mine.get(name, 0) + times * count
    self.notes |= other.notes


def costs(
  module: hlo_text.Module,
  device_count: int,
  slice_groups: np.ndarray | None = None,
) -> Costs:
  """Returns the costs of a program.

  Args:
    module: the result of `hlo_text.parse`.
    device_count: number of devices in the program's mesh.
    slice_groups: int [groups, slices], mesh indices of corresponding devices in all slices. The
      program itself only names the slices that it sends to.
  """
  return _Walk(module, device_count, slice_groups).costs(module.entry, {})


class _Walk:
  """A walk through a program's computations."""

  def __init__(
    self,
    module: hlo_text.Module,
    device_count: int,
    slice_groups: np.ndarray | None,
  ):
    self._module, self._device_count = module, device_count
    self._slice_groups = slice_groups
    self._main = hlo_bytes.Traffic(module)
    self._host = hlo_bytes.Traffic(module, hlo_text.HOST_MEMORY)
    # Costs of each fusion without collectives, and its collectives with their chains or None.
    self._fused: dict[str, tuple[Costs, list[tuple[Collective, str | None]]]] = {}

  def costs(self, computation: hlo_text.Computation, known: hlo_loops.Constants) -> Costs:
    """Returns the costs of one execution of a computation that isn't a fusion."""
    total = Costs()
    chains: set[str | None] = set()
    for instruction in computation.instructions.values():
      if instruction.opcode == 'while':
        self._add_loop(total, instruction, computation, known)
      elif instruction.opcode == 'conditional':
        total.add(self._costliest_branch(instruction))
      elif instruction.opcode in ('call', 'call-start', 'async-start'):
        total.add(self.costs(self._module.called(instruction, 'to_apply', 'calls'), {}))
      else:
        moved = self._main.of(instruction, computation)
        total.hbm_bytes += moved
        if moved:
          origin = instruction.op_name or instruction.opcode
          total.traffic[origin] = total.traffic.get(origin, 0) + moved
        total.host_bytes += self._host.of(instruction, computation)
        self._add_work(total, instruction, computation, chains)
    return total

  def _add_loop(
    self,
    total: Costs,
    loop: hlo_text.Instruction,
    computation: hlo_text.Computation,
    known: hlo_loops.Constants,
  ) -> None:
    trips = hlo_loops.trip_count(loop, computation, self._module, known)
    if trips is None:
      total.notes.add(f'the trip count of the loop {loop.op_name} is unknown; counted once')
      trips = 1
    inside = hlo_loops.loop_constants(loop, computation, self._module, known)
    for part in ('body', 'condition'):
      total.add(self.costs(self._module.called(loop, part), inside), trips)

  def _costliest_branch(self, instruction: hlo_text.Instruction) -> Costs:
    names = re.findall(
      r'(?:true_computation|false_computation)=%([\w.\-]+)', instruction.attributes
    )
    listed = instruction.attribute(r'branch_computations=\{([^}]*)\}')
    names += re.findall(r'%([\w.\-]+)', listed or '')
    branches = [self.costs(self._module[name], {}) for name in names]
    return max(branches, key=lambda branch: (branch.flops, branch.hbm_bytes), default=Costs())

  def _add_work(
    self,
    total: Costs,
    instruction: hlo_text.Instruction,
    computation: hlo_text.Computation,
    chains: set[str | None],
  ) -> None:
    """Adds products, kernels and collectives of an instruction, including those in fusions."""
    opcode = instruction.opcode.removesuffix('-start')
    if opcode == 'fusion':
      fused, collectives = self._fusion_costs(self._module.called(instruction, 'calls'))
      total.add(fused)
      for collective, chain in collectives:
        if chain is None or chain not in chains:
          total.collectives.append(collective)
        chains.add(chain)
    elif opcode in hlo_bytes.COLLECTIVES:
      found = self._collective(instruction, computation, opcode)
      if found:
        total.collectives.append(found)
    elif opcode == 'custom-call':
      self._add_kernel(total, instruction)
    elif opcode == 'send':
      self._add_sent_between_slices(total, instruction)
    else:
      total.product_flops += hlo_flops.product_flops(instruction, computation)

  def _add_sent_between_slices(self, total: Costs, instruction: hlo_text.Instruction) -> None:
    kind = instruction.attribute(r'_xla_megascale_transfer_type="(\w+)"')
    if kind not in _BETWEEN_SLICES or self._slice_groups is None:
      total.notes.add(f'{instruction.name} sends to unknown devices; not counted')
      return
    kind, groups = _BETWEEN_SLICES[kind], self._slice_groups
    size = instruction.shape.elements[0].logical_bytes()
    if kind == 'all-gather':
      size *= groups.shape[1]
    total.collectives.append(Collective(kind, size, groups, 1, instruction.op_name))

  def _fusion_costs(
    self, fused: hlo_text.Computation
  ) -> tuple[Costs, list[tuple[Collective, str | None]]]:
    """Returns a fusion's costs without collectives, and its collectives with their chains."""
    if fused.name not in self._fused:
      total = Costs()
      collectives: list[tuple[Collective, str | None]] = []
      for instruction in fused.instructions.values():
        if instruction.opcode == 'fusion':
          inner, of_inner = self._fusion_costs(self._module.called(instruction, 'calls'))
          total.product_flops += inner.product_flops
          total.kernel_flops += inner.kernel_flops
          collectives += of_inner
        elif instruction.opcode in hlo_bytes.COLLECTIVES:
          kind = instruction.opcode
          if kind == 'all-reduce' and _only_sliced(fused, instruction):
            kind = 'reduce-scatter'
          collective = self._collective(instruction, fused, kind)
          chain = (
            instruction.attribute(r'(channel_id=\d+)')
            if hlo_bytes.is_part_of_chain(instruction)
            else None
          )
          if collective:
            collectives.append((collective, chain))
        elif instruction.opcode == 'custom-call':
          self._add_kernel(total, instruction)
        else:
          total.product_flops += hlo_flops.product_flops(instruction, fused)
      self._fused[fused.name] = total, collectives
    return self._fused[fused.name]

  def _collective(
    self, instruction: hlo_text.Instruction, computation: hlo_text.Computation, kind: str
  ) -> Collective | None:
    """Returns a Collective; None if fewer than two devices take part."""
    operands = sum(computation[name].shape.logical_bytes() for name in instruction.operands)
    if kind == 'collective-permute':
      rows = replica_groups.pairs(instruction)
      rows = rows[rows[:, 0] != rows[:, 1]]
    else:
      rows = replica_groups.groups(instruction, self._device_count)
    if not len(rows) or rows.shape[1] < 2:
      return None
    whole = operands * (rows.shape[1] if kind == 'all-gather' else 1)
    return Collective(kind, whole, rows, 1, instruction.op_name)

  def _add_kernel(self, total: Costs, instruction: hlo_text.Instruction) -> None:
    if instruction.attribute(r'custom_call_target="([^"]*)"') not in _KERNEL_TARGETS:
      return
    # The kernel's name precedes `pallas_call`.
    name = instruction.op_name.removesuffix('/pallas_call').rsplit('/', maxsplit=1)[-1]
    total.kernels[name] = total.kernels.get(name, 0) + 1
    stated = instruction.attribute(r'"cost_estimate":\{"flops":"?(\d+)')
    estimate = None if stated is None else float(stated)
    if estimate is None:
      total.notes.add(f'the kernel {name} has no FLOPs estimate; not counted')
    total.kernel_flops += estimate or 0.0


def _only_sliced(fused: hlo_text.Computation, instruction: hlo_text.Instruction) -> bool:
  """Returns whether each device keeps only a slice of the result, as after a reduce-scatter."""
  users = list(fused.users.get(instruction.name, ()))
  for user in users:
    if user.opcode in ('get-tuple-element', 'bitcast'):
      users += fused.users.get(user.name, ())
  opcodes = {user.opcode for user in users} - {'get-tuple-element', 'bitcast'}
  return bool(users) and opcodes == {'dynamic-slice'}

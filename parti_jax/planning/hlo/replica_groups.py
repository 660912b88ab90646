"""Finds the devices that take part in a collective, and the mesh axes along which they differ."""

from __future__ import annotations

import math
import re

import numpy as np

from parti_jax.planning.hlo import hlo_text

_LISTS = re.compile(r'\{\{[\d,{} ]*\}\}')
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(
  r'mesh\[([^\]]*)\](?:, ?device_ids=\((?:\[([\d,]+)\]T\(([\d,]+)\)|([\d,]+))\))?'
  r' \{([^}]*)\}'
)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def groups(instruction: hlo_text.Instruction, device_count: int) -> np.ndarray:
  """Returns the devices of each group, [groups, size], as indices in the mesh's order.

  Args:
    instruction: a collective; without replica groups it includes all devices.
    device_count: number of the program's devices.

  Raises:
    ValueError: if the form of the groups is unknown.
  """
  _, found, text = instruction.attributes.partition('replica_groups=')
  if not found or text.startswith('{}'):
    return np.arange(device_count)[None]
  if match := _LISTS.match(text):
    return np.array([_numbers(group) for group in re.findall(r'\{([\d,]+)\}', match.group())])
  if match := _IOTA.match(text):
    shape, dims, order = (_numbers(part) for part in match.groups())
    indices = np.arange(math.prod(dims)).reshape(dims)
    return (indices.transpose(order) if order else indices).reshape(shape)
  if match := _MESH.match(text):
    return _mesh_groups(*match.groups())
  raise ValueError(f'{instruction.name}: unknown form of replica groups: {text[:100]}')


def pairs(instruction: hlo_text.Instruction) -> np.ndarray:
  """Returns sources and targets of a collective-permute, [pairs, 2]."""
  _, _, text = instruction.attributes.partition('source_target_pairs=')
  match = _LISTS.match(text)
  found = re.findall(r'\{([\d,]+)\}', match.group()) if match else []
  return np.array([_numbers(pair) for pair in found], int).reshape(-1, 2)


def axes(rows: np.ndarray, mesh_shape: dict[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which the devices of a row differ.

  Args:
    rows: the result of `groups` or `pairs`.
    mesh_shape: axis -> size, in the mesh's order.

  Returns:
    Names of the axes, in the mesh's order.
  """
  coordinates = np.unravel_index(rows, tuple(mesh_shape.values()))
  return tuple(
    name for name, along in zip(mesh_shape, coordinates) if np.any(along != along[:, :1])
  )


def _mesh_groups(
  axes_text: str, reshape: str | None, order: str | None, ids: str | None, group_axes: str
) -> np.ndarray:
  """Returns groups of the form `mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}`."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes_text)}
  count = math.prod(sizes.values())
  if ids:
    indices = np.array(_numbers(ids))
  else:
    indices = np.arange(count)
    if reshape:
      indices = indices.reshape(_numbers(reshape)).transpose(_numbers(order))
  # A part of an axis, 'a':(m)k, is the dimension k of the axis reshaped to [m, k, rest].
  split: list[int] = []
  wanted = {
    name: (int(before or 1), int(size or 0)) for name, before, size in _AXIS.findall(group_axes)
  }
  positions = {}
  for name, size in sizes.items():
    before, part = wanted.get(name, (1, size))
    part = part or size
    positions[name] = len(split) + 1
    split += [before, part, size // before // part]
  chosen = [positions[name] for name in wanted]
  rest = [dimension for dimension in range(len(split)) if dimension not in chosen]
  indices = indices.reshape(split).transpose(rest + chosen)
  return indices.reshape(-1, math.prod(split[dimension] for dimension in chosen))


def _numbers(text: str | None) -> tuple[int, ...]:
  return tuple(map(int, text.split(','))) if text else ()

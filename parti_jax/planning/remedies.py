"""Suggests gin settings that may make a step fit in memory, the cheapest first."""

from __future__ import annotations

from typing import Any

# Policies in decreasing order of what they keep for the backward pass.
REMAT_ORDER = ('everything', 'dots', 'block_inputs_and_attention', 'block_inputs', 'nothing')


def of(plan: dict[str, Any]) -> list[str]:
  """Returns lines such as '--gin.train.microbatches=8: half the activations at a time'.

  Args:
    plan: the result of `plan.make` for a step that doesn't fit.
  """
  return _of_sampling(plan) if plan['what'] == 'sample' else _of_training(plan)


def _of_training(plan) -> list[str]:
  settings, mesh = plan['settings'], plan['mesh']
  lines = []
  if settings['remat'] in REMAT_ORDER:
    weaker = REMAT_ORDER[REMAT_ORDER.index(settings['remat']) + 1 : -1]
    lines += [
      f'--gin.{settings["config"]}.remat="\'{policy}\'": keeps less for the backward pass'
      for policy in weaker[:2]
    ]
  microbatches = settings['microbatches']
  ways = mesh['stage'] * mesh['data'] * mesh['fsdp']
  for factor in (2, 4):
    if plan['batch_size'] % (ways * microbatches * factor) == 0:
      lines.append(
        f'--gin.train.microbatches={microbatches * factor}: activations of '
        f'1/{microbatches * factor} of the batch at a time'
      )
  if mesh['data'] > 1 and mesh['data'] % 2 == 0:
    lines.append(
      f'--gin.make_mesh.data={mesh["data"] // 2} --gin.make_mesh.fsdp='
      f'{mesh["fsdp"] * 2}: parameters and optimizer in twice as many parts'
    )
  if not settings['offload_optimizer']:
    lines.append("--gin.train.offload_optimizer=True: the optimizer's state in the hosts' memory")
  return lines + ['--topology=...: a larger slice, or chips with more memory']


def _of_sampling(plan) -> list[str]:
  mesh, lines = plan['mesh'], []
  batch = plan['batch_size']
  if plan['settings']['weights'] == 'float':
    lines.append("--weights=int8: half the decoder's parameters")
  if plan['settings']['cache'] == 'float':
    lines.append('--cache=int8: half the bytes of keys and values')
  if batch // 2 and (batch // 2) % (mesh['data'] * mesh['fsdp']) == 0:
    lines.append(f'--batch_size={batch // 2}: half the cache')
  if mesh['data'] > 1 and mesh['data'] % 2 == 0:
    lines.append(
      f'--gin.make_mesh.data={mesh["data"] // 2} --gin.make_mesh.tensor='
      f'{mesh["tensor"] * 2}: parameters in twice as many parts'
    )
  return lines + ['--topology=...: a larger slice, or chips with more memory']

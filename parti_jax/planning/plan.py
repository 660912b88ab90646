"""Compiles the step that a run's gin files describe, for devices that need not exist here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import resource
import time
from typing import Any

import jax

from parti_jax.core import gin_config
from parti_jax.core import native_notes
from parti_jax.core import numerics
from parti_jax.partitioning import compiler_options
from parti_jax.partitioning import mesh as mesh_lib
from parti_jax.planning import remedies
from parti_jax.planning import request as request_lib
from parti_jax.planning import roofline
from parti_jax.planning import topology as topology_lib
from parti_jax.planning.hlo import hlo_cost
from parti_jax.planning.hlo import hlo_scopes
from parti_jax.planning.hlo import hlo_text

# Version of a plan's JSON; increment it with each change that affects readers.
SCHEMA = 1

_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@numerics.fixed()
def make(request: request_lib.Request) -> dict[str, Any]:
  """Plans a step.

  Returns:
    A JSON-compatible dict; `report.text` formats it.

  Raises:
    UserError: if the topology, gin files, mesh and batch don't fit together.
  """
  # Imported here because it registers our trainer's functions with gin, which `of_step` doesn't
  # need.
  from parti_jax.planning import steps

  jax.config.update('jax_platforms', 'cpu')  # Never takes the accelerator of this machine.
  topology = topology_lib.parse(request.topology)
  gin_config.parse(request.gin_files, request.gin_bindings, data=False)
  mesh = mesh_lib.make_mesh(devices=topology.devices())
  build = {'train': steps.training_step, 'sample': steps.sampling_step}[request.what]
  step = build(request, mesh)
  plan = of_step(request, topology, step)
  return plan | {'remedies': [] if plan['fits'] else remedies.of(plan)}


def of_step(
  request: request_lib.Request, topology: topology_lib.Topology, step: request_lib.Step
) -> dict[str, Any]:
  """Plans an existing step; returns the dict of `make` without 'remedies'."""
  return _Plan(request, topology, step).made()


class _Plan:
  """Compiles a step and analyzes the result."""

  def __init__(
    self, request: request_lib.Request, topology: topology_lib.Topology, step: request_lib.Step
  ):
    self._request, self._topology, self._step = request, topology, step
    self._chip = topology.chip

  def made(self) -> dict[str, Any]:
    start, cpu_start = time.perf_counter(), time.process_time()
    lowered = self._step.lower()
    plan = self._described()
    try:
      with native_notes.hidden(), compiler_options.checked():
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      if 'RESOURCE_EXHAUSTED' not in str(error):
        raise
      plan |= {'fits': False, 'exhausted': exhausted(str(error), self._capacity())}
    else:
      plan |= self._measured(compiled)
    plan['compile_seconds'] = time.perf_counter() - start
    plan['compile_cpu_seconds'] = time.process_time() - cpu_start
    plan['compile_peak_bytes'] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return plan

  def _described(self) -> dict[str, Any]:
    request, step, chip = self._request, self._step, self._chip
    return {
      'schema': SCHEMA,
      'what': request.what,
      'topology': request.topology,
      'gin_files': list(request.gin_files),
      'gin_bindings': list(request.gin_bindings),
      'versions': {name: _version(name) for name in ('jax', 'jaxlib', 'libtpu')},
      'chip': chip and dataclasses.asdict(chip),
      'chips': self._topology.chip_count,
      'devices': step.mesh.size,
      'mesh': dict(step.mesh.shape),
      'batch_size': step.batch_size,
      'settings': step.settings,
      'parameters': step.parameters,
      'memory': None,
      'exhausted': None,
      'flops': None,
      'bytes': None,
      'collectives': [],
      'least_sent': None,
      'kernels': {},
      'traffic': [],
      'seconds': None,
      'mfu': None,
      'notes': [],
      'network_model': roofline.MODEL if chip else None,
    }

  def _capacity(self) -> float | None:
    return None if self._chip is None else self._chip.hbm_usable / self._chip.devices

  def _measured(self, compiled: jax.stages.Compiled) -> dict[str, Any]:
    step, chip, capacity = self._step, self._chip, self._capacity()
    memory = _memory(compiled.memory_analysis(), step.resident_bytes, capacity)
    text = compiled.as_text()
    assert text is not None
    costs = hlo_cost.costs(
      hlo_text.parse(text),
      step.mesh.size,
      roofline.slice_groups(step.mesh) if self._topology.slices > 1 else None,
    )
    sums = roofline.summarize(costs.collectives, step.mesh, chip)
    model_flops = step.model_flops / step.mesh.size
    plan: dict[str, Any] = {
      'fits': capacity is None or memory['total'] <= capacity,
      'memory': memory,
      'flops': {
        'model': model_flops,
        'compiled': costs.flops,
        'products': costs.product_flops,
        'kernels': costs.kernel_flops,
        'ratio': costs.flops / model_flops,
      },
      'bytes': {'hbm': costs.hbm_bytes, 'host': costs.host_bytes},
      'least_sent': step.least_sent,
      'collectives': [dataclasses.asdict(entry) for entry in sums],
      'kernels': costs.kernels,
      'traffic': [dataclasses.asdict(entry) for entry in hlo_scopes.largest(costs.traffic)],
      'notes': sorted(costs.notes) + list(step.notes),
    }
    if costs.host_bytes:
      plan['notes'].append("the time of transfers to and from the hosts' memory is not counted")
    if step.ideal_bytes:
      ideal = sum(step.ideal_bytes.values())
      plan['bytes'] |= {'ideal': step.ideal_bytes, 'ratio': costs.hbm_bytes / ideal}
    if chip:
      times = roofline.times(costs, sums, chip)
      plan['seconds'] = dataclasses.asdict(times) | {'bound': times.bound, 'sum': times.sum}
      mfu = lambda seconds: roofline.mfu(step.model_flops, seconds, chip, self._topology.chip_count)
      plan['mfu'] = {'bound': mfu(times.longest), 'without_overlap': mfu(times.sum)}
    return plan


def exhausted(message: str, capacity: float | None) -> dict[str, Any]:
  """Returns the bytes 'needed' and 'available' from XLA's out-of-memory message.

  The needed bytes may include only the temporaries, if XLA gives up before placing the rest.
  """
  for pattern in (
    r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?)',
    r'\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+)([KMGT]?)\)',
  ):
    if found := re.search(pattern, message):
      needed, unit, available, available_unit = found.groups()
      return {
        'needed': float(needed) * _UNITS[unit],
        'available': float(available) * _UNITS[available_unit],
        'message': message.split('\n', maxsplit=1)[0],
      }
  return {'needed': None, 'available': capacity, 'message': message.split('\n', maxsplit=1)[0]}


def _memory(stats: Any, resident: float, capacity: float | None) -> dict[str, Any]:
  """Returns bytes on a device while the step runs; `resident` bytes are used in addition to it."""
  held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
  # The TPU compiler's size of temporaries may include some in on-chip memory. Its peak doesn't, and
  # it is what the compiler compares with the available memory.
  peak = stats.peak_memory_in_bytes
  temporaries = peak - held if capacity and peak > held else stats.temp_size_in_bytes
  parts = {
    'arguments': stats.argument_size_in_bytes,
    'outputs': stats.output_size_in_bytes,
    'aliased': stats.alias_size_in_bytes,
    'temporaries': temporaries,
    'generated_code': stats.generated_code_size_in_bytes,
    'resident': resident,
  }
  total = sum(parts.values()) - 2 * parts['aliased']
  host = (
    stats.host_argument_size_in_bytes
    + stats.host_output_size_in_bytes
    - stats.host_alias_size_in_bytes
    + stats.host_temp_size_in_bytes
  )
  return parts | {'total': total, 'capacity': capacity, 'host': host}


def _version(name: str) -> str | None:
  try:
    return importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    return None

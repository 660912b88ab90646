"""Lists meshes, remat policies and microbatches for a search, the most promising first.

A rough estimate by formulas decides which candidates are worth minutes of compiling. Reports only
use what XLA compiled.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

from parti_jax.models import flops
from parti_jax.models import parti
from parti_jax.planning import chips
from parti_jax.planning import remedies

# Candidates whose estimate exceeds the memory by more than this factor are not tried.
_SLACK = 1.25


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A candidate of a search.

  Attributes:
    mesh: pairs (axis, size).
    remat: rematerialization policy; None for sampling.
    microbatches: number of microbatches of a training step; None for sampling.
    bytes: rough estimate of the memory that a device needs.
    seconds: rough estimate of a step's time.
  """

  mesh: tuple[tuple[str, int], ...]
  remat: str | None = None
  microbatches: int | None = None
  bytes: float = 0.0
  seconds: float = 0.0

  def bindings(self) -> list[str]:
    """Returns the candidate as gin bindings."""
    found = [f'make_mesh.{axis} = {size}' for axis, size in self.mesh]
    if self.remat is not None:
      found += [f"PartiConfig.remat = '{self.remat}'", f'train.microbatches = {self.microbatches}']
    return found


def of_training(
  model, parameters: int, batch_size: int, chip: chips.Chip | None, devices: int, slices: int = 1
) -> list[Candidate]:
  """Returns candidates for a training step, in order of estimated time.

  Args:
    model: a PartiConfig.
    parameters: number of parameters.
    batch_size: examples per step.
    chip: the chip's constants; None for emulated devices, where all candidates count as fitting.
    devices: number of devices.
    slices: number of slices, which must divide the ways of data parallelism.
  """
  found = []
  for mesh in meshes(model, devices, slices, stages=True):
    ways = mesh['stage'] * mesh['data'] * mesh['fsdp']
    for remat, microbatches in itertools.product(remedies.REMAT_ORDER[:-1], (1, 2, 4, 8, 16, 32)):
      if batch_size % (ways * microbatches):
        continue
      needed = _training_bytes(model, parameters, batch_size, mesh, remat, microbatches)
      seconds = _training_seconds(model, parameters, batch_size, mesh, remat, microbatches, chip)
      if chip is None or needed <= _SLACK * chip.hbm_usable / chip.devices:
        found.append(Candidate(tuple(mesh.items()), remat, microbatches, needed, seconds))
  return sorted(found, key=lambda candidate: candidate.seconds)


def of_sampling(
  model,
  sequences: int,
  images: int,
  chip: chips.Chip | None,
  devices: int,
  bytes_per_weight: int = 2,
  bytes_per_key: int = 2,
) -> list[Candidate]:
  """Returns candidates for a sampling step like `of_training`; reading memory bounds a step."""
  found = []
  weights = model.decoder_layers * flops.image_token_weights(model)
  kernels = bytes_per_weight * weights
  length = model.image_length + model.text_length
  keys_width = model.cached_heads * model.head_dim
  cache = 2 * bytes_per_key * sequences * model.decoder_layers * keys_width * length
  for mesh in meshes(model, devices, 1, stages=False):
    if images % (mesh['data'] * mesh['fsdp']):
      continue
    read = kernels / mesh['tensor'] + cache / devices
    needed = kernels / mesh['tensor'] / mesh['fsdp'] + cache / devices
    seconds = 0.0
    if chip:
      # Parameters that are split along fsdp are gathered at each step.
      travel = (0 if mesh['fsdp'] == 1 else kernels / mesh['tensor']) / (2 * chip.link_bandwidth)
      seconds = read * chip.devices / chip.hbm_bandwidth + travel
    if chip is None or needed <= _SLACK * chip.hbm_usable / chip.devices:
      found.append(Candidate(tuple(mesh.items()), bytes=needed, seconds=seconds))
  return sorted(found, key=lambda candidate: candidate.seconds)


def meshes(model, devices: int, slices: int, stages: bool) -> Iterator[dict[str, int]]:
  """Yields meshes of `devices` devices whose axes divide the model's dimensions."""
  heads = math.gcd(
    model.heads, model.cached_heads, model.mlp_width, model.codebook_size, model.text_vocabulary
  )
  depth = math.gcd(model.encoder_layers, model.decoder_layers) if stages else 1
  for tensor, fsdp, stage in itertools.product(
    _divisors(heads), _divisors(model.width), _divisors(depth)
  ):
    data, left = divmod(devices, tensor * fsdp * stage)
    if not left and data and data % slices == 0:
      yield {'stage': stage, 'data': data, 'fsdp': fsdp, 'tensor': tensor}


def _divisors(number: int) -> list[int]:
  return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _training_bytes(model, parameters, batch_size, mesh, remat, microbatches) -> float:
  """Estimates bytes of parameters, gradients, first moments, saved and working values, logits."""
  tensor = mesh['tensor']
  state = parameters * (4 + 4 + 2) / (tensor * mesh['fsdp'] * mesh['stage'])
  examples = batch_size / (mesh['stage'] * mesh['data'] * mesh['fsdp'] * microbatches)
  width, image = model.width, examples * model.image_length
  keys_width = model.cached_heads * model.head_dim
  projections = (4 * width + 2 * keys_width + model.mlp_kernels * model.mlp_width) / tensor
  kept = {
    'block_inputs': width,
    'block_inputs_and_attention': width + width / tensor,
    'dots': 3 * width + projections,
    'everything': 8 * width + 3 * projections,
  }[remat]
  text = examples * model.text_length * model.encoder_layers / model.decoder_layers
  layers = 2 * kept * (image + text) * model.decoder_layers / mesh['stage']
  working = 2 * image * (8 * width + 3 * projections)
  return state + layers + working + 8 * image * model.codebook_size / tensor


def _training_seconds(model, parameters, batch_size, mesh, remat, microbatches, chip) -> float:
  """Estimates seconds: the longer of computing and communicating, plus a tenth of the other."""
  if chip is None:
    return 0.0
  devices = math.prod(mesh.values())
  again = {'everything': 0.0, 'dots': 0.1, 'block_inputs_and_attention': 0.9, 'block_inputs': 1.0}
  work = (3 + again[remat]) * batch_size * parti.forward_flops(model)
  bubble = 1 + (mesh['stage'] - 1) / max(microbatches, 2 * mesh['stage'])
  compute = bubble * work * chip.devices / (devices * chip.peak_flops)
  gathered = 0 if mesh['fsdp'] == 1 else 3 * microbatches
  reduced = 0 if mesh['data'] == 1 else 2 * microbatches / mesh['fsdp']
  weights = 2 * parameters / (mesh['tensor'] * mesh['stage']) * (gathered + reduced)
  tokens = batch_size / (mesh['data'] * mesh['fsdp']) * model.image_length
  shared = 0 if mesh['tensor'] == 1 else 2 * (6 + 3 * again[remat])
  activations = 2 * tokens * model.width * shared * model.decoder_layers / mesh['stage']
  sent = (weights + activations) / (2 * chip.link_bandwidth)
  return max(compute, sent) + 0.1 * min(compute, sent)

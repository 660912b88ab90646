"""What a plan is asked for, and the step that is to be compiled for it."""

from __future__ import annotations

import dataclasses
from typing import Any

from parti_jax.planning.hlo import hlo_cost


@dataclasses.dataclass(frozen=True)
class Request:
  """What to plan.

  Attributes:
    what: 'train' or 'sample'.
    topology: such as 'v4:8x8x8'.
    gin_files: of the run.
    gin_bindings: 'NAME=VALUE', after the files.
    batch_size: examples of a training step, None for the run's own; images of a sampling step.
    guided: whether sampling uses classifier-free guidance, two sequences for each image.
  """

  what: str
  topology: str
  gin_files: tuple[str, ...]
  gin_bindings: tuple[str, ...] = ()
  batch_size: int | None = None
  guided: bool = True


@dataclasses.dataclass
class Step:
  """A step, ready to be lowered.

  Attributes:
    lower: returns the lowered step.
    mesh: its devices.
    batch_size: examples, or images, of a step.
    model_flops: of a step, over all devices.
    parameters: how many the model has.
    settings: what else it depends on, for the report.
    ideal_bytes: what a step must at least move on each device, where that is known.
    resident_bytes: what else lies in each device's memory meanwhile.
    notes: what the plan is to say besides.
    kernel_flops: for `hlo_cost.costs`.
  """

  lower: Any
  mesh: Any
  batch_size: int
  model_flops: float
  parameters: int
  settings: dict[str, Any]
  ideal_bytes: dict[str, float] | None = None
  resident_bytes: float = 0.0
  notes: tuple[str, ...] = ()
  kernel_flops: hlo_cost.KernelFlops | None = None

"""Defines the request for a plan, and the step that is compiled for it."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Request:
  """The request for a plan.

  Attributes:
    what: 'train' or 'sample'.
    topology: topology, such as 'v4:8x8x8'.
    gin_files: the run's gin files.
    gin_bindings: bindings 'NAME=VALUE', applied after the files.
    batch_size: examples of a training step, None for the run's setting; images of a sampling step.
    guided: whether sampling uses classifier-free guidance, with two sequences for each image.
    weights: how sampling holds the decoder's weights, a name in `sampling_settings.WEIGHTS`.
    cache: how sampling holds keys and values, a name in `sampling_settings.CACHES`.
  """

  what: str
  topology: str
  gin_files: tuple[str, ...]
  gin_bindings: tuple[str, ...] = ()
  batch_size: int | None = None
  guided: bool = True
  weights: str = 'float'
  cache: str = 'float'


@dataclasses.dataclass
class Step:
  """A step, ready to lower.

  Attributes:
    lower: returns the lowered step.
    mesh: the mesh of its devices.
    batch_size: examples or images per step.
    model_flops: model FLOPs per step, over all devices.
    parameters: number of the model's parameters.
    settings: other settings of the step, for the report.
    ideal_bytes: minimum bytes that a step must move on each device; None if unknown.
    least_sent: minimum bytes that a device sends per step, of parameters and of gradients; None if
      unknown.
    resident_bytes: bytes of other data in each device's memory during the step.
    notes: additional notes for the plan.
  """

  lower: Any
  mesh: Any
  batch_size: int
  model_flops: float
  parameters: int
  settings: dict[str, Any]
  ideal_bytes: dict[str, float] | None = None
  least_sent: dict[str, float] | None = None
  resident_bytes: float = 0.0
  notes: tuple[str, ...] = ()

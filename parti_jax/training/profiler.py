"""Traces training steps with JAX's profiler."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import jax

from parti_jax.core import storage
from parti_jax.training import run as run_lib
from parti_jax.training import writers


class Profiler:
  """Traces steps of a run's first process into the folder of TensorBoard's events.

  If the run is resumed between the first and the last of these steps, the rest of them is traced.
  If it ends between them, the trace holds the steps up to there.

  Args:
    model_dir: the run's folder.
    steps: the first and the last step to trace, counted from 1; None for no trace.
  """

  def __init__(self, model_dir: str | os.PathLike, steps: tuple[int, int] | None):
    self._target, self._steps = storage.join(model_dir, 'tensorboard'), steps
    self._folder: writers.LocalFolder | None = None

  @contextlib.contextmanager
  def step(self, run: run_lib.Run) -> Iterator[None]:
    """Returns a context for the run's next step, which traces it if it is one of the steps."""
    number = run.step + 1
    if self._steps is None or jax.process_index() or not self._steps[0] <= number <= self._steps[1]:
      yield
      return
    if self._folder is None:
      jax.block_until_ready(run.state)  # Earlier steps don't belong in the trace.
      self._folder = writers.LocalFolder(self._target)
      jax.profiler.start_trace(self._folder.path)
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if number == self._steps[1]:
      jax.block_until_ready(run.state)
      self.close()

  def close(self) -> None:
    """Writes the trace, if one has started."""
    if self._folder is not None:
      jax.profiler.stop_trace()
      self._folder.upload()
      self._folder = None

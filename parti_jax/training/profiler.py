"""A trace of some training steps, by JAX's profiler."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax

from parti_jax.core import storage
from parti_jax.training import run as run_lib
from parti_jax.training import writers


class Profiler:
  """Traces steps of a run in its first process, into the folder of TensorBoard's events.

  A start that begins between the first and the last of the steps traces the rest of them, and one
  that ends there keeps what it has.

  Args:
    model_dir: the run's folder.
    steps: the first and the last step to trace, counted from 1; None for none.
  """

  def __init__(self, model_dir: str, steps: tuple[int, int] | None):
    self._target, self._steps = storage.join(model_dir, 'tensorboard'), steps
    self._folder: writers.LocalFolder | None = None

  @contextlib.contextmanager
  def step(self, run: run_lib.Run) -> Iterator[None]:
    """A context for the next step of a run, which is traced if it is among the steps."""
    number = run.step + 1
    if self._steps is None or jax.process_index() or not self._steps[0] <= number <= self._steps[1]:
      yield
      return
    if self._folder is None:
      jax.block_until_ready(run.state)  # The steps before are not part of the trace.
      self._folder = writers.LocalFolder(self._target)
      jax.profiler.start_trace(self._folder.path)
    with jax.profiler.StepTraceAnnotation('train', step_num=number):
      yield
    if number == self._steps[1]:
      jax.block_until_ready(run.state)
      self.close()

  def close(self):
    """Writes the trace, if one has begun."""
    if self._folder is not None:
      jax.profiler.stop_trace()
      self._folder.upload()
      self._folder = None

"""Work of the training loop between steps: metrics, checkpoints, evaluation, images."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import jax

from parti_jax.core import store_retries
from parti_jax.data import shared_batches
from parti_jax.runs import journal as journal_lib
from parti_jax.training import config as config_lib
from parti_jax.training import held_out as held_out_lib
from parti_jax.training import reporting
from parti_jax.training import run as run_lib


@dataclasses.dataclass(frozen=True)
class Hook:
  """A function that the training loop calls after some of the steps, in every process.

  Attributes:
    every: number of steps between two calls, or several such numbers. The hook is called at
      multiples of any of them, and after the last step. 0 means never.
    function: takes the run and the metrics of the step, {name: scalar on the devices}. The run's
      `step` is the number of steps done; its `state` is valid until the next step.
    pauses: whether to exclude the hook's time from the speeds in the metrics.
  """

  every: int | tuple[int, ...]
  function: Callable[[run_lib.Run, dict[str, jax.Array]], None]
  pauses: bool = True

  def is_due(self, step: int, last: int) -> bool:
    """Returns whether to call the hook after `step`, in a run whose last step is `last`."""
    several = self.every if isinstance(self.every, tuple) else (self.every,)
    return any(every and (step % every == 0 or step == last) for every in several)


class Meter:
  """Measures examples/s and model FLOP/s between readings, without pauses for other work.

  Args:
    batch_size: examples per step.
    flops: model FLOPs of a step.
    peak: peak FLOP/s of all devices together.
  """

  def __init__(self, batch_size: int, flops: int, peak: float):
    self._batch_size, self._flops, self._peak = batch_size, flops, peak
    self._start = time.perf_counter()
    self._step: int | None = None

  def read(self, step: int) -> dict[str, float]:
    """Returns the speeds since the last reading; {} the first time, since those steps compile."""
    now = time.perf_counter()
    seconds, self._start = now - self._start, now
    before, self._step = self._step, step
    if before is None or before >= step:
      return {}
    rate = (step - before) / seconds
    return {
      'examples_per_second': rate * self._batch_size,
      'model_flops_per_second': rate * self._flops,
      'share_of_peak': rate * self._flops / self._peak,
    }

  def restart(self, step: int) -> None:
    """Excludes the time and the steps since the last reading."""
    self._start, self._step = time.perf_counter(), step


def log(
  config: config_lib.TrainConfig,
  examples: shared_batches.SharedBatches,
  meter: Meter,
  results: dict[str, float],
  reporter: reporting.Reporter,
  journal: journal_lib.Journal,
) -> Hook:
  """Returns the hook that reports the metrics of a step and stores them in `results`."""

  def show(run: run_lib.Run, metrics: dict[str, jax.Array]) -> None:
    results.clear()
    results.update({name: float(value) for name, value in metrics.items()})
    # The learning rate of the last step that was applied.
    results['learning_rate'] = float(config.schedule(max(run.updates - 1, 0)))
    results['skipped_steps'] = run.step - run.updates
    results['skipped_examples'] = sum(run.skipped().values())
    results.update(examples.by_source | meter.read(run.step))
    if store_retries.used():
      results['store_retries'] = sum(store_retries.counts().values())
    reporter.metrics(run.step, results)
    journal.progress(run.step, results)

  return Hook(config.log_every, show, pauses=False)


def save(config: config_lib.TrainConfig, reporter: reporting.Reporter) -> Hook:
  """Returns the hook that starts writing a checkpoint; the last step always has one."""

  def start(run: run_lib.Run, metrics: dict[str, jax.Array]) -> None:
    del metrics
    reporter.flush()
    run.save(last=run.step == config.steps)

  return Hook((config.checkpoint_every, config.steps), start)


def show_held_out(
  config: config_lib.TrainConfig,
  held_out: held_out_lib.HeldOut,
  results: dict[str, float],
  reporter: reporting.Reporter,
) -> list[Hook]:
  """Returns the hooks that evaluate, draw images, and record that both are done.

  The first one adds its measures to `results`.
  """
  evaluate_every = config.evaluate_every if config.eval_split else 0
  pictures_every = config.pictures_every if held_out.draws else 0

  def evaluate(run: run_lib.Run, metrics: dict[str, jax.Array]) -> None:
    del metrics
    run.finish_saving()  # A failure from here on must not lose steps.
    measured = held_out.evaluate(run.state)
    results.update(measured)
    reporter.metrics(run.step, measured)
    if f'{config.eval_split}/not_finite_examples' in measured:
      reporter.say(
        f'step {run.step}: evaluation on {config.eval_split} gave values that are not finite'
      )

  def draw(run: run_lib.Run, metrics: dict[str, jax.Array]) -> None:
    del metrics
    run.finish_saving()
    reporter.pictures(run.step, held_out.pictures(run.state))

  def note(run: run_lib.Run, metrics: dict[str, jax.Array]) -> None:
    del metrics
    reporter.flush()
    held_out.done(run.step)

  return [
    Hook(evaluate_every, evaluate),
    Hook(pictures_every, draw),
    Hook((evaluate_every, pictures_every), note),
  ]

"""What the training loop does between steps: metrics, checkpoints, evaluation, pictures."""

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
  """A function that the loop calls after some of the steps, in every process.

  Attributes:
    every: steps between two calls, or several such numbers; it is called at multiples of any of
      them, and after the last step. 0 stands for never.
    function: takes the run, whose `step` counts the steps done and whose `state` is valid until
      the next step, and the metrics of the step, {name: array [] on the devices}.
    pauses: whether its time is left out of the speeds that metrics show.
  """

  every: int | tuple[int, ...]
  function: Callable[[run_lib.Run, dict[str, jax.Array]], None]
  pauses: bool = True

  def is_due(self, step: int, last: int) -> bool:
    """Whether it is called after `step`, of a run whose last step is `last`."""
    several = self.every if isinstance(self.every, tuple) else (self.every,)
    return any(every and (step % every == 0 or step == last) for every in several)


class Meter:
  """Examples/s and model FLOP/s since the last reading, without pauses for other work.

  Args:
    batch_size: examples a step.
    flops: model FLOPs of a step.
    peak: FLOP/s of all devices at most.
  """

  def __init__(self, batch_size: int, flops: int, peak: float):
    self._batch_size, self._flops, self._peak = batch_size, flops, peak
    self._start, self._step = time.perf_counter(), None

  def read(self, step: int) -> dict[str, float]:
    """The speeds of the steps since the last reading; none for the first, which compile."""
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

  def restart(self, step: int):
    """Leaves out the time since the last reading, and its steps."""
    self._start, self._step = time.perf_counter(), step


def log(
  config: config_lib.TrainConfig,
  examples: shared_batches.SharedBatches,
  meter: Meter,
  results: dict[str, float],
  reporter: reporting.Reporter,
  journal: journal_lib.Journal,
) -> Hook:
  """Shows the metrics of a step, and leaves them in `results`."""

  def show(run, metrics):
    results.clear()
    results.update({name: float(value) for name, value in metrics.items()})
    # The rate of the last step that was applied.
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
  """Starts to write a checkpoint; the last step has one in any case."""

  def start(run, metrics):
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
  """Evaluation, whose measures are added to `results`; pictures; a note that both are done."""
  evaluate_every = config.evaluate_every if config.eval_split else 0
  pictures_every = config.pictures_every if held_out.draws else 0

  def evaluate(run, metrics):
    del metrics
    run.finish_saving()  # Whatever goes wrong from here on must not cost steps.
    measured = held_out.evaluate(run.state)
    results.update(measured)
    reporter.metrics(run.step, measured)
    if f'{config.eval_split}/not_finite_examples' in measured:
      reporter.say(
        f'step {run.step}: the numbers of evaluation on {config.eval_split} are not finite'
      )

  def draw(run, metrics):
    del metrics
    run.finish_saving()
    reporter.pictures(run.step, held_out.pictures(run.state))

  def note(run, metrics):
    del metrics
    reporter.flush()
    held_out.done(run.step)

  return [
    Hook(evaluate_every, evaluate),
    Hook(pictures_every, draw),
    Hook((evaluate_every, pictures_every), note),
  ]

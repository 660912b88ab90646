"""A run: its state, its position in the data and its checkpoints."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import jax
from jaxtyping import Array
from jaxtyping import Shaped

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints
from parti_jax.checkpoints import whole_moments
from parti_jax.core import texts
from parti_jax.data import shared_batches
from parti_jax.partitioning import compiler_options
from parti_jax.runs import journal as journal_lib
from parti_jax.runs import preemption
from parti_jax.runs import run_lock
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import reporting
from parti_jax.training import skipped_steps
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base


class Run:
  """A trainer's state and position in the data, with checkpoints in a folder.

  The constructor restores the newest checkpoint, if there is one.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    keep: number of checkpoints to keep.
    examples: the training examples.
    inputs: fingerprints of the run's vocabulary and tokenizer.
    initial: parts of the parameters that a new run starts with, a result of `initial_parts`.
    journal: the journal for checkpoints and skipped steps; None for no journal.
    max_bad_steps: the limit of `SkippedSteps`.

  Attributes:
    state: the TrainState.
    step: number of steps done.
    resumed: whether the run was restored from a checkpoint.

  Raises:
    UserError: if the checkpoints have another configuration, vocabulary or tokenizer, or none of
      them is whole.
  """

  def __init__(
    self,
    trainer: trainer_lib.Trainer,
    model_dir: str | os.PathLike,
    keep: int,
    examples: shared_batches.SharedBatches,
    inputs: inputs_lib.Inputs,
    initial: base.Params | None = None,
    journal: journal_lib.Journal | None = None,
    max_bad_steps: int | None = None,
  ):
    self._trainer, self._examples, self._journal = trainer, examples, journal
    self._inputs = inputs
    self._model_dir, self._skipped_steps = model_dir, skipped_steps.SkippedSteps(max_bad_steps)
    self._checkpoints = checkpoint_manager.Checkpoints(model_dir, keep)
    self._model = run_checkpoints.describe(trainer.objective)
    self._saved = self._checkpoints.latest_step()
    self._class_before = None
    self.resumed = self._saved is not None
    if self._saved is not None:
      before = self._checkpoints.read_place(self._saved)
      self._class_before = before.get('objective')  # Older checkpoints lack it.
      inputs.check(f'the run {model_dir}', before, 'or train in another --model_dir')
      self.state, place = self._checkpoints.restore(self._saved, trainer.abstract, self._model)
      examples.restore(place)
      self._skipped_steps.restore(place)
    else:
      self.state = state_lib.with_parts(trainer.create_state(), initial or {})
    self._iterator = iter(examples)
    self.step = int(self.state.step)
    # Updates in the newest checkpoint, and whether a checkpoint waits for the next good step.
    self._saved_updates, self._save_waits = self.updates, False

  def damaged(self) -> list[str]:
    """Returns a line for each damaged checkpoint that was skipped when the run started."""
    return self._checkpoints.found.lines()

  def beginning(self) -> str:
    """Returns a line that says what is trained, on which devices, and from which step."""
    facts = self.facts()
    mesh = '×'.join(f'{axis} {size}' for axis, size in facts['mesh'].items())
    where = f'resuming at step {self.step}' if self.resumed else 'starting at step 0'
    among = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
    devices = texts.counted(jax.device_count(), f'{jax.devices()[0].device_kind} device')
    parameters = texts.short_count(facts['parameters'])
    lines = [f'{facts["stage"]}: {parameters} parameters on {devices}{among} ({mesh}), {where}']
    if (adapters := self._trainer.objective.lora) is not None:
      lines.append(
        f'these are adapters of rank {adapters["rank"]}; their base, {adapters["base"]}, does not change'
      )
    if self._class_before not in (None, facts['objective']):
      lines.append(
        f'its checkpoint is of the objective {self._class_before}, which is now {facts["objective"]}'
      )
    if self._checkpoints.factored:
      lines.append(whole_moments.line(self._checkpoints.factored))
    options = self._trainer.compiler_options
    if options != compiler_options.CPU:
      lines.append(f"XLA's options: {compiler_options.text(options)}")
    terms = self._trainer.objective.batch_dependent_terms
    microbatches = self._trainer.microbatches
    if terms and microbatches > 1:
      lines.append(
        f'with train.microbatches={microbatches} each microbatch has its own '
        f'{" and ".join(terms)}, so results differ from those of the whole batch'
      )
    return '; '.join(lines)

  def facts(self) -> dict[str, Any]:
    """Returns what the journal records.

    Returns:
      The step, the objective's name ('stage') and its class, the number of parameters, the mesh and
      XLA's options.
    """
    count = sum(leaf.size for leaf in jax.tree.leaves(self._trainer.abstract.params))
    return {
      'step': self.step,
      'stage': self._trainer.objective.name,
      'objective': self._trainer.objective.gin_name,
      'parameters': count,
      'mesh': dict(self._trainer.mesh.shape),
      'compiler_options': self._trainer.compiler_options,
    }

  @property
  def updates(self) -> int:
    """Number of steps that were applied, as of the last `settle`; it sets the learning rate."""
    return self.step - self._skipped_steps.total

  def advance(self) -> dict[str, Shaped[Array, '']]:
    """Starts the next step and returns its metrics, without waiting for them."""
    places = self._examples.places()
    batch = self._trainer.put(next(self._iterator), self._examples.batch_size)
    self.state, metrics = self._trainer.step(self.state, batch)
    self.step += 1
    self._skipped_steps.add(self.step, places, metrics)
    return {name: value for name, value in metrics.items() if name != 'finite'}

  @property
  def unsettled(self) -> int:
    """Number of steps since the last `settle`."""
    return self._skipped_steps.unread

  def settle(self, reporter: reporting.Reporter) -> None:
    """Waits for the steps so far and reports those that were not applied; call it before `save`.

    Raises:
      UserError: if too many consecutive steps were not applied.
    """
    for skipped in self._skipped_steps.read():
      reporter.say(str(skipped), by_all=True)
      if self._journal is not None:
        self._journal.write(
          'skipped step', str(skipped), every_process=True, **dataclasses.asdict(skipped)
        )
    self._skipped_steps.check(self._model_dir, self._checkpoints.steps)
    if self._save_waits and not self._skipped_steps.in_a_row:
      reporter.flush()
      self.save()

  def stop_requested(self) -> bool:
    """Returns whether the run was asked to stop and its processes agreed on this step."""
    run_lock.check()
    self._checkpoints.check()
    return preemption.stop_requested(self.step)

  def save(self, last: bool = False) -> None:
    """Starts writing a checkpoint of this step.

    After a step that was not applied, it writes nothing. The state is not new then, and another
    checkpoint could remove the one from before the bad steps, which the user may need. The
    `settle` of the next good step writes the checkpoint instead.

    Args:
      last: whether the run ends here. Then any update since the last checkpoint is written at once.
    """
    if self._saved == self.step:
      return
    self._save_waits = bool(self._skipped_steps.in_a_row)
    news = self._saved is None or self.updates > self._saved_updates
    if self._save_waits and not (last and news):
      return
    run_lock.confirm()
    place = self._examples.state() | self._inputs.state() | self._skipped_steps.state()
    place['objective'] = self._trainer.objective.gin_name
    self._checkpoints.save(self.step, self.state, place, self._model)
    self._saved, self._saved_updates, self._save_waits = self.step, self.updates, False
    if self._journal is not None:
      self._journal.checkpoint(self.step, self.skipped())

  def finish_saving(self) -> None:
    """Waits until the checkpoint that `save` started is written."""
    self._checkpoints.finish()

  def newest_step(self) -> int | None:
    """Returns the step of the newest whole checkpoint on the disk; None without one."""
    return self._checkpoints.newest_step()

  def interrupted(self) -> str:
    """Returns a line for an interruption from the keyboard: where the run will resume."""
    where = 'from its beginning' if self._saved is None else f'at step {self._saved}'
    return (
      f'interrupted at step {self.step}, which has no checkpoint; started again, the run resumes '
      f'{where}'
    )

  def skipped(self) -> dict[str, int]:
    """Returns {reason: number of examples that could not be read}."""
    return dict(self._examples.skipped)

  def close(self) -> None:
    """Waits for checkpoints that are being written."""
    self._checkpoints.close()

"""A run: its state and its place in the data, one step after another, kept in a folder."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from parti_jax.checkpoints import checkpoint_manager
from parti_jax.checkpoints import run_checkpoints as checkpoints_lib
from parti_jax.checkpoints import whole_moments
from parti_jax.runs import preemption
from parti_jax.runs import run_lock
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import skipped_steps
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib


class Run:
  """A trainer's state and place in the data, in a folder.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    keep: how many checkpoints stay.
    examples: the training examples, `SharedBatches`.
    inputs: what the run is trained with, an `Inputs`.
    initial: parts of the parameters that a new run starts with, as of `initial_parts`.
    journal: where checkpoints and skipped steps are noted, a `Journal`; None for nowhere.
    max_bad_steps: as of `SkippedSteps`.

  Raises:
    UserError: if the checkpoints are of another configuration, vocabulary or tokenizer, or none of
      them is whole.
  """

  def __init__(
    self,
    trainer: trainer_lib.Trainer,
    model_dir,
    keep: int,
    examples,
    inputs: inputs_lib.Inputs,
    initial=None,
    journal=None,
    max_bad_steps: int | None = None,
  ):
    self._trainer, self._examples, self._journal = trainer, examples, journal
    self._inputs = inputs
    self._model_dir, self._skipped_steps = model_dir, skipped_steps.SkippedSteps(max_bad_steps)
    self._checkpoints = checkpoint_manager.Checkpoints(model_dir, keep)
    self._model = checkpoints_lib.describe(trainer.objective)
    self._saved = self._checkpoints.latest_step()
    self.resumed = self._saved is not None
    if self.resumed:
      inputs.check(
        f'the run {model_dir}',
        self._checkpoints.read_place(self._saved),
        'or train in another --model_dir',
      )
      self.state, place = self._checkpoints.restore(self._saved, trainer.abstract, self._model)
      examples.restore(place)
      self._skipped_steps.restore(place)
    else:
      self.state = state_lib.with_parts(trainer.create_state(), initial or {})
    self._iterator = iter(examples)
    self.step = int(self.state.step)
    # Updates in the newest checkpoint, and whether one waits for the next good step.
    self._saved_updates, self._save_waits = self.updates, False

  def damaged(self) -> list[str]:
    """A line on each checkpoint that was found damaged, and passed over, at the beginning."""
    return self._checkpoints.found.lines()

  def beginning(self) -> str:
    """A line that says where training begins."""
    facts = self.facts()
    mesh = '×'.join(f'{axis} {size}' for axis, size in facts['mesh'].items())
    where = f'resuming at step {self.step}' if self.resumed else 'starting at step 0'
    among = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind} devices{among} ({mesh})'
    lines = [f'{facts["stage"]}: {facts["parameters"] / 1e6:.1f}M parameters on {devices}, {where}']
    if self._checkpoints.factored:
      lines.append(whole_moments.line(self._checkpoints.factored))
    own = self._trainer.objective.over_examples
    microbatches = self._trainer.microbatches
    if own and microbatches > 1:
      lines.append(
        f'with train.microbatches={microbatches} each microbatch has its own '
        f'{" and ".join(own)}, so that results differ from those of the whole batch'
      )
    return '; '.join(lines)

  def facts(self) -> dict[str, Any]:
    """What a journal says of a run: objective, number of parameters, mesh and step."""
    count = sum(leaf.size for leaf in jax.tree.leaves(self._trainer.abstract.params))
    return {
      'step': self.step,
      'stage': self._trainer.objective.name,
      'parameters': count,
      'mesh': dict(self._trainer.mesh.shape),
    }

  @property
  def updates(self) -> int:
    """Steps that were applied, as far as `settle` has looked; the learning rate follows them."""
    return self.step - self._skipped_steps.total

  def advance(self):
    """One step; returns its metrics, still on the device."""
    places = self._examples.places()
    batch = self._trainer.put(next(self._iterator), self._examples.batch_size)
    self.state, metrics = self._trainer.step(self.state, batch)
    self.step += 1
    self._skipped_steps.add(self.step, places, metrics)
    return {name: value for name, value in metrics.items() if name != 'finite'}

  @property
  def unsettled(self) -> int:
    """Steps since the last `settle`."""
    return self._skipped_steps.unread

  def settle(self, reporter):
    """Waits for the steps so far, and says which were not applied; call it before `save`.

    Raises:
      UserError: if too many in a row were not.
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
    """Whether the run was asked to stop and all its processes are to stop at this step."""
    run_lock.check()
    self._checkpoints.check()
    return preemption.stop_requested(self.step)

  def save(self, last: bool = False):
    """Starts writing a checkpoint of this step.

    While steps are not applied there is nothing new to write, and the checkpoint from before them
    must stay, since it is the one to go on from: then the next good step's `settle` writes it.

    Args:
      last: whether the run ends here, so that what is new since the last one is written at once.
    """
    if self._saved == self.step:
      return
    self._save_waits = bool(self._skipped_steps.in_a_row)
    news = self._saved is None or self.updates > self._saved_updates
    if self._save_waits and not (last and news):
      return
    run_lock.confirm()
    place = self._examples.state() | self._inputs.state() | self._skipped_steps.state()
    self._checkpoints.save(self.step, self.state, place, self._model)
    self._saved, self._saved_updates, self._save_waits = self.step, self.updates, False
    if self._journal is not None:
      self._journal.checkpoint(self.step, self.skipped())

  def finish_saving(self):
    """Waits until the checkpoint that `save` started is written."""
    self._checkpoints.finish()

  def newest_step(self) -> int | None:
    """Step of the newest whole checkpoint on the disk; None without one."""
    return self._checkpoints.newest_step()

  def interrupted(self) -> str:
    """A line that says what an interruption from the keyboard costs."""
    where = 'from its beginning' if self._saved is None else f'at step {self._saved}'
    return (
      f'interrupted at step {self.step}, without a checkpoint of it; started again, the run '
      f'goes on {where}'
    )

  def skipped(self) -> dict[str, int]:
    """Examples that could not be read, by reason."""
    return dict(self._examples.skipped)

  def close(self):
    """Waits for checkpoints that are being written."""
    self._checkpoints.close()

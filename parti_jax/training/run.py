"""A run: its state and its place in the data, one step after another, kept in a folder."""

from __future__ import annotations

from typing import Any

import jax

from parti_jax.training import checkpoints as checkpoints_lib
from parti_jax.training import preemption
from parti_jax.training import run_lock
from parti_jax.training import trainer as trainer_lib


class Run:
  """A trainer's state and place in the data, in a folder.

  Args:
    trainer: the stage on its mesh.
    model_dir: the run's folder.
    keep: how many checkpoints stay.
    examples: the training examples, `SharedBatches`.
    initial: parts of the parameters that a new run starts with, as of `initial_parts`.
    journal: where checkpoints are noted, a `Journal`; None for nowhere.
  """

  def __init__(self, trainer: trainer_lib.Trainer, model_dir, keep: int, examples, initial=None,
               journal=None):
    self._trainer, self._examples, self._journal = trainer, examples, journal
    self._checkpoints = checkpoints_lib.Checkpoints(model_dir, keep)
    self._model = checkpoints_lib.describe(trainer.stage)
    self._saved = self._checkpoints.latest_step()
    self.resumed = self._saved is not None
    if self.resumed:
      self.state, place = self._checkpoints.restore(self._saved, trainer.abstract, self._model)
      examples.restore(place)
    else:
      self.state = trainer.create_state()
      self.state = self.state.replace(params=self.state.params | (initial or {}))
    self._iterator = iter(examples)
    self.step = int(self.state.step)

  def beginning(self) -> str:
    """A line that says where training begins."""
    facts = self.facts()
    mesh = '×'.join(f'{axis} {size}' for axis, size in facts['mesh'].items())
    where = f'resuming at step {self.step}' if self.resumed else 'starting at step 0'
    among = f' of {jax.process_count()} processes' if jax.process_count() > 1 else ''
    return (f'{facts["stage"]}: {facts["parameters"] / 1e6:.1f}M parameters on '
            f'{jax.device_count()} {jax.devices()[0].device_kind} devices{among} ({mesh}), {where}')

  def facts(self) -> dict[str, Any]:
    """What a journal says of a run: stage, number of parameters, mesh and step."""
    count = sum(leaf.size for leaf in jax.tree.leaves(self._trainer.abstract.params))
    return {'step': self.step, 'stage': self._trainer.stage.name, 'parameters': count,
            'mesh': dict(self._trainer.mesh.shape)}

  def advance(self):
    """One step; returns its metrics, still on the device."""
    batch = self._trainer.put(next(self._iterator), self._examples.batch_size)
    self.state, metrics = self._trainer.step(self.state, batch)
    self.step += 1
    return metrics

  def told_to_stop(self) -> bool:
    """Whether the run was told to stop and all its processes are to stop at this step."""
    run_lock.check()
    return preemption.told_to_stop(self.step)

  def save(self):
    """Starts writing a checkpoint of this step."""
    if self._saved != self.step:
      run_lock.confirm()
      self._checkpoints.save(self.step, self.state, self._examples.state(), self._model)
      self._saved = self.step
      if self._journal is not None:
        self._journal.checkpoint(self.step, self.skipped())

  def newest_step(self) -> int | None:
    """Step of the newest whole checkpoint on the disk; None without one."""
    return self._checkpoints.newest_step()

  def interrupted(self) -> str:
    """A line that says what an interruption from the keyboard costs."""
    where = 'from its beginning' if self._saved is None else f'at step {self._saved}'
    return (f'interrupted at step {self.step}, without a checkpoint of it; started again, the run '
            f'goes on {where}')

  def skipped(self) -> dict[str, int]:
    """Examples that could not be read, by reason."""
    return dict(self._examples.skipped)

  def close(self):
    """Waits for checkpoints that are being written."""
    self._checkpoints.close()

"""Evaluates a run on held-out examples, and draws images of some of them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

import jax
import numpy as np
from jaxtyping import UInt8

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.data import batches
from parti_jax.data import mixtures
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib
from parti_jax.training.objectives import base

_FILE = 'evaluated.json'
_LARGEST = 1 << 10


class HeldOut:
  """Evaluation and images of held-out examples.

  If a checkpoint is due at the same step, the loop writes it first, so that a failure here doesn't
  lose steps. `evaluated.json` in the run's folder has the last step that was evaluated, so a run that
  was killed in between catches up on evaluation and images.

  Each source of a mixture is evaluated separately. The measures of the mixture are the means of
  its sources, with the mixture's weights.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    task: name of the seqio task with the examples.
    split: split of the task.
    batch_size: batch size of evaluation.
    seed: the run's seed.
    evaluate: whether the run is evaluated.
    num_pictures: number of examples to draw images of; 0 for no images.

  Attributes:
    draws: whether images are drawn.
    num_pictures: number of examples that images are drawn of; a small split may have fewer than
      requested.

  Raises:
    UserError: if the split is missing or has no usable example, or if a file that the objective
      draws with is missing or damaged.
  """

  def __init__(
    self,
    trainer: trainer_lib.Trainer,
    model_dir: str | os.PathLike,
    task: str,
    split: str,
    batch_size: int,
    seed: int,
    evaluate: bool,
    num_pictures: int,
  ):
    self._trainer, self._task, self._split = trainer, task, split
    self._seed, self._batch_size = seed, batch_size
    self._file = storage.join(model_dir, _FILE)
    self.draws = bool(num_pictures and trainer.can_draw())
    # Reading examples now reports a bad split at once and not after hours.
    self._shown: Mapping[str, np.ndarray] = (
      self._first(num_pictures if self.draws else 1) if evaluate or self.draws else {}
    )
    self.num_pictures = len(next(iter(self._shown.values()))) if self.draws else 0

  def _open(self, batch_size: int, task: str | None = None) -> batches.Batches:
    # `Trainer.evaluate` needs all examples in every process.
    return batches.Batches(
      task or self._task,
      self._split,
      batch_size,
      self._trainer.objective.feature_lengths(),
      seed=self._seed,
      shuffle=False,
      num_epochs=1,
    )

  def _first(self, count: int) -> dict[str, np.ndarray]:
    with self._open(count) as examples:
      return next(examples)

  def evaluate(self, state: state_lib.TrainState) -> dict[str, float]:
    """Evaluates all examples, with the averaged parameters if there are any.

    Returns:
      {'SPLIT/MEASURE': value}, for mixtures also {'SPLIT/SOURCE/MEASURE': value}.
    """
    params = state_lib.averaged(state)
    if not mixtures.is_one(self._task):
      measured = self._evaluate(params, self._task)
      return {f'{self._split}/{name}': value for name, value in measured.items()}
    found: dict[str, float] = {}
    for task, share in mixtures.tasks(self._task).items():
      for name, value in self._evaluate(params, task).items():
        whole, source = f'{self._split}/{name}', mixtures.source_of(task)
        found[f'{self._split}/{source}/{name}'] = value
        # This one is a count; the others are means over examples.
        weight = 1.0 if name == 'not_finite_examples' else float(share)
        found[whole] = found.get(whole, 0.0) + weight * value
    return found

  def _evaluate(self, params: base.Params, task: str) -> dict[str, float]:
    with self._open(self._batch_size, task) as examples:
      return self._trainer.evaluate(params, examples)

  def pictures(
    self, state: state_lib.TrainState
  ) -> dict[str, UInt8[np.ndarray, 'batch height width 3']]:
    """Draws images of the first `num_pictures` examples, as `Trainer.pictures` does."""
    return self._trainer.pictures(state_lib.averaged(state), self._shown)

  def is_missing(self, step: int) -> bool:
    """Returns whether a run that resumes at `step` was killed before `done(step)`.

    In a folder without the file, such as a new run's, it writes the file and returns False.

    Raises:
      UserError: if the file is damaged.
    """
    try:
      done = int(storage.read_json(self._file, _LARGEST)['step'])
    except FileNotFoundError:
      self.done(step)
      return False
    except (ValueError, LookupError, TypeError) as error:
      raise errors.UserError(f'{self._file} is damaged; remove it') from error
    return done < step

  def done(self, step: int) -> None:
    """Records that evaluation and images of a step are written."""
    if jax.process_index() == 0:
      storage.write(self._file, json.dumps({'step': step}).encode())

"""What a run shows of examples that it is not trained on: measures, and pictures of fixed ones."""

from __future__ import annotations

import json

import jax

from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.data import batches
from parti_jax.data import mixtures
from parti_jax.training import state as state_lib
from parti_jax.training import trainer as trainer_lib

_FILE = 'evaluated.json'
_LARGEST = 1 << 10


class HeldOut:
  """Evaluation and pictures.

  A checkpoint that is due at the same step is written first, so that nothing that goes wrong here
  costs steps. A run that was killed in between finds in its folder, in `evaluated.json`, that
  evaluation and pictures are still missing.

  Each source of a mixture is evaluated by itself, and the measures of the mixture are their means
  by its weights.

  Args:
    trainer: the objective on its mesh.
    model_dir: the run's folder.
    task: the seqio task that gives the examples.
    split: the split to take them from.
    batch_size: examples at once in evaluation.
    seed: of the run.
    evaluate: whether the run is evaluated.
    num_pictures: examples that pictures are drawn of; 0 for no pictures.

  Attributes:
    draws: whether pictures are drawn.
    num_pictures: of how many examples, which are fewer than was asked for in a small split.

  Raises:
    UserError: if the split is missing or has no usable example, or if the objective lacks something to
      draw with.
  """

  def __init__(
    self,
    trainer: trainer_lib.Trainer,
    model_dir,
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
    self.draws = bool(num_pictures and trainer.draws)
    # What can't be read is reported now and not after hours.
    self._shown = self._first(num_pictures if self.draws else 1) if evaluate or self.draws else {}
    self.num_pictures = len(next(iter(self._shown.values()))) if self.draws else 0

  def _open(self, batch_size: int, task: str | None = None) -> batches.Batches:
    # Every process reads all of them, as `Trainer.evaluate` wants.
    return batches.Batches(
      task or self._task,
      self._split,
      batch_size,
      self._trainer.objective.feature_lengths(),
      seed=self._seed,
      shuffle=False,
      num_epochs=1,
    )

  def _first(self, count: int):
    with self._open(count) as examples:
      return next(examples)

  def evaluate(self, state) -> dict[str, float]:
    """Measures of all examples with the parameters that a run is drawn with."""
    params = state_lib.averaged(state)
    if not mixtures.is_one(self._task):
      measured = self._evaluate(params, self._task)
      return {f'{self._split}/{name}': value for name, value in measured.items()}
    found: dict[str, float] = {}
    for task, share in mixtures.tasks(self._task).items():
      for name, value in self._evaluate(params, task).items():
        whole, source = f'{self._split}/{name}', mixtures.source_of(task)
        found[f'{self._split}/{source}/{name}'] = value
        # All but this one are means over examples.
        weight = 1.0 if name == 'not_finite_examples' else float(share)
        found[whole] = found.get(whole, 0.0) + weight * value
    return found

  def _evaluate(self, params, task: str) -> dict[str, float]:
    with self._open(self._batch_size, task) as examples:
      return self._trainer.evaluate(params, examples)

  def pictures(self, state):
    """Pictures of the first `num_pictures` examples, see `Trainer.pictures`."""
    return self._trainer.pictures(state_lib.averaged(state), self._shown)

  def is_missing(self, step: int) -> bool:
    """Whether a run that goes on at `step` was killed before `done` was called for it.

    A folder that does not say, as a new run's, begins to.
    """
    try:
      done = int(storage.read_json(self._file, _LARGEST)['step'])
    except FileNotFoundError:
      self.done(step)
      return False
    except (ValueError, LookupError, TypeError) as error:
      raise errors.UserError(f'{self._file} is damaged; remove it') from error
    return done < step

  def done(self, step: int):
    """Notes that evaluation and pictures of a step are written."""
    if jax.process_index() == 0:
      storage.write(self._file, json.dumps({'step': step}).encode())

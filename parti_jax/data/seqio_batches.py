"""Examples of third-party tasks and mixtures in seqio's registry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import datasets
from parti_jax.data import examples
from parti_jax.data import streams
from parti_jax.data import tasks
from parti_jax.data.feature_converter import converter_for
from parti_jax.data.quiet_tensorflow import seqio
from parti_jax.data.quiet_tensorflow import tf

# Marks TensorFlow's message of an exception in a Python function.
_IN_PYTHON = '\nTraceback (most recent call last):'


class SeqioExamples:
  """The examples of a task or mixture in seqio's registry, read by seqio.

  Seqio has no index, so restoring a position reads and prepares the epoch up to there.

  Args:
    task: name of the task.
    split: the split.
    feature_lengths: as in `Batches`.
    seed: determines the order.
    shuffle: whether to shuffle.
    num_epochs: epochs to read; None for no end.
    share: index of the share.
    shares: number of shares.

  Attributes:
    fingerprints: fingerprint of the captions' vocabulary, if it is a SentencePiece vocabulary.
    place: the epoch of the next example, and the examples taken in it before.

  Raises:
    UserError: the task doesn't exist, its data can't be read, or the lengths don't fit it.
  """

  def __init__(
    self,
    task: str,
    split: str,
    feature_lengths: examples.Lengths,
    seed: int,
    shuffle: bool,
    num_epochs: int | None,
    share: int,
    shares: int,
  ):
    self._task = tasks.get_task(task)
    datasets.check_lengths(task, self._task.output_features, feature_lengths)
    self._split, self._lengths, self._seed = split, dict(feature_lengths), seed
    self._converter = converter_for(feature_lengths)
    self._shuffle, self._num_epochs = shuffle, num_epochs
    self._shard_info = seqio.ShardInfo(share, shares) if shares > 1 else None
    self.fingerprints: dict[str, Fingerprint | None] = {
      'vocabulary': tasks.vocabulary_fingerprint(self._task),
      'tokenizer': None,
    }
    self._epoch = self._taken = 0
    self._stream = self._open_epoch()

  @property
  def place(self) -> tuple[int, int]:
    return self._epoch, self._taken

  def places(self, count: int) -> list[tuple]:
    """Returns [(epoch, taken, count)] for the next examples."""
    return [(*self.place, count)]

  def seek(self, epoch: int, read: int) -> None:
    """Moves to the example with `read` examples before it in an epoch."""
    self.restore({'epoch': epoch, 'taken': read})

  def counts(self, name: str) -> dict[str, int]:
    """Returns {}: such tasks don't report what they skip."""
    del name
    return {}

  def state(self) -> dict[str, Any]:
    """Returns the position of the next example."""
    return {'epoch': self._epoch, 'taken': self._taken, 'skipped': {}, 'shortened': {}}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues where `state` was taken."""
    self._stream.close()
    self._epoch, self._taken = state['epoch'], state['taken']
    self._stream = self._open_epoch()

  def close(self) -> None:
    """Stops prefetching."""
    self._stream.close()

  def take(self, count: int) -> dict[str, np.ndarray]:
    """Returns the next examples, stacked; fewer after the last epoch, {} at the end."""
    found: list[dict[str, np.ndarray]] = []
    while len(found) < count and (self._num_epochs is None or self._epoch < self._num_epochs):
      try:
        found.append(next(self._stream))
        self._taken += 1
      except StopIteration:
        self._end_epoch()
      except tf.errors.OpError as error:
        problem = _data_problem(error)
        if problem is None:
          raise
        raise UserError(f'{self._task.name}, {self._split}: reading failed: {problem}') from error
    return examples.stacked(found)

  def _open_epoch(self) -> streams.Stream:
    # Combines seed and epoch into one of seqio's int32 seeds.
    seed = int(np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)[0] >> 2)
    dataset = seqio.get_dataset(
      self._task,
      self._lengths,
      self._converter,
      dataset_split=self._split,
      shuffle=self._shuffle,
      num_epochs=1,
      seed=seed,
      shard_info=self._shard_info,
      verbose=False,
    )
    return streams.Stream(dataset.skip(self._taken).prefetch(64))

  def _end_epoch(self) -> None:
    if not self._taken:
      raise UserError(f'{self._task.name}, {self._split}: no usable example')
    self._stream.close()
    self._epoch, self._taken = self._epoch + 1, 0
    if self._num_epochs is None or self._epoch < self._num_epochs:
      self._stream = self._open_epoch()


def _data_problem(error: tf.errors.OpError) -> str | None:
  """Returns a problem with the data in one line; None for other errors in Python code."""
  if _IN_PYTHON not in error.message:
    return error.message.splitlines()[0]
  found = re.search(rf'\bUserError: (.*?){re.escape(_IN_PYTHON)}', error.message, re.DOTALL)
  return found and ' '.join(found[1].split())

"""Batches of a task for training and evaluation, with instant resuming at any position."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any
from typing import TYPE_CHECKING

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import datasets
from parti_jax.data import examples
from parti_jax.data import mixtures
from parti_jax.data import share as share_lib

if TYPE_CHECKING:
  from parti_jax.data import seqio_batches

# Format version of `Batches.state()`.
STATE_VERSION = 2


class Batches:
  """An iterator of batches: dicts of numpy arrays with the model's features.

  Each epoch has its own shuffled order, given by the seed and the epoch's number. A batch that
  reaches the end of an epoch is filled up from the next one, so all examples are used equally
  often. With `num_epochs`, the last batch may be short. The same arguments give the same batches,
  and `restore(state())` continues exactly where the state was taken, without reading up to there.

  With `training`, the text of some examples is dropped for classifier-free guidance, at the rate
  `examples.drop_rate`, regardless of the split's name. Otherwise all texts are kept.

  Prefetching uses threads and, if gin says so, processes, until `close` or the end of a `with`
  block. `share.Settings` has the options.


  Args:
    task: name of a task of `datasets`, of a mixture that gin configures (`mixtures`), or of any
      task or mixture in seqio's registry.
    split: the split, such as 'train'.
    batch_size: examples per batch.
    feature_lengths: the length of each of the task's features, such as {'images': 64},
      {'inputs': 32, 'images': 64} or {'inputs': 32, 'targets': 64}. The length of a picture is its
      height and width in pixels.
    seed: determines the order of the examples and which texts are dropped.
    shuffle: whether to shuffle; otherwise the source's order is kept.
    num_epochs: epochs to read; None for no end.
    share: index of the part of the split to read; each share has its own state.
    shares: number of parts that the split is divided into.
    training: whether the batches train a model, so that texts are dropped for guidance.
    settings: resources for reading; None for gin's settings.

  Raises:
    UserError: the task doesn't exist, its data can't be read, or the lengths don't fit it.
  """

  def __init__(
    self,
    task: str,
    split: str,
    batch_size: int,
    feature_lengths: examples.Lengths,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    share: int = 0,
    shares: int = 1,
    training: bool = False,
    settings: share_lib.Settings | None = None,
  ):
    if batch_size < 1:
      raise UserError(f'the batch size is {batch_size}; it must be at least 1')
    self._batch_size, self._task = batch_size, task
    self._examples: share_lib.ShareExamples | mixtures.Mixed | seqio_batches.SeqioExamples
    if not (datasets.is_ours(task) or mixtures.is_one(task)):
      from parti_jax.data import seqio_batches  # Imports TensorFlow.

      self._examples = seqio_batches.SeqioExamples(
        task, split, feature_lengths, seed, shuffle, num_epochs, share, shares
      )
      return
    reading = share_lib.Reading(
      seed=seed,
      shuffle=shuffle,
      share=share,
      shares=shares,
      num_epochs=num_epochs,
      settings=settings or share_lib.Settings().divided(1),
    )
    self._examples = mixtures.opened(task, split, feature_lengths, reading, training)

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """Fingerprints of the captions' vocabulary and the tokens' tokenizer; None if unknown."""
    return self._examples.fingerprints

  @property
  def skipped(self) -> dict[str, int]:
    """Returns {reason: examples skipped so far}, up to the next example."""
    return self._examples.counts('skipped')

  @property
  def shortened(self) -> dict[str, int]:
    """Returns {reason: examples that are used only in part}."""
    return self._examples.counts('shortened')

  @property
  def place(self) -> tuple[int, int]:
    """The epoch of the next example, and the number of examples read before it in that epoch."""
    return self._examples.place

  def places(self) -> list[tuple]:
    """Returns (epoch, read, count), and in a mixture the task, for each part of the next batch."""
    return self._examples.places(self._batch_size)

  def seek(self, epoch: int, read: int) -> None:
    """Moves to the example with `read` examples before it in an epoch."""
    self._examples.seek(epoch, read)

  def state(self) -> dict[str, Any]:
    """Returns the position of the next batch and the counts of skipped examples, as JSON."""
    return {'version': STATE_VERSION, **self._examples.state()}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues where `state()` was taken, in any process with the same arguments.

    Raises:
      UserError: the state comes from an older version, which had no index of examples, or from
        other sources.
    """
    if state.get('version') != STATE_VERSION:
      raise UserError(
        'the checkpoint stores its data position in the format of an older version of parti_jax, '
        'which read in another order; set train.restart_data=True to continue with a new pass '
        'over the data, or continue with the older version'
      )
    mixtures.check_state(self._task, state)
    self._examples.restore(state)

  def close(self) -> None:
    """Stops prefetching; keeps the state and the counts."""
    self._examples.close()

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    found = self._examples.take(self._batch_size)
    if not found:
      raise StopIteration
    return found

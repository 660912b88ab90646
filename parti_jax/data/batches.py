"""Batches of a task for training and evaluation, which can be resumed anywhere at once."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import datasets
from parti_jax.data import mixtures
from parti_jax.data import share as share_lib

# The form of `Batches.state()`.
STATE_VERSION = 2


class Batches:
  """An iterator of batches, dicts of numpy arrays with the model's features.

  Each epoch is shuffled on its own, by the seed and the epoch's number. The short rest of an epoch
  is completed with the first examples of the next one, so that every example is used equally often;
  with `num_epochs`, the last batch may be short. The same arguments give the same batches, and
  `restore(state())` goes on exactly where the state was taken, at once wherever that is.

  With `training`, the text of some examples is dropped for classifier-free guidance (see
  `examples.drop_rate`), whatever the split is called. Without it, all texts are kept.

  Reading ahead takes threads and, where gin says so, processes, until `close` or until the end of a
  `with` block; see `share.Settings`.

  Args:
    task: name of a task (see `datasets`), of a mixture that gin configures (see `mixtures`), or of
      any task or mixture in seqio's registry.
    split: the split, such as 'train'.
    batch_size: examples a batch.
    feature_lengths: the length of each of the task's features, such as {'images': 64},
      {'inputs': 32, 'images': 64} or {'inputs': 32, 'targets': 64}. For pictures it is their height
      and width in pixels.
    seed: decides the order of the examples and whose text is dropped.
    shuffle: whether to shuffle; else the source's order is kept.
    num_epochs: epochs to read; None for no end.
    share: which of the `shares` parts of the split to read; each has a state of its own.
    shares: into how many parts the split is divided.
    training: whether a model is trained on the batches, so that texts are dropped for guidance.
    settings: what reading may use; None for what gin says.

  Raises:
    UserError: there is no such task, its data can't be read, or the lengths don't fit it.
  """

  def __init__(
    self,
    task: str,
    split: str,
    batch_size: int,
    feature_lengths: Mapping[str, int],
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
    if not (datasets.is_ours(task) or mixtures.is_one(task)):
      from parti_jax.data import seqio_batches

      self._examples = seqio_batches.SeqioExamples(
        task, split, feature_lengths, seed, shuffle, num_epochs, share, shares
      )
      return
    reading = share_lib.Reading(
      None, seed, shuffle, share, shares, num_epochs, settings or share_lib.Settings().divided(1)
    )
    self._examples = mixtures.opened(task, split, feature_lengths, reading, training)

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """Those of the captions' vocabulary and of the tokens' tokenizer, as far as they are known."""
    return self._examples.fingerprints

  @property
  def skipped(self) -> dict[str, int]:
    """Reason -> number of examples left out so far, up to the next one."""
    return self._examples.counts('skipped')

  @property
  def shortened(self) -> dict[str, int]:
    """Reason -> number of examples that are used, but not whole."""
    return self._examples.counts('shortened')

  @property
  def place(self) -> tuple[int, int]:
    """The epoch of the next example, and the examples read in it before."""
    return self._examples.place

  def places(self) -> list[tuple]:
    """(epoch, read, count), and in a mixture the task, of each part of the next batch."""
    return self._examples.places(self._batch_size)

  def seek(self, epoch: int, read: int) -> None:
    """Goes to the example before which so many were read in an epoch."""
    self._examples.seek(epoch, read)

  def state(self) -> dict[str, Any]:
    """Returns where the next batch starts, and what was left out before; JSON."""
    return {'version': STATE_VERSION, **self._examples.state()}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on where `state()` was taken, in this or another process with the same arguments.

    Raises:
      UserError: the state is of an older version, from before examples could be found by index, or
        of other sources.
    """
    if state.get('version') != STATE_VERSION:
      raise UserError(
        'the checkpoint has its place in the data in the form of an older version of parti_jax, '
        'which read in another order; set train.restart_data=True to go on with a new pass over '
        'the data, or go on with the older version'
      )
    mixtures.check_state(self._task, state)
    self._examples.restore(state)

  def close(self) -> None:
    """Ends reading ahead; the state and the counts stay."""
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

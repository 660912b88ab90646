"""Batches of a seqio task for training and evaluation, which can be resumed anywhere."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterator, Mapping

import numpy as np
from absl import logging

from parti_jax.data import streams, tally, tasks
from parti_jax.data.feature_converter import converter_for
from parti_jax.data.quiet_tensorflow import seqio, tf
from parti_jax.errors import UserError
from parti_jax.fingerprints import Fingerprint


# Opening an epoch takes up to a second, so a small source is gone through several times in one.
_LEAST_EXAMPLES = 2048
# The share of an epoch that can't be used from which on something must be wrong with the source.
_MUCH = 0.5
# What a `tally.Reading` counts.
_TALLIES = ('skipped', 'shortened')
# How TensorFlow's message for an exception in a Python function ends.
_IN_PYTHON = '\nTraceback (most recent call last):'


class Batches:
  """An iterator of batches, dicts of numpy arrays with the converter's features.

  Each epoch is shuffled anew, by the seed and the epoch's number; where an epoch would be of few
  examples, and no number of epochs is given, several are taken as one. The short rest of an epoch is
  completed with the first examples of the next one, so that every example is used equally often;
  with `num_epochs`, the last batch may be short. The same arguments give the same batches, and
  `restore(state())` goes on exactly where the state was taken. The tasks of `parti_jax.data.tasks`
  number their examples before they decode them, so that going on decodes none of the earlier ones.

  Threads read ahead until `close`, or until the end of a `with` block.

  With `training`, the text of some examples is dropped for classifier-free guidance (see
  `preprocessors.drop_text`), whatever the split is called. Without it, all texts are kept.

  Attributes:
    skipped: reason -> number of examples left out so far in this run, because their picture or
      caption can't be used. Exact for numbered examples; of others, and of what has no number such
      as the rest of a damaged file, what is read in advance in this epoch counts too.
    shortened: the same for captions that were cut to the text's length.
  """

  def __init__(
      self,
      task: str,
      split: str,
      batch_size: int,
      feature_lengths: Mapping[str, int],
      converter: seqio.FeatureConverter | None = None,
      seed: int = 0,
      shuffle: bool = True,
      num_epochs: int | None = None,
      share: int = 0,
      shares: int = 1,
      training: bool = False,
  ):
    """Opens a task.

    Args:
      task: name of a task or mixture (see `parti_jax.data.tasks`).
      split: the split, 'train'.
      batch_size: examples a batch.
      feature_lengths: the length of each of the task's features, such as {'images': 64},
        {'inputs': 32, 'images': 64} or {'inputs': 32, 'targets': 64}. For pictures it is their
        height and width in pixels.
      converter: turns the task's features into the model's; None for the one that fits.
      seed: decides the order of the examples and whose text is dropped.
      shuffle: whether to shuffle; else the source's order is kept.
      num_epochs: epochs to read; None for no end.
      share: which of the `shares` parts of the split to read; each has a state of its own.
      shares: into how many parts the split is divided.
      training: whether a model is trained on the batches, so that texts are dropped for guidance.

    Raises:
      UserError: there is no such task, its data can't be read, or the lengths don't fit it.
    """
    if batch_size < 1:
      raise UserError(f'the batch size is {batch_size}; it must be at least 1')
    self._task = tasks.get_task(task, feature_lengths.get('images', 64))
    tasks.check_lengths(self._task, feature_lengths)
    self._split = split
    self._batch_size = batch_size
    self._lengths = dict(feature_lengths)
    self._numbered = converter is None and tasks.numbers_examples(self._task)
    self._converter = converter or converter_for(feature_lengths, self._numbered)
    self._seed = seed
    self._shuffle = shuffle
    self._num_epochs = num_epochs
    self._training = training
    self._shard_info = seqio.ShardInfo(share, shares) if shares > 1 else None
    self._epoch = 0
    self._taken = 0
    # The number after that of the last example that was taken in this epoch; None where the task
    # does not number them.
    self._read = 0 if self._numbered else None
    # Counts of the epochs that have ended, and of this one up to where reading began.
    self._before = {name: collections.Counter() for name in _TALLIES}
    # What the last batch left of a chunk, None where it took all.
    self._rest = None
    self._chunks = self._open_epoch()

  @property
  def skipped(self) -> dict[str, int]:
    """Reason -> number of examples left out."""
    return self._counts('skipped')

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """Those of the captions' vocabulary and of the tokens' tokenizer, as far as they are known."""
    return {'vocabulary': tasks.vocabulary_fingerprint(self._task),
            'tokenizer': tasks.tokenizer_fingerprint(self._task)}

  @property
  def shortened(self) -> dict[str, int]:
    """Reason -> number of examples that are used, but not whole."""
    return self._counts('shortened')

  @property
  def place(self) -> tuple[int, int]:
    """The epoch of the next example, and the examples taken in it before; part of `state`."""
    return self._epoch, self._taken

  def state(self) -> dict:
    """Returns where the next batch starts, and what was left out before.

    Returns:
      'epoch'; 'taken', examples taken in it; 'read', the number in this epoch of the next example
      to read, None where the task does not number them; and 'skipped' and 'shortened' up to there.
    """
    return {'epoch': self._epoch, 'taken': self._taken, 'read': self._read,
            **{name: self._counts(name, numbered=True) for name in _TALLIES}}

  def restore(self, state: Mapping) -> None:
    """Goes on where `state()` was taken, in this or another process with the same arguments.

    Where examples are numbered, those before are read and not decoded. Otherwise, as with a state
    that has no number, they are decoded too, which takes as long as it took the first time.
    """
    self._epoch = int(state['epoch'])
    self._taken = int(state['taken'])
    self._read = state.get('read')
    self._before = {name: collections.Counter(state.get(name, {})) for name in _TALLIES}
    self._rest = None
    self._chunks.close()
    self._chunks = self._open_epoch()

  def close(self) -> None:
    """Ends reading ahead; the state and the counts stay."""
    self._chunks.close()

  def __enter__(self) -> Batches:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def _counts(self, name: str, numbered: bool = False) -> dict[str, int]:
    """Counts of this run up to the next example; `numbered` leaves out what has no number."""
    counted = getattr(self._reading, name).counts(self._read, numbered)
    return dict((self._before[name] + collections.Counter(counted)).most_common())

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    parts, missing = [], self._batch_size
    while missing and (part := self._next_part(missing)) is not None:
      parts.append(part)
      missing -= _length(part)
    if not parts:
      raise StopIteration
    return {name: np.concatenate([part[name] for part in parts])
            for name in parts[0] if name != 'number'}

  def _next_part(self, most: int) -> dict[str, np.ndarray] | None:
    """Returns the next examples of one epoch, at most so many; None after the last epoch."""
    while self._num_epochs is None or self._epoch < self._num_epochs:
      try:
        chunk = self._rest or next(self._chunks)
      except StopIteration:
        self._end_epoch()
        continue
      except tf.errors.OpError as error:
        problem = _of_the_data(error)
        if problem is None:
          raise
        raise UserError(f'{self._task.name}, {self._split}: reading failed: {problem}') from error
      part = {name: values[:most] for name, values in chunk.items()}
      if self._numbered:
        self._read = int(part['number'][-1]) + 1
      self._rest = {name: values[most:] for name, values in chunk.items()}
      if not _length(self._rest):
        self._rest = None
      self._taken += _length(part)
      return part
    return None

  def _open_epoch(self) -> streams.Stream:
    """Returns an iterator over the rest of the present epoch, in chunks of examples."""
    # One number for seqio, in the range of its int32 seeds, from the two that count.
    seed = int(np.random.SeedSequence([self._seed, self._epoch]).generate_state(1)[0] >> 2)
    # What was read in advance of an earlier place must not be counted.
    self._reading = tally.Reading(drop_text=self._training, start=self._read or 0)
    with tally.reading(self._reading):
      dataset = seqio.get_dataset(
          self._task,
          self._lengths | ({'number': 1} if self._numbered else {}),
          self._converter,
          dataset_split=self._split,
          shuffle=self._shuffle,
          num_epochs=self._repeats(),
          seed=seed,
          shard_info=self._shard_info,
          verbose=False,
      )
    if self._read is None:  # So it is too in a state that was written before there were numbers.
      dataset = dataset.skip(self._taken)
    return streams.Stream(dataset.batch(self._batch_size).prefetch(2))

  def _repeats(self) -> int:
    """Returns how often the source is gone through in what counts as an epoch here."""
    if self._num_epochs is not None:
      return 1
    count = self._task.num_input_examples(self._split)
    return max(1, _LEAST_EXAMPLES // count) if count else 1

  def _end_epoch(self) -> None:
    """Reports on an epoch that has ended and opens the next one."""
    where = f'{self._task.name}, {self._split}'
    for name in _TALLIES:
      self._before[name].update(getattr(self._reading, name).counts())
    skipped, shortened = (tally.told(self._before[name]) for name in _TALLIES)
    if not self._taken:
      reasons = f'; skipped {skipped}' if skipped else '; there is none at all'
      share = self._shard_info
      part = (f'share {share.index + 1} of {share.num_shards} (train.data_shares) of '
              if share else '')
      raise UserError(
          f'{where}: there is no usable example in {part}{tasks.place(self._task)}{reasons}')
    if skipped or shortened:
      logging.warning(
          '%s: epoch %d ended after %d examples; so far skipped: %s; kept in part: %s',
          where, self._epoch, self._taken, skipped or 'none', shortened or 'none',
      )
    lost = sum(self._reading.skipped.counts().values())
    if lost > _MUCH * (lost + self._taken):
      logging.error(
          '%s: %d of %d examples of epoch %d of %s could not be used; look at what was skipped and '
          'why before you go on', where, lost, lost + self._taken, self._epoch, tasks.place(self._task))
    self._reading = tally.Reading()
    self._chunks.close()
    self._epoch += 1
    self._taken = 0
    self._read = 0 if self._numbered else None
    if self._num_epochs is None or self._epoch < self._num_epochs:
      self._chunks = self._open_epoch()


def _of_the_data(error: tf.errors.OpError) -> str | None:
  """Returns what is wrong with the data in one line; None for any other error in Python code."""
  if _IN_PYTHON not in error.message:
    return error.message.splitlines()[0]
  found = re.search(rf'\bUserError: (.*?){re.escape(_IN_PYTHON)}', error.message, re.DOTALL)
  return found and ' '.join(found[1].split())


def _length(examples: Mapping[str, np.ndarray]) -> int:
  """Returns the number of examples."""
  return len(next(iter(examples.values())))

"""Prepared examples of a share of a split, in a reproducible order from any position."""

from __future__ import annotations

import abc
import collections
import concurrent.futures
import dataclasses
import os
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import TYPE_CHECKING

import gin
import numpy as np
from absl import logging

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.data import examples as examples_lib
from parti_jax.data import order as order_lib
from parti_jax.data import shard_epochs
from parti_jax.data import tally
from parti_jax.data.damage import Damaged
from parti_jax.data.damage import Unusable
from parti_jax.data.quiet_grain import grain
from parti_jax.data.sources import base

if TYPE_CHECKING:
  from parti_jax.data import datasets

# If more of an epoch than this is unusable, something must be wrong with the source.
_MAX_UNUSABLE = 0.5
_TALLIES = ('skipped', 'shortened')
# Examples read and prepared at once: with pictures, and without, which are prepared faster than
# they could be handed between threads.
_PICTURES_AT_ONCE, _OTHERS_AT_ONCE = 4, 256


@gin.configurable('loader')
@checks.bounded(num_threads=(0, 1024), num_workers=(0, 1024), prefetch=(1, None))
@dataclasses.dataclass(frozen=True)
class Settings:
  """Resources of a host for reading; they don't change what is read.

  Attributes:
    num_threads: threads that read and decode pictures; None for one per core.
    num_workers: processes that read and decode pictures, each with `num_threads` threads; 0 for
      none. Sources that are read from their beginning, such as tars, are always decoded in threads.
    prefetch: examples that are prepared ahead of their use, over all shares.
  """

  num_threads: int | None = None
  num_workers: int = 0
  prefetch: int = 256

  def divided(self, shares: int) -> Settings:
    """Returns the settings of one of several shares, so that a host's total stays the same."""
    threads = os.cpu_count() or 1 if self.num_threads is None else self.num_threads
    part = lambda count: max(1, count // shares) if count else 0
    return Settings(part(threads), part(self.num_workers), max(1, self.prefetch // shares))


@dataclasses.dataclass
class Outcome:
  """A prepared example, or the reason why it can't be used.

  Attributes:
    epoch: index of the pass over the split.
    features: the prepared example, such as a model's inputs; None if it can't be used.
    reason: a short reason why not.
    where: the file to name in a warning, or ''.
    notes: each thing that was lost of a used example.
  """

  epoch: int
  features: dict[str, Any] | None
  reason: str = ''
  where: str = ''
  notes: Sequence[str] = ()


def prepared(
  prepare: examples_lib.Prepare, epoch: int, example: base.Example | Damaged, draw: float
) -> Outcome:
  """Prepares an example; returns the reason if it can't be used."""
  if isinstance(example, Damaged):
    return Outcome(epoch, None, example.reason, example.where)
  try:
    features, notes = prepare(example, draw)
    return Outcome(epoch, features, notes=notes)
  except Unusable as error:
    return Outcome(epoch, None, str(error))


class Stream(abc.ABC):
  """The outcomes of a share's examples in order; `state` is the position of the next one."""

  @abc.abstractmethod
  def __next__(self) -> Outcome:
    """Returns the next outcome; raises StopIteration after the last epoch."""

  @abc.abstractmethod
  def state(self) -> dict[str, Any]:
    """Returns the position of the next outcome as JSON; `open_stream` continues from it."""

  @abc.abstractmethod
  def close(self) -> None:
    """Stops prefetching."""


@dataclasses.dataclass(frozen=True)
class Reading:
  """How a share is read.

  Attributes:
    prepare: prepares an example; the default gives no features.
    seed: determines the order and which texts are dropped.
    shuffle: whether to shuffle.
    share: index of the share.
    shares: number of shares.
    num_epochs: passes over the split; None for no end.
    settings: resources for reading.
  """

  prepare: examples_lib.Prepare = examples_lib.Preparation()
  seed: int = 0
  shuffle: bool = True
  share: int = 0
  shares: int = 1
  num_epochs: int | None = None
  settings: Settings = Settings(0, 0, 1)


def open_stream(
  opened: base.Records | base.Shards, reading: Reading, state: Mapping[str, Any] | None = None
) -> Stream:
  """Opens a share.

  Args:
    opened: the split.
    reading: how to read it.
    state: where to begin, from `Stream.state`; None for the first example.
  """
  if isinstance(opened, base.Shards):
    return _ShardStream(opened, reading, state)
  return _RecordStream(opened, reading, (state or {}).get('position', 0))


def patience(opened: base.Records | base.Shards, reading: Reading) -> int:
  """Returns after how many consecutive epochs without a usable example a share counts as empty.

  A share with different files in each epoch may get only empty or damaged ones in some epochs.
  """
  if (
    isinstance(opened, base.Shards)
    and reading.shuffle
    and reading.num_epochs is None
    and 1 < reading.shares <= len(opened.files)
  ):
    return 4 * len(opened.files)
  return 1


def stream_state(
  opened: base.Records | base.Shards, reading: Reading, epoch: int, read: int
) -> dict[str, Any]:
  """Returns the state of a stream with `read` examples before it in an epoch."""
  if isinstance(opened, base.Shards):
    return {'epoch': epoch, 'skip': read}
  length = len(order_lib.Order(len(opened), 0, False, reading.share, reading.shares))
  if read > length:
    raise _beyond_the_end(epoch, read, length)
  return {'position': epoch * length + read}


def _beyond_the_end(epoch: int, read: int, length: int) -> UserError:
  return UserError(
    f'the place has {read} examples before it in epoch {epoch}, which has {length}; '
    'give a place in the same data'
  )


class _ReadChunk:
  """Reads and prepares a chunk of a share's records; picklable, for worker processes."""

  def __init__(
    self, records: base.Records, reading: Reading, start: int, size: int, end: int | None
  ):
    self._records, self._reading = records, reading
    self._start, self._size, self._end = start, size, end
    self._order = order_lib.Order(
      len(records), reading.seed, reading.shuffle, reading.share, reading.shares
    )
    self._draw_seed = order_lib.mixed(reading.seed, 'draws', reading.share)

  def __call__(self, chunk: int) -> list[Outcome]:
    first = self._start + int(chunk) * self._size
    last = first + self._size if self._end is None else min(first + self._size, self._end)
    positions = range(first, last)
    found = self._records.read([self._order.index(position) for position in positions])
    draws = examples_lib.draws(self._draw_seed, first, len(positions))
    return [
      prepared(self._reading.prepare, position // len(self._order), example, draw)
      for position, example, draw in zip(positions, found, draws)
    ]


class _RecordStream(Stream):
  """A share of records, read through grain."""

  def __init__(self, records: base.Records, reading: Reading, position: int):
    settings, length = (
      reading.settings,
      len(order_lib.Order(len(records), 0, False, reading.share, reading.shares)),
    )
    end = None if reading.num_epochs is None else reading.num_epochs * length
    self._position, self._records = position, records
    self._chunk: Iterator[Outcome] = iter(())
    self._chunks: Any = None
    if length == 0 or (end is not None and position >= end):
      return
    pictures = reading.prepare.image_size is not None
    size = _PICTURES_AT_ONCE if pictures else _OTHERS_AT_ONCE
    count = 2**62 // size if end is None else -(-(end - position) // size)
    threads = settings.num_threads if pictures else 0
    buffer = max(threads, -(-settings.prefetch // size)) if threads else 0
    chunks = (
      grain.MapDataset.range(count)
      .map(_ReadChunk(records, reading, position, size, end))
      .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
    )
    if settings.num_workers:
      chunks = chunks.mp_prefetch(
        grain.MultiprocessingOptions(
          num_workers=settings.num_workers,
          per_worker_buffer_size=max(1, settings.prefetch // (size * settings.num_workers)),
        )
      )
    self._chunks = iter(chunks)

  def __next__(self) -> Outcome:
    outcome = next(self._chunk, None)
    while outcome is None:
      if self._chunks is None:
        raise StopIteration
      try:
        self._chunk = iter(next(self._chunks))
      except RuntimeError as error:
        if 'Worker process' not in str(error):
          raise
        raise UserError(
          'a process of loader.num_workers ended, perhaps out of memory; set '
          f'fewer, or a lower loader.prefetch ({error})'
        ) from error
      outcome = next(self._chunk, None)
    self._position += 1
    return outcome

  def state(self) -> dict[str, int]:
    return {'position': self._position}

  def close(self) -> None:
    if self._chunks is not None:
      self._chunks.close()
    self._chunks, self._chunk = None, iter(())
    self._records.close()


class _ShardStream(Stream):
  """A share of files that are read from their beginning.

  Encoded examples are shuffled within windows, then decoded in threads.
  """

  def __init__(self, shards: base.Shards, reading: Reading, state: Mapping[str, Any] | None):
    self._shards, self._reading = shards, reading
    self._draw_seed = order_lib.mixed(reading.seed, 'draws', reading.share)
    pictures = reading.prepare.image_size is not None
    threads = reading.settings.num_threads if pictures else 0
    self._executor = (
      concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix='decode')
      if threads
      else None
    )
    # Examples in preparation, each with the state after it.
    self._ahead: collections.deque[concurrent.futures.Future[tuple[Outcome, dict[str, Any]]]] = (
      collections.deque()
    )
    self._epoch = state['epoch'] if state else 0
    self._raw = shard_epochs.raw_epoch(self._shards, self._reading, self._epoch)
    if state and 'reader' in state:
      self._raw.set_state(state['reader'])
    skip = state.get('skip', 0) if state else 0
    for skipped in range(skip):
      try:
        next(self._raw)
      except StopIteration:
        raise _beyond_the_end(self._epoch, skip, skipped) from None
    self._state = {'epoch': self._epoch, 'reader': self._raw.get_state()}

  def __next__(self) -> Outcome:
    if not self._executor:
      outcome, self._state = self._prepare(*self._next_raw())
      return outcome
    try:
      while len(self._ahead) < self._reading.settings.prefetch:
        raw = self._next_raw()
        self._ahead.append(self._executor.submit(self._prepare, *raw))
    except StopIteration:
      if not self._ahead:
        raise
    outcome, self._state = self._ahead.popleft().result()
    return outcome

  def _next_raw(self) -> tuple[int, int, base.Example | Damaged, dict[str, Any]]:
    while self._reading.num_epochs is None or self._epoch < self._reading.num_epochs:
      try:
        number, example = next(self._raw)
        return self._epoch, number, example, self._raw.get_state()
      except StopIteration:
        self._epoch += 1
        self._raw = shard_epochs.raw_epoch(self._shards, self._reading, self._epoch)
        if (
          self._epoch > self._state['epoch'] + patience(self._shards, self._reading)
          and not self._ahead
        ):
          break  # Epochs without examples.
    raise StopIteration

  def _prepare(
    self, epoch: int, number: int, example: base.Example | Damaged, reader: dict[str, Any]
  ) -> tuple[Outcome, dict[str, Any]]:
    # Epochs may have any length, so their draws begin far apart.
    (draw,) = examples_lib.draws(self._draw_seed, epoch * 2**40 + number, 1)
    return prepared(self._reading.prepare, epoch, example, draw), {'epoch': epoch, 'reader': reader}

  def state(self) -> dict[str, Any]:
    return self._state

  def close(self) -> None:
    if self._executor:
      self._executor.shutdown(wait=True, cancel_futures=True)
      self._executor = None
    self._ahead.clear()
    self._raw.close()


class ShareExamples:
  """The usable examples of a share of a split; counts the others.

  Args:
    dataset: the task's data.
    split: the split.
    reading: how to read it.

  Attributes:
    fingerprints: fingerprints of the dataset.
    place: the epoch of the next example, and the examples read in it before.
  """

  def __init__(self, dataset: datasets.Dataset, split: str, reading: Reading):
    self._dataset, self._split, self._reading = dataset, split, reading
    self.fingerprints = dataset.fingerprints
    self._opened = dataset.open(split)
    self._counts: dict[str, collections.Counter[str]] = {
      name: collections.Counter() for name in _TALLIES
    }
    # The current epoch: its index, and the examples taken and skipped in it.
    self._epoch = self._taken = self._lost = 0
    # Consecutive epochs without a usable example.
    self._empty_epochs = 0
    self._stream = open_stream(self._opened, reading)

  @property
  def place(self) -> tuple[int, int]:
    return self._epoch, self._taken + self._lost

  def places(self, count: int) -> list[tuple]:
    """Returns [(epoch, read, count)] for the next examples."""
    return [(*self.place, count)]

  def seek(self, epoch: int, read: int) -> None:
    """Moves to the example with `read` examples before it in an epoch."""
    self.restore(
      {
        'epoch': epoch,
        'taken': read,
        'lost': 0,
        'skipped': {},
        'shortened': {},
        'reads': self._reads(),
        'stream': stream_state(self._opened, self._reading, epoch, read),
      }
    )

  def _reads(self) -> dict[str, Any]:
    """Returns everything that a data position depends on, as JSON."""
    opened, reading = self._opened, self._reading
    if isinstance(opened, base.Shards):
      what = {'files': len(opened.files)}
      if reading.shuffle:
        what['shuffle.buffer_size'] = shard_epochs.window()
    else:
      what = {'examples': len(opened)}
    return {'task': self._dataset.name, 'split': self._split, 'train.seed': reading.seed, **what}

  def counts(self, name: str) -> dict[str, int]:
    """Returns {reason: count} for 'skipped' or 'shortened', the most frequent first."""
    return dict(self._counts[name].most_common())

  def state(self) -> dict[str, Any]:
    """Returns the position of the next example, and the counts up to there."""
    return {
      'epoch': self._epoch,
      'taken': self._taken,
      'lost': self._lost,
      'reads': self._reads(),
      'stream': self._stream.state(),
      **{name: self.counts(name) for name in _TALLIES},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues where `state` was taken.

    Raises:
      UserError: it was taken with other examples, or with another order.
    """
    there, here = state['reads'], self._reads()
    differing = [
      f'{name} {there.get(name)} there and {here.get(name)} here'
      for name in sorted(there.keys() | here.keys())
      if there.get(name) != here.get(name)
    ]
    if differing:
      raise UserError(
        f'{self._dataset.name}, {self._split}: the checkpoint has its position in other data, or '
        f'in another order: {", ".join(differing)}; restore these values, or set '
        'train.restart_data=True to continue with a new pass over the data'
      )
    self._stream.close()
    self._epoch, self._taken, self._lost = state['epoch'], state['taken'], state['lost']
    self._counts = {name: collections.Counter(state[name]) for name in _TALLIES}
    self._stream = open_stream(self._opened, self._reading, state['stream'])

  def close(self) -> None:
    """Stops prefetching."""
    self._stream.close()

  def take(self, count: int) -> dict[str, np.ndarray]:
    """Returns the next examples, stacked; fewer after the last epoch, {} at the end."""
    found: list[dict[str, np.ndarray]] = []
    while len(found) < count and (features := self.next()) is not None:
      found.append(features)
    return examples_lib.stacked(found)

  def next(self) -> dict[str, np.ndarray] | None:
    """Returns the next usable example; None after the last epoch.

    Raises:
      UserError: a whole epoch has no usable example.
    """
    while True:
      try:
        outcome = next(self._stream)
      except StopIteration:
        if self._reading.num_epochs is None:
          raise self._no_usable_example() from None
        self._end_epoch(last=True)
        return None
      if outcome.epoch != self._epoch:
        self._end_epoch()
        self._epoch = outcome.epoch
      if outcome.features is not None:
        self._taken += 1
        self._counts['shortened'].update(outcome.notes)
        return outcome.features
      self._lost += 1
      self._counts['skipped'][outcome.reason] += 1
      tally.warn_once(outcome.reason, outcome.where)

  def _no_usable_example(self) -> UserError:
    """Returns the error of a share without usable examples."""
    skipped, shares = tally.listed(self.counts('skipped')), self._reading.shares
    part = (
      f'share {self._reading.share + 1} of {shares} (train.data_shares) of ' if shares > 1 else ''
    )
    return UserError(
      f'{self._dataset.name}, {self._split}: no usable example in {part}'
      f'{self._dataset.source.place}' + (f'; skipped {skipped}' if skipped else '; it is empty')
    )

  def _end_epoch(self, last: bool = False) -> None:
    """Reports on the epoch that has ended."""
    where, place = f'{self._dataset.name}, {self._split}', self._dataset.source.place
    skipped, shortened = (tally.listed(self.counts(name)) for name in _TALLIES)
    self._empty_epochs = 0 if self._taken else self._empty_epochs + 1
    if (
      not self._taken
      and (self._lost or not self._epoch)
      and self._empty_epochs >= patience(self._opened, self._reading)
    ):
      raise self._no_usable_example()
    # Small data sets end thousands of epochs: after the first, a line each time their number doubles.
    if (
      (skipped or shortened) and (self._taken or self._lost) and not self._epoch & (self._epoch - 1)
    ):
      logging.warning(
        '%s: epoch %d ended after %d examples; in all epochs so far skipped: %s; kept in part: %s',
        where,
        self._epoch,
        self._taken,
        skipped or 'none',
        shortened or 'none',
      )
    if self._lost > _MAX_UNUSABLE * (self._lost + self._taken):
      logging.error(
        '%s: %d of %d examples of epoch %d of %s could not be used; check what was skipped and '
        'why before you continue',
        where,
        self._lost,
        self._lost + self._taken,
        self._epoch,
        place,
      )
    self._taken = self._lost = 0
    if last:
      self._epoch += 1

"""Global batches whose examples don't depend on the number of processes that read them."""

from __future__ import annotations

import collections
import dataclasses
import queue
import re
import threading
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import examples
from parti_jax.data import mixtures
from parti_jax.data import share as share_lib
from parti_jax.data.batches import Batches
from parti_jax.partitioning import local_rows

# How long `ReadAhead.close` waits for a read in progress.
_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Place:
  """The location of consecutive examples of a share, such as its part of a batch.

  Its text form is 'SHARE/SHARES:EPOCH:READ+COUNT'. '0/2:3:120+8' means the first 8 usable examples
  from number 120 on, counted from 0, of the first of two shares in epoch 3. '@TASK' follows in a
  mixture.

  Attributes:
    share: index of the share.
    shares: number of shares that the examples are split into.
    epoch: index of the epoch.
    read: examples before them in this epoch, including unusable ones.
    count: number of examples; if the epoch has fewer, the rest comes from the next one.
    task: the task of a mixture; '' without a mixture.
  """

  share: int
  shares: int
  epoch: int
  read: int
  count: int
  task: str = ''

  def __str__(self) -> str:
    task = f'@{self.task}' if self.task else ''
    return f'{self.share}/{self.shares}:{self.epoch}:{self.read}+{self.count}{task}'

  @classmethod
  def parse(cls, text: str) -> Place:
    """Parses the text form of a place.

    Raises:
      UserError: the text doesn't have that form.
    """
    found = re.fullmatch(r'(\d+)/(\d+):(\d+):(\d+)\+(\d+)(?:@(\w+))?', text)
    if found:
      share, shares, epoch, read, count = map(int, found.groups()[:5])
      if share < shares and count:
        return cls(share, shares, epoch, read, count, found[6] or '')
    raise UserError(
      f'{text!r} is not a place in the data; write SHARE/SHARES:EPOCH:READ+COUNT, '
      'such as 0/1:3:120+8'
    )


class SharedBatches:
  """An iterator of the rows that a process needs of each global training batch.

  The examples are split into a fixed number of shares. Share v of V supplies the rows
  [v·B/V, (v + 1)·B/V) of each batch of B rows. A process reads the shares that contain its rows.
  The number of shares belongs to the run, not to the processes. It is stored in the checkpoint, so
  a run resumed with another number of processes continues with the same batches.

  A thread assembles batches ahead of their use, until `close` or the end of a `with` block.

  Args:
    task: name of a task or mixture, as in `Batches`.
    split: the split, 'train'.
    batch_size: rows of the global batch.
    feature_lengths: as in `Batches`.
    shares: number of shares that the examples are split into; None for `processes`, or, after
      `restore`, for the checkpoint's number.
    processes: number of processes that train.
    rows: the rows that this process needs, ascending; None for all.
    seed: determines the order of the examples and which texts are dropped.
    restart: whether to ignore a state of an older version or of other data with a warning and
      begin a new pass over the data; any other state is restored.

  Attributes:
    batch_size: rows of the global batch.
    shares: number of shares that the examples are split into.

  Raises:
    UserError: the number of shares doesn't divide the batch size, or `Batches` raises it.
  """

  _ahead: ReadAhead

  def __init__(
    self,
    task: str,
    split: str,
    batch_size: int,
    feature_lengths: examples.Lengths,
    shares: int | None = None,
    processes: int = 1,
    rows: Sequence[int] | None = None,
    seed: int = 0,
    restart: bool = False,
  ):
    self._arguments: dict[str, Any] = {
      'task': task,
      'split': split,
      'feature_lengths': feature_lengths,
      'seed': seed,
    }
    self.batch_size, self._requested, self._restart = batch_size, shares, restart
    self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    self._default = processes if shares is None else shares
    self._open(self._default)

  @property
  def skipped(self) -> dict[str, int]:
    """Returns {reason: examples that this process skipped} up to the next batch."""
    return dict(
      sum(
        (collections.Counter(state['skipped']) for state in self._states.values()),
        collections.Counter(),
      )
    )

  @property
  def by_source(self) -> dict[str, int]:
    """Counts a mixture's examples per source: used so far, and skipped.

    Returns:
      'examples/SOURCE' of all shares, which all follow the same schedule, and
      'skipped_examples/SOURCE' of the shares that this process reads; {} without a mixture.
    """
    found: collections.Counter = collections.Counter()
    for state in self._states.values():
      for task, seen in state.get('seen', {}).items():
        source = mixtures.source_of(task)
        found[f'examples/{source}'] = seen * self.shares
        found[f'skipped_examples/{source}'] += sum(state['parts'][task]['skipped'].values())
    return dict(found)

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """The fingerprints, as in `Batches`."""
    return next(iter(self._batches.values())).fingerprints

  def state(self) -> dict[str, Any]:
    """Returns the position of the next batch in all shares; all processes must call it together.

    Returns:
      {'shares': [`Batches.state()` of each share]}.
    """
    states: dict[str, Any] = {}
    for those in local_rows.gathered(self._states):
      states |= those
    return {'shares': [states[str(share)] for share in range(self.shares)]}

  def places(self) -> tuple[Place, ...]:
    """Returns the places of the next batch in this process's shares, without communication."""
    return tuple(
      Place(share, self.shares, *place)
      for share, places in self._places.items()
      for place in places
    )

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues where `state()` was taken, with any number of processes.

    A state 'from_t5x', of a checkpoint converted from t5x, has no position and changes nothing:
    reading begins with the first example.

    Raises:
      UserError: the requested number of shares differs from the state's, or the state comes from
        an older version or from other sources.
    """
    if 'from_t5x' in state:
      return
    try:
      self._restore(state)
    except UserError as error:
      if not self._restart:
        raise
      logging.warning('train.restart_data: a new pass over the data begins, because %s', error)
      self._open(self._default)

  def _restore(self, state: Mapping[str, Any]) -> None:
    # Version 1 stored only positions, or a single one.
    states = state.get('shares') or [{}]
    if self._requested not in (None, len(states)):
      raise UserError(
        f'train.data_shares={self._requested}, but the checkpoint has its data position in '
        f'{len(states)} shares; omit train.data_shares or train in another --model_dir'
      )
    if len(states) != self.shares:
      self._open(len(states))
    self._ahead.close()
    for share, batches in self._batches.items():
      batches.restore(states[share])
    self._read_ahead()

  def close(self) -> None:
    """Stops prefetching."""
    self._ahead.close()
    for batches in self._batches.values():
      batches.close()

  def __enter__(self) -> SharedBatches:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    batch, self._states, self._places = next(self._ahead)
    return batch

  def _open(self, shares: int) -> None:
    if shares < 1 or self.batch_size % shares:
      raise UserError(
        f'train.batch_size={self.batch_size} is not divisible by '
        f'train.data_shares={shares}, the shares that the data is split into (by '
        'default one per process); set one of the two'
      )
    if hasattr(self, '_ahead'):
      self.close()
    self.shares = shares
    size = self.batch_size // shares
    read = np.unique(self._rows // size)
    settings = share_lib.Settings().divided(len(read))
    self._batches = {
      int(share): Batches(
        **self._arguments,
        batch_size=size,
        share=int(share),
        shares=shares,
        training=True,
        settings=settings,
      )
      for share in read
    }
    held = (read[:, None] * size + np.arange(size)).reshape(-1)
    # A slice copies nothing; it is used if all rows are needed.
    self._chosen = (
      slice(None) if len(held) == len(self._rows) else np.searchsorted(held, self._rows)
    )
    self._read_ahead()

  def _read_ahead(self) -> None:
    self._states, self._places = self._next()
    self._ahead = ReadAhead(self._assembled())

  def _assembled(self) -> Iterator[tuple[dict[str, np.ndarray], dict, dict]]:
    """Yields batches, each with the states and places after it."""
    while True:
      parts = [next(batches) for batches in self._batches.values()]
      batch = {
        name: np.concatenate([part[name] for part in parts])[self._chosen] for name in parts[0]
      }
      yield batch, *self._next()

  def _next(self) -> tuple[dict[int, Any], dict[int, Any]]:
    """Returns the states and the places of the next batch, by share."""
    return (
      {share: batches.state() for share, batches in self._batches.items()},
      {share: batches.places() for share, batches in self._batches.items()},
    )


class ReadAhead:
  """An iterator that prefetches elements in another thread.

  Args:
    elements: iterated in that thread; an exception there is raised in the element's place.
    count: number of elements to prefetch.
  """

  def __init__(self, elements: Iterator, count: int = 2):
    self._elements, self._ended = elements, threading.Event()
    self._queue: queue.Queue = queue.Queue(count)
    # A daemon thread, so that a process can end without waiting for a slow read.
    self._thread = threading.Thread(target=self._run, name='read_ahead', daemon=True)
    self._started = False

  def _run(self) -> None:
    element: tuple[Any, BaseException | None]
    while not self._ended.is_set():
      try:
        element = next(self._elements), None
      except BaseException as error:
        element = None, error
      while not self._ended.is_set():
        try:
          self._queue.put(element, timeout=0.1)
          break
        except queue.Full:
          pass
      if element[1] is not None:
        return

  def __iter__(self) -> ReadAhead:
    return self

  def __next__(self) -> Any:
    if not self._started:
      self._started = True
      self._thread.start()
    element, error = self._queue.get()
    if error is not None:
      self._queue.put((None, error))
      raise error
    return element

  def close(self) -> None:
    """Ends the thread, after its current element."""
    self._ended.set()
    if self._started:
      self._thread.join(_SECONDS)


def read(
  place: Place, task: str, split: str, feature_lengths: examples.Lengths, seed: int
) -> dict[str, np.ndarray]:
  """Reads the examples at a place.

  Args:
    place: the place. For files without an index, the epoch is read up to it.
    task: as in `SharedBatches`; it and the following must equal those of the run.
    split: as in `SharedBatches`.
    feature_lengths: as in `SharedBatches`.
    seed: as in `SharedBatches`.

  Returns:
    Arrays [place.count, ...].
  """
  if place.task:
    task, seed = place.task, mixtures.part_seed(seed, place.task)
  with Batches(
    task,
    split,
    place.count,
    feature_lengths,
    seed=seed,
    share=place.share,
    shares=place.shares,
    training=True,
  ) as batches:
    batches.seek(place.epoch, place.read)
    return next(batches)

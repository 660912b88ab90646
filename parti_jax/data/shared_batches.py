"""Global batches whose examples do not depend on how many processes read them."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from parti_jax.data.batches import Batches
from parti_jax.errors import UserError
from parti_jax.fingerprints import Fingerprint
from parti_jax.partitioning import local_rows


@dataclasses.dataclass(frozen=True)
class Place:
  """Where some successive examples of a share are, such as its part of a batch.

  As a text it is 'SHARE/SHARES:EPOCH:TAKEN+COUNT'; '0/2:3:120+8' has the examples 120 to 127, from
  0, of the first of two shares in epoch 3.

  Attributes:
    share: which share, from 0.
    shares: into how many the examples are split.
    epoch: from 0.
    taken: examples before them in this epoch.
    count: how many; those that the epoch lacks are the first ones of the next.
  """

  share: int
  shares: int
  epoch: int
  taken: int
  count: int

  def __str__(self) -> str:
    return f'{self.share}/{self.shares}:{self.epoch}:{self.taken}+{self.count}'

  @classmethod
  def parse(cls, text: str) -> Place:
    """The place of a text.

    Raises:
      UserError: it is not of that form.
    """
    found = re.fullmatch(r'(\d+)/(\d+):(\d+):(\d+)\+(\d+)', text)
    place = cls(*map(int, found.groups())) if found else None
    if place is None or place.share >= place.shares or not place.count:
      raise UserError(f'{text!r} is no place in the data; write SHARE/SHARES:EPOCH:TAKEN+COUNT, '
                      'such as 0/1:3:120+8')
    return place


class SharedBatches:
  """An iterator of the rows that a process needs of each global training batch.

  The examples are split into a fixed number of shares, and share v of V gives the rows
  [v·B/V, (v + 1)·B/V) of each batch of B rows. A process reads the shares that its rows are in.
  The number of shares is a property of the run and not of the processes: it is kept in the
  checkpoint, so that a run resumed by another number of processes goes on with the same batches.

  Attributes:
    batch_size: rows of the global batch.
    shares: into how many shares the examples are split.
    skipped: as in `Batches`, of the shares that this process reads.
    fingerprints: as in `Batches`.
  """

  def __init__(self, task: str, split: str, batch_size: int, feature_lengths: Mapping[str, int],
               shares: int | None = None, processes: int = 1,
               rows: Sequence[int] | None = None, seed: int = 0):
    """Opens the shares that this process reads.

    Args:
      task: name of a task or mixture (see `parti_jax.data.tasks`).
      split: the split, 'train'.
      batch_size: rows of the global batch.
      feature_lengths: as in `Batches`.
      shares: into how many shares the examples are split; None for as many as `processes`, or,
        after `restore`, for as many as the checkpoint has.
      processes: how many processes train.
      rows: the rows that this process needs, ascending; None for all.
      seed: decides the order of the examples and whose text is dropped.

    Raises:
      UserError: the shares do not divide the batch, or as `Batches` does.
    """
    self._arguments = {'task': task, 'split': split, 'feature_lengths': feature_lengths,
                       'seed': seed}
    self.batch_size, self._asked = batch_size, shares
    self._rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    self._open(processes if shares is None else shares)

  @property
  def skipped(self) -> dict[str, int]:
    """Reason -> number of examples that this process left out."""
    return dict(sum((collections.Counter(b.skipped) for b in self._batches.values()),
                    collections.Counter()))

  @property
  def fingerprints(self) -> dict[str, Fingerprint | None]:
    """As in `Batches`."""
    return next(iter(self._batches.values())).fingerprints

  def state(self) -> dict:
    """Where the next batch starts in every share; all processes must call it together.

    Returns:
      {'places': [[epoch, examples taken in it] of each share], 'shares': [what else is in
      `Batches.state()` of each share]}.
    """
    states = {}
    for those in local_rows.gathered({n: b.state() for n, b in self._batches.items()}):
      states |= those
    states = [states[str(share)] for share in range(self.shares)]
    return {'places': [[state.pop('epoch'), state.pop('taken')] for state in states],
            'shares': states}

  def places(self) -> tuple[Place, ...]:
    """The next batch, in the shares that this process reads; asks no other process."""
    return tuple(Place(share, self.shares, *batches.place, self.batch_size // self.shares)
                 for share, batches in self._batches.items())

  def restore(self, state: Mapping) -> None:
    """Goes on where `state()` was taken, by however many processes.

    A state 'from_t5x', of a checkpoint that was one of t5x, has no place and changes nothing: the
    examples begin with the first one.

    Raises:
      UserError: another number of shares was asked for than the state has.
    """
    if 'from_t5x' in state:
      return
    # Before there were shares, a checkpoint held the place in the one stream of examples.
    places = state['places'] if 'places' in state else [[state['epoch'], state['taken']]]
    if self._asked not in (None, len(places)):
      raise UserError(f'train.data_shares={self._asked}, but the checkpoint has the place in '
                      f'{len(places)} shares; leave it away or train in another --model_dir')
    if len(places) != self.shares:
      self.close()
      self._open(len(places))
    more = state.get('shares') or [{}] * len(places)
    for share, batches in self._batches.items():
      epoch, taken = places[share]
      batches.restore({'epoch': epoch, 'taken': taken, **more[share]})

  def close(self) -> None:
    """Ends reading ahead, as `Batches.close`."""
    for batches in self._batches.values():
      batches.close()

  def __enter__(self) -> SharedBatches:
    return self

  def __exit__(self, *_) -> None:
    self.close()

  def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    parts = [next(batches) for batches in self._batches.values()]
    return {name: np.concatenate([part[name] for part in parts])[self._chosen]
            for name in parts[0]}

  def _open(self, shares: int) -> None:
    if shares < 1 or self.batch_size % shares:
      raise UserError(f'train.batch_size={self.batch_size} is not divisible by '
                      f'train.data_shares={shares}, the shares that the data is split into (by '
                      'default one a process); set one of the two')
    self.shares = shares
    size = self.batch_size // shares
    read = np.unique(self._rows // size)
    self._batches = {
        int(share): Batches(
            **self._arguments, batch_size=size, share=int(share), shares=shares, training=True)
        for share in read}
    held = (read[:, None] * size + np.arange(size)).reshape(-1)
    # A slice where all is needed, since it copies nothing.
    self._chosen = (slice(None) if len(held) == len(self._rows)
                    else np.searchsorted(held, self._rows))


def read(place: Place, task: str, split: str, feature_lengths: Mapping[str, int],
         seed: int) -> dict[str, np.ndarray]:
  """Reads the examples at a place, in the time that reading the epoch up to them takes.

  Args:
    place: which ones.
    task: as in `SharedBatches`, and as it was in the run that named the place; so the others.
    split: likewise.
    feature_lengths: likewise.
    seed: likewise.

  Returns:
    Arrays [place.count, ...].
  """
  with Batches(task, split, place.count, feature_lengths, seed=seed,
               share=place.share, shares=place.shares, training=True) as batches:
    batches.restore({'epoch': place.epoch, 'taken': place.taken})
    return next(batches)

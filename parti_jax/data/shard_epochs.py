"""The examples of files that are read from their beginning, epoch by epoch, not yet prepared."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Mapping
from typing import TYPE_CHECKING

import gin
import numpy as np

from parti_jax.core import checks
from parti_jax.data import order as order_lib
from parti_jax.data.damage import Damaged
from parti_jax.data.quiet_grain import grain
from parti_jax.data.sources import base

if TYPE_CHECKING:
  from parti_jax.data.share import Reading


@gin.configurable('shuffle')
@checks.bounded(buffer_size=(1, None))
def window(buffer_size: int = 10_000) -> int:
  """Returns the size of the shuffling window for files without an index, over all shares.

  Args:
    buffer_size: encoded examples in the window; each share gets a part.
  """
  return buffer_size


class _ShardIterator(grain.DatasetIterator):
  """The examples of a share of files in one epoch.

  If there are at least as many files as shares, each share has its own files. Otherwise each share
  reads all files and keeps one of each `shares` examples.
  """

  def __init__(self, shards: base.Shards, reading: Reading, epoch: int):
    super().__init__()
    files = list(shards.files)
    if reading.shuffle:
      np.random.default_rng(order_lib.mixed(reading.seed, 'files', epoch)).shuffle(files)
    self._own_files = len(files) >= reading.shares
    self._files = files[reading.share :: reading.shares] if self._own_files else files
    self._shards, self._reading = shards, reading
    self._file = self._read = self._number = self._seen = 0
    self._examples = self._open()

  def __next__(self) -> tuple[int, base.Example | Damaged]:
    while True:
      for example in self._examples:
        self._read += 1
        counted, self._seen = self._seen, self._seen + 1
        if self._own_files or counted % self._reading.shares == self._reading.share:
          self._number += 1
          return self._number - 1, example
      if self._file + 1 >= len(self._files):
        raise StopIteration
      self._file, self._read = self._file + 1, 0
      self._examples = self._open()

  def _open(self) -> Iterator[base.Example | Damaged]:
    return iter(self._shards.read(self._files[self._file])) if self._files else iter(())

  def get_state(self) -> dict[str, int]:
    return {'file': self._file, 'read': self._read, 'number': self._number, 'seen': self._seen}

  def set_state(self, state: Mapping[str, int]) -> None:
    self._file, self._number = state['file'], state['number']
    self._seen = state.get('seen', 0)
    self._examples = self._open()
    self._read = sum(1 for _ in zip(range(state['read']), self._examples))

  def close(self) -> None:
    self._examples = iter(())


class _ShardDataset(grain.IterDataset):
  """Iterates with `_ShardIterator`."""

  def __init__(self, shards: base.Shards, reading: Reading, epoch: int):
    super().__init__()
    self._arguments = shards, reading, epoch

  def __iter__(self) -> _ShardIterator:
    return _ShardIterator(*self._arguments)


def raw_epoch(shards: base.Shards, reading: Reading, epoch: int) -> grain.DatasetIterator:
  """Iterates over a share of files in one epoch, shuffled within windows but not prepared.

  Yields:
    (number in the epoch, example).
  """
  dataset = _ShardDataset(shards, reading, epoch)
  if reading.shuffle:
    dataset = grain.experimental.WindowShuffleIterDataset(
      dataset,
      window_size=max(1, window() // reading.shares),
      seed=order_lib.mixed(reading.seed, 'window', reading.share, epoch),
    )
  return iter(dataset)

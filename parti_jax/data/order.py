"""Computes the order in which the examples of a split are read, by index arithmetic."""

from __future__ import annotations

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.data.quiet_grain import grain

# grain shuffles 32-bit numbers.
_MOST = 2**32
_ROUNDS = 4


class Order:
  """The indices of a share of some records, epoch after epoch.

  Each epoch is a permutation of all records, given by the seed and the epoch. Share v of V takes
  each V-th record of it, starting with the v-th. Seeking to any position takes constant time.

  Args:
    count: number of records in the split.
    seed: determines the permutations.
    shuffle: whether to permute; otherwise the original order is kept.
    share: index of the share.
    shares: number of shares.

  Raises:
    UserError: there are too many records to shuffle.
  """

  def __init__(self, count: int, seed: int, shuffle: bool = True, share: int = 0, shares: int = 1):
    if count > _MOST:
      raise UserError(f'a split of {count:,} examples; at most {_MOST:,} can be shuffled as one')
    self._count, self._shuffle, self._share, self._shares = count, shuffle, share, shares
    self._seed = mixed(seed, 'order')

  def __len__(self) -> int:
    """The number of the share's examples in an epoch."""
    return len(range(self._share, self._count, self._shares))

  def index(self, position: int) -> int:
    """Returns the index of a record.

    Args:
      position: number of the share's records before it, counted over all epochs.
    """
    epoch, number = divmod(position, len(self))
    record = self._share + number * self._shares
    if not self._shuffle or self._count == 1:
      return record
    return grain.experimental.index_shuffle(
      record, max_index=self._count - 1, seed=(self._seed + epoch) % 2**32, rounds=_ROUNDS
    )


def mixed(seed: int, what: str, *numbers: int) -> int:
  """Returns a 32-bit seed that differs for neighboring seeds and for other uses of a seed.

  Args:
    seed: seed of the run.
    what: names the use.
    *numbers: distinguish several seeds of the same use.
  """
  words = [seed, int.from_bytes(what.encode()), *numbers]
  return int(np.random.SeedSequence(words).generate_state(1)[0])

"""In which order the examples of a split are read, by index arithmetic."""

from __future__ import annotations

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.data.quiet_grain import grain

# grain shuffles numbers of 32 bits.
_MOST = 2**32
_ROUNDS = 4


class Order:
  """The indices of a share of some records, epoch after epoch.

  Each epoch is a permutation of all records, by the seed and the epoch; share v of V takes every
  V-th of it, from the v-th on. Any place in it is found at once.

  Args:
    count: records of the split.
    seed: decides the permutations.
    shuffle: whether to permute; else the records' own order is kept.
    share: which share.
    shares: how many there are.

  Raises:
    UserError: there are more records than can be shuffled.
  """

  def __init__(self, count: int, seed: int, shuffle: bool = True, share: int = 0, shares: int = 1):
    if count > _MOST:
      raise UserError(f'a split of {count:,} examples; at most {_MOST:,} can be shuffled as one')
    self._count, self._shuffle, self._share, self._shares = count, shuffle, share, shares
    self._seed = mixed(seed, 'order')

  def __len__(self) -> int:
    """The share's examples in an epoch."""
    return len(range(self._share, self._count, self._shares))

  def index(self, position: int) -> int:
    """The index of a record.

    Args:
      position: how many records of the share come before it, in all epochs.
    """
    epoch, number = divmod(position, len(self))
    place = self._share + number * self._shares
    if not self._shuffle or self._count == 1:
      return place
    return grain.experimental.index_shuffle(
      place, max_index=self._count - 1, seed=(self._seed + epoch) % 2**32, rounds=_ROUNDS
    )


def mixed(seed: int, what: str, *numbers: int) -> int:
  """A seed of 32 bits that neighbouring seeds, and other uses of the same seed, don't give.

  Args:
    seed: of the run.
    what: names the use.
    *numbers: tell its instances apart.
  """
  words = [seed, int.from_bytes(what.encode()), *numbers]
  return int(np.random.SeedSequence(words).generate_state(1)[0])

"""Computes the order in which the examples of a split are read, by index arithmetic."""

from __future__ import annotations

import functools

import numpy as np

from parti_jax.core.errors import UserError
from parti_jax.data.quiet_grain import grain

# grain shuffles 32-bit numbers.
_MOST = 2**32
_ROUNDS = 4
# Permutations of at most this many are computed as a whole. grain's function permutes 2^16 numbers and
# repeats that until one is small enough: for each of 8 records, that takes 2 ms.
_FEW = 1024


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
    seed = (self._seed + epoch) % 2**32
    if self._count <= _FEW:
      return int(_permutation(self._count, seed)[record])
    return grain.experimental.index_shuffle(
      record, max_index=self._count - 1, seed=seed, rounds=_ROUNDS
    )


@functools.lru_cache(16)
def _permutation(count: int, seed: int) -> np.ndarray:
  """Returns what grain's index_shuffle gives for 0 to count - 1, at most 2^16 - 1 of them.

  It is the cipher Simon (https://eprint.iacr.org/2013/404, with 4 rounds, on blocks of 16 bits), walked
  along its cycles (https://www.cs.ucdavis.edu/~rogaway/papers/subset.pdf).
  """
  byte = np.arange(2**8)
  rotated = lambda bits: (byte << bits | byte >> (8 - bits)) & 0xFF
  mixing = rotated(1) & byte ^ rotated(2)
  left, right = np.divmod(np.arange(2**16), 2**8)
  keys = _round_keys(seed)
  for first, second in zip(keys[::2], keys[1::2]):
    left = left ^ mixing[right] ^ first
    right = right ^ mixing[left] ^ second
  jumps = left << 8 | right
  found = jumps[:count].copy()
  jumps[:count] = np.arange(count)  # Those that are small enough stay.
  while found.max() >= count:
    found, jumps = jumps[found], jumps[jumps]
  return found


def _round_keys(seed: int) -> list[int]:
  """Returns the lowest 8 bits of each of the 4 numbers that C++'s std::seed_seq makes of a seed."""
  words, largest = [0x8B8B8B8B] * _ROUNDS, 2**32 - 1
  for step in range(2 * _ROUNDS):
    here, after, later = (step % _ROUNDS, (step + 1) % _ROUNDS, (step + 2) % _ROUNDS)
    parts = words[here], words[after], words[here - 1]
    if step < _ROUNDS:
      mix = parts[0] ^ parts[1] ^ parts[2]
      one = 1664525 * (mix ^ mix >> 27) & largest
      other = one + (step or 1) + (seed if step == 1 else 0) & largest
      words[after] = words[after] + one & largest
      words[later] = words[later] + other & largest
    else:
      mix = sum(parts) & largest
      one = 1566083941 * (mix ^ mix >> 27) & largest
      other = one - here & largest
      words[after] ^= one
      words[later] ^= other
    words[here] = other
  return [word & 0xFF for word in words]


def mixed(seed: int, what: str, *numbers: int) -> int:
  """Returns a 32-bit seed that differs for neighboring seeds and for other uses of a seed.

  Args:
    seed: seed of the run.
    what: names the use.
    *numbers: distinguish several seeds of the same use.
  """
  words = [seed, int.from_bytes(what.encode()), *numbers]
  return int(np.random.SeedSequence(words).generate_state(1)[0])

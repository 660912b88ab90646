"""The order of records is that of grain's shuffle."""

import pytest

from parti_jax.data import order
from parti_jax.data.quiet_grain import grain


def _grains(count, seed):
  shuffle = grain.experimental.index_shuffle
  return [shuffle(index, max_index=count - 1, seed=seed, rounds=4) for index in range(count)]


@pytest.mark.parametrize('count', [2, 3, 7, 8, 100, 255, 256, 257, 1024, 1025])
@pytest.mark.parametrize('share, shares', [(0, 1), (2, 3)])
def test_epochs_follow_grain(count, share, shares):
  ours = order.Order(count, 5, True, share, shares)
  seed = order.mixed(5, 'order')
  for epoch in (0, 1, 300):
    expected = _grains(count, (seed + epoch) % 2**32)[share::shares]
    assert len(ours) == len(expected)
    start = epoch * len(expected)
    assert [ours.index(start + number) for number in range(len(expected))] == expected

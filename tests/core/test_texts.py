"""Numbers as people read them."""

import pytest

from parti_jax.core import texts


@pytest.mark.parametrize(
  'count, text',
  [(27_840, '27,840'), (4_012_345, '4.0M'), (20_230_000_000, '20.23B')],
)
def test_short_counts(count, text):
  assert texts.short_count(count) == text


def test_one_thing_is_singular():
  assert texts.counted(1, 'device') == '1 device'
  assert texts.counted(1_024, 'device') == '1,024 devices'

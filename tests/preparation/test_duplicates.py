"""Digests, perceptual hashes, and the choice among several pictures."""

import io
import itertools
import random

import pytest
from PIL import Image

from parti_jax.preparation import duplicates
from parti_jax.preparation import hashes
from parti_jax.preparation.duplicates import Row


def _differing(a, b):
  return (a ^ b).bit_count()


def test_digests_differ_with_the_bytes_and_the_caption():
  assert hashes.digest(b'a', 'b') == hashes.digest(b'a', 'b')
  assert (
    len({hashes.digest(*of) for of in ((b'a',), (b'b',), (b'a', 'b'), (b'ab',), (b'', 'ab'))}) == 5
  )


@pytest.mark.parametrize('change', ['smaller', 'larger', 'jpeg', 'grey'])
def test_changes_that_keep_the_look(draw, encode, change):
  for seed in range(10):
    image = draw(seed, (300, 200))
    changed = {
      'smaller': lambda image: image.resize((150, 100), Image.Resampling.BICUBIC),
      'larger': lambda image: image.resize((600, 400), Image.Resampling.BICUBIC),
      'jpeg': lambda image: Image.open(io.BytesIO(encode(image, 'jpeg', quality=75))),
      'grey': lambda image: image.convert('L').convert('RGB'),
    }[change](image)
    assert _differing(hashes.perceptual(image), hashes.perceptual(changed)) <= 5


def test_other_pictures_look_different(draw):
  looks = [hashes.perceptual(draw(seed)) for seed in range(20)]
  assert min(_differing(a, b) for a, b in itertools.combinations(looks, 2)) > 10
  assert all(0 <= look < 2**hashes.BITS for look in looks)


def test_pictures_of_one_shade_have_no_look():
  for color in ('white', 'black', (10, 200, 30)):
    assert hashes.perceptual(Image.new('RGB', (40, 30), color)) is None
  image = Image.new('RGB', (40, 30), 'white')
  image.paste('red', (0, 0, 10, 10))
  assert hashes.perceptual(image) is not None


@pytest.mark.parametrize('distance', [0, 1, 3, 8, 15])
def test_hashes_that_are_near_share_a_piece(distance):
  rng = random.Random(distance)
  for _ in range(200):
    look = rng.getrandbits(hashes.BITS)
    near = look
    for bit in rng.sample(range(hashes.BITS), distance):
      near ^= 1 << bit
    assert set(hashes.bands(look, distance)) & set(hashes.bands(near, distance))
  pieces = hashes.bands(2**hashes.BITS - 1, distance)
  assert len(pieces) == distance + 1
  assert sum(piece.bit_count() for _, piece in pieces) == hashes.BITS


def test_the_largest_stays_and_of_as_many_pixels_the_first():
  rows = [
    Row(b'', 0, 10, 1, 0),
    Row(b'', 0, 30, 2, 5),
    Row(b'', 0, 30, 2, 4),
    Row(b'', 0, 30, 3, 0),
  ]
  for order in itertools.permutations(rows):
    found = list(duplicates.ranked(order))
    assert [row for row, best in found if best] == [rows[2]]
    assert {row for row, best in found if not best} == set(rows) - {rows[2]}
  assert not list(duplicates.ranked([]))


def test_near_losers_have_a_better_one_that_looks_alike():
  rng = random.Random(0)
  rows = [
    Row(b'', look, rng.choice((10, 20)), 0, index)
    for index, look in enumerate(rng.sample(range(2**8), 60))
  ]
  expected = {
    row
    for row in rows
    if any(
      _differing(row.look, other.look) <= 2 and duplicates.rank(other) < duplicates.rank(row)
      for other in rows
    )
  }
  assert 0 < len(expected) < len(rows)
  assert set(duplicates.near_losers(rows, 2)) == expected

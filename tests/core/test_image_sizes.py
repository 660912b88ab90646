"""The size of pictures: a number, or height and width."""

import pytest

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import image_sizes


@pytest.mark.parametrize(
  ('given', 'size'), [(64, 64), ((32, 64), (32, 64)), ([32, 64], (32, 64)), ([64, 64], 64)]
)
def test_a_size_is_a_number_or_a_pair_that_is_not_square(given, size):
  found = checks.typed('image_size', given, image_sizes.ImageSize, 1, 100)
  assert found == size and type(found) is type(size)
  assert image_sizes.of_sides(*image_sizes.sides(found)) == size


@pytest.mark.parametrize('given', [0, 101, 1.5, None, '64', (32,), (32, 64, 3), (0, 64), (32, 101)])
def test_other_sizes_are_refused(given):
  with pytest.raises(errors.UserError, match='image_size=.* whole number'):
    checks.typed('image_size', given, image_sizes.ImageSize, 1, 100)


@pytest.mark.parametrize(
  ('picture', 'size', 'area'),
  [
    ((60, 20), 10, (20, 0, 40, 20)),
    ((20, 61), 10, (0, 20, 20, 40)),
    ((30, 30), 10, (0, 0, 30, 30)),
    ((100, 100), (16, 32), (0, 25, 100, 75)),
    ((100, 40), (16, 32), (10, 0, 90, 40)),
    ((60, 100), (48, 16), (13, 0, 46, 100)),
    ((64, 32), (16, 32), (0, 0, 64, 32)),
    ((1000, 2), (1000, 1), (499, 0, 500, 2)),
  ],
)
def test_the_area_in_the_middle_has_the_shape_of_the_size(picture, size, area):
  assert image_sizes.central(*picture, size) == area


def test_multiples_and_texts():
  assert image_sizes.times((16, 32), 2) == (32, 64) and image_sizes.times(16, 4) == 64
  assert image_sizes.text((16, 32)) == '16×32' and image_sizes.text(16) == '16'
  assert image_sizes.square(16, 'this takes') == 16
  with pytest.raises(errors.UserError, match='^this takes square pictures only.*16×32.*; do that$'):
    image_sizes.square((16, 32), 'this takes', 'do that')

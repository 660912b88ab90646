"""User-supplied values: accepted values, resulting types, and one-line errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from parti_jax.core import checks
from parti_jax.core.errors import UserError

NO_WHOLE_NUMBERS = [
  1.5,
  4.0,
  np.float64(4),
  jnp.float32(4),
  float('nan'),
  float('inf'),
  '4',
  b'4',
  None,
  True,
  np.True_,
  np.array(True),
  [4],
  (),
  {},
  np.array([4]),
  np.array([4, 4]),
  4j,
  object,
]
NO_NUMBERS = [
  float('nan'),
  float('inf'),
  -float('inf'),
  1e39,
  -1e300,
  10**400,
  np.float64(1e39),
  '1',
  b'1',
  None,
  True,
  np.True_,
  [1.0],
  np.array([1.0]),
  {},
  1j,
  np.complex64(1),
  np.timedelta64(1),
  object,
]


@pytest.mark.parametrize(
  'value', [4, np.int8(4), np.uint64(4), np.array(4), jnp.int32(4), jnp.asarray(4)]
)
def test_whole_numbers_become_ints(value):
  number = checks.whole_number('n', value, 0, 4)
  assert number == 4 and type(number) is int


@pytest.mark.parametrize('value', NO_WHOLE_NUMBERS, ids=checks.shown)
def test_anything_else_is_not_a_whole_number(value):
  with pytest.raises(UserError, match='^n=.* must be a whole number from 0 to 9') as caught:
    checks.whole_number('n', value, 0, 9)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 200


@pytest.mark.parametrize(
  'value', [0, 10, -1, 2**31, 2**64, 10**5000, -(10**5000)], ids=checks.shown
)
def test_whole_numbers_out_of_bounds(value):
  with pytest.raises(UserError, match='^n=.* must be a whole number from 1 to 9$'):
    checks.whole_number('n', value, 1, 9)


def test_the_error_for_a_whole_float_suggests_the_integer():
  with pytest.raises(UserError, match='^n=8.0 must be a whole number from 1, such as 8$'):
    checks.whole_number('n', 8.0, 1)


def test_counts_fit_an_int32():
  assert checks.count('n', 2**31 - 1) == 2**31 - 1
  for value in (0, -1, 2**31):
    with pytest.raises(UserError, match='^n=.* must be a whole number from 1 to 2147483647$'):
      checks.count('n', value)


@pytest.mark.parametrize(
  'value',
  [0.5, np.float16(0.5), np.float64(0.5), np.array(0.5), jnp.bfloat16(0.5), jnp.float32(0.5)],
)
def test_numbers_become_floats(value):
  number = checks.number('x', value, 0, 1)
  assert number == 0.5 and type(number) is float


def test_whole_numbers_are_numbers_and_small_ones_are_kept():
  assert checks.number('x', 3) == 3.0 and type(checks.number('x', np.int64(3))) is float
  assert checks.number('x', 1e-300) == 1e-300


@pytest.mark.parametrize('value', NO_NUMBERS, ids=checks.shown)
def test_anything_else_is_not_a_number(value):
  with pytest.raises(UserError, match='^x=.* must be a number from 0 to 1$') as caught:
    checks.number('x', value, 0, 1)
  assert '\n' not in str(caught.value) and len(str(caught.value)) < 200


def test_numbers_out_of_bounds():
  for value in (-0.1, 1.1):
    with pytest.raises(UserError, match=f'^x={value} must be a number from 0 to 1$'):
      checks.number('x', value, 0, 1)
  with pytest.raises(UserError, match='^x=2 must be a number of at most 1$'):
    checks.number('x', 2, most=1)


def test_booleans():
  assert checks.boolean('b', np.True_) is True and checks.boolean('b', False) is False
  for value in (0, 1, 'False', None, [], np.array([True])):
    with pytest.raises(UserError, match='^b=.* must be true or false$'):
      checks.boolean('b', value)


@pytest.mark.parametrize(
  'kind, value, expected',
  [
    (int, np.int32(3), 3),
    (float, 3, 3.0),
    (bool, True, True),
    (str, 'a', 'a'),
    (int | None, None, None),
    (int | None, 3, 3),
    (tuple[int, int], [3, 4], (3, 4)),
    (tuple[int, ...], [], ()),
    (tuple[str, ...], ['a'], ('a',)),
    (tuple[float, ...] | None, [1, 2], (1.0, 2.0)),
    (object, 'anything', 'anything'),
  ],
)
def test_annotations(kind, value, expected):
  checked = checks.typed('x', value, kind)
  assert checked == expected and type(checked) is type(expected)


@pytest.mark.parametrize(
  'kind, value, message',
  [
    (int, 3.0, 'x=3.0 must be a whole number from 1 to 9, such as 3'),
    (int | None, '3', "x='3' must be a whole number from 1 to 9"),
    (float, None, 'x=None must be a number from 1 to 9'),
    (bool, 1, 'x=1 must be true or false'),
    (str, 5, 'x=5 must be a string'),
    (str | None, 5, 'x=5 must be a string'),
    (tuple[int, int], 64, 'x=64 must be a list of two whole numbers from 1 to 9'),
    (tuple[int, int], [8, 8, 8], 'x=[8, 8, 8] must be a list of two whole numbers from 1 to 9'),
    (tuple[int, int], [[8], [8]], 'x=[[8], [8]] must be a list of two whole numbers from 1 to 9'),
    (tuple[int, int], [8, 10], 'x=[8, 10] must be a list of two whole numbers from 1 to 9'),
    (tuple[int, ...], {}, 'x={} must be a list of whole numbers from 1 to 9'),
    (tuple[str, ...], 'row', "x='row' must be a list of strings"),
    (tuple[str, ...], ['row', 1], "x=['row', 1] must be a list of strings"),
  ],
)
def test_types_that_differ_from_the_annotation(kind, value, message):
  with pytest.raises(UserError) as caught:
    checks.typed('x', value, kind, 1, 9)
  assert str(caught.value) == message


def test_values_are_shown_in_one_short_line():
  deep = []
  for _ in range(5000):
    deep = [deep]
  for value in (deep, 'x' * 10**6, np.zeros((9, 9)), 10**5000, {'a': 'b\nc'}):
    assert '\n' not in checks.shown(value) and len(checks.shown(value)) <= 80
  assert [checks.shown_as_json(value) for value in (None, True, False, 1, [None, {'a': True}])] == [
    'null',
    'true',
    'false',
    '1',
    "[null, {'a': true}]",
  ]


def test_number_texts_are_short_and_unique():
  assert [checks.number_text(value) for value in (0, 1.0, 0.1, 2**31 - 1, 1234567, 0.1234567)] == [
    '0',
    '1',
    '0.1',
    '2147483647',
    '1234567',
    '0.1234567',
  ]
  assert checks.number_text(1 + 1e-9) != checks.number_text(1.0)


@pytest.mark.parametrize(
  'value, message',
  [
    (5, r'prompts=5 must be a string or a list of strings'),
    ({'a': 1}, 'prompts='),
    (b'a', 'prompts='),
    (['a', None], 'prompt 2 is None, which is not a string'),
    (['\ud800'], 'prompt 1 has characters'),
  ],
)
def test_texts(value, message):
  with pytest.raises(UserError, match=f'^{message}'):
    checks.texts('prompt', value)
  assert checks.texts('prompt', 'a') == ['a']
  assert checks.texts('prompt', iter(['a', np.str_('b')])) == ['a', 'b']

"""The names and numbers of classes as text tokens, where names are alike or look like numbers."""

import pytest

from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import class_tokenizer


def _opened(folder, names, keys=None):
  classes = class_names.Classes(names if keys is None else keys, names)
  path = folder / 'vocabulary.model'
  path.write_bytes(class_tokenizer.content(len(names), classes))
  return class_tokenizer.ClassTokenizer(path)


def test_names_that_differ_in_upper_case_alone(tmp_path):
  """ImageNet has the dog Cardigan and the garment cardigan."""
  found = _opened(tmp_path, ['Cardigan', 'cardigan', 'Crane'], ['n00', 'N01', 'n02'])
  number = lambda text: int(found.encode(text, 1)[0][0])
  assert [number(text) for text in ('Cardigan', ' cardigan', 'CRANE', 'n01', 'N00')] == [
    0,
    1,
    2,
    1,
    0,
  ]
  message = (
    r"'CARDIGAN' may be Cardigan \(number 0\) or cardigan \(number 1\); give the name as it is"
  )
  with pytest.raises(UserError, match=message):
    number('CARDIGAN')
  with pytest.raises(UserError, match="'cardigans' is not a class.*did you mean 'cardigan'"):
    number('cardigans')


def test_names_that_go_on_are_proposed(tmp_path):
  found = _opened(tmp_path, ['crane (bird)', 'crane (machine)', 'dog'])
  with pytest.raises(UserError, match=r"did you mean 'crane \(bird\)' or 'crane \(machine\)'\?"):
    found.encode('Crane', 1)


@pytest.mark.parametrize(
  'names, keys, message',
  [
    (['1', '2', '3'], None, "the class 0 has the name '1', which also stands for the class 1"),
    (['cat', 'dog'], ['1', '0'], "the class 0 has the name '1', which also stands for the class 1"),
    (['ice cream', 'ice  cream'], None, "the class 1 has the name 'ice cream', .* the class 0"),
  ],
)
def test_a_text_that_stands_for_two_classes_is_refused(tmp_path, names, keys, message):
  with pytest.raises(UserError, match=message):
    _opened(tmp_path, names, keys)


def test_numbers_that_are_their_own_names(tmp_path):
  found = _opened(tmp_path, ['0', '1', '2', '99'])
  assert [int(found.encode(text, 1)[0][0]) for text in ('0', '2', '3', '99')] == [0, 2, 3, 3]


def test_a_number_comes_before_a_name(tmp_path):
  """As labels may be numbers; `content` no longer writes such files."""
  path = tmp_path / 'vocabulary.model'
  path.write_text('{"parti_jax_classes": 2, "names": ["1", "cat"], "keys": ["cat", "dog"]}')
  found = class_tokenizer.ClassTokenizer(path)
  assert [int(found.encode(text, 1)[0][0]) for text in ('1', 'cat', 'dog')] == [1, 1, 1]

"""Turns the name or the number of a class into the text token of a class-conditional generator."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.data import class_names
from parti_jax.data import text_tokenizer

# The entry of a file that says how many classes there are; such a file begins with it.
COUNT = 'parti_jax_classes'
_NAMES = ('names', 'keys')


def is_file(content: bytes) -> bool:
  """Returns whether a file is one of classes."""
  return content.lstrip()[:1] == b'{' and f'"{COUNT}"'.encode() in content[:64]


def content(count: int, classes: class_names.Classes | None = None) -> bytes:
  """Returns what the file has.

  Args:
    count: number of classes.
    classes: their names; None if there are only numbers.

  Raises:
    UserError: if there is another number of names, or a text would stand for two classes.
  """
  found: dict[str, Any] = {COUNT: count}
  if classes is not None:
    if len(classes) != count:
      raise UserError(f'there are {len(classes)} names of classes, but the network has {count}')
    found |= {'names': list(classes.names), 'keys': list(classes.keys)}
    for texts in (found['names'], found['keys']):
      _check_different(texts)
  return (json.dumps(found, indent=1, ensure_ascii=False) + '\n').encode()


class ClassTokenizer:
  """Converts a text to the id of its class: the number that it says, or that of the class of its name.

  Names may be in upper or lower case, unless several differ in this alone, as two of ImageNet's do. The
  empty text has the id after the last class, which stands for no class.

  Attributes:
    path: its file.
    fingerprint: fingerprint of the file's contents.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads a file that `content` made.

    Args:
      path: a path or URL.

    Raises:
      UserError: the file is missing or damaged.
    """
    self.path = os.fspath(path)
    found = text_tokenizer.read_file(path)
    try:
      values = json.loads(found)
      count = values.pop(COUNT)
      names = {name: values.pop(name) for name in _NAMES if name in values}
      well_formed = not values and all(
        isinstance(texts, list) and all(isinstance(text, str) for text in texts)
        for texts in names.values()
      )
    except (ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
      raise UserError(f'{self.path} is damaged: {error!r}; export the model again') from error
    self._count = checks.whole_number(f'{self.path}: {COUNT}', count, 1, checks.LARGEST_INT32 - 1)
    if not well_formed or any(len(texts) != count for texts in names.values()):
      raise UserError(
        f'{self.path} is damaged: it does not have a name for each of {count} classes; export the '
        'model again'
      )
    self._names = names.get('names') or [str(number) for number in range(count)]
    # The classes of a text as it is, and of names in other case. Numbers come before names, since
    # labels may be numbers, and names before keys.
    self._numbers: dict[str, int] = {}
    self._folded: dict[str, list[int]] = {}
    for texts in (names[name] for name in reversed(_NAMES) if name in names):
      folded: dict[str, list[int]] = {}
      for number, text in enumerate(texts):
        self._numbers[_spaced(text)] = number
        folded.setdefault(_spaced(text).casefold(), []).append(number)
      self._folded |= folded
    self._numbers |= {str(number): number for number in range(count)}
    self.fingerprint = fingerprints.of_vocabulary(found)

  @property
  def size(self) -> int:
    """The number of ids: one more than there are classes."""
    return self._count + 1

  def encode(self, text: str, length: int) -> tuple[np.ndarray, str]:
    """Encodes a text; the arguments and results are those of `text_tokenizer.TextTokenizer`.

    Raises:
      UserError: the text isn't UTF-8, or neither the number nor the name of a class.
    """
    text_tokenizer.check_text(text)
    ids = np.zeros([length], np.int32)
    ids[0] = self._number(text) if text.strip() else self._count
    return ids, ''

  def _number(self, text: str) -> int:
    text = _spaced(text)
    if (found := self._numbers.get(text)) is not None:
      return found
    several = self._folded.get(text.casefold(), [])
    if len(several) == 1:
      return several[0]
    if several:
      names = ' or '.join(f'{self._names[number]} (number {number})' for number in several)
      raise UserError(f'{checks.shown(text)} may be {names}; give the name as it is, or the number')
    known = dict.fromkeys([*self._folded, *self._numbers])
    # Such as ImageNet's two cranes, whose names continue in parentheses.
    close = [name for name in known if name.startswith(f'{text.casefold()} (')][:3]
    close = close or difflib.get_close_matches(text.casefold(), known, 3)
    hint = f'; did you mean {" or ".join(map(repr, close))}?' if close else ''
    raise UserError(
      f'{checks.shown(text)} is not a class: the model draws classes, so give a number from 0 to '
      f'{self._count - 1}{"" if self._names[0] == "0" else " or a name"}{hint}'
    )

  def is_empty(self, ids: Sequence[int] | np.ndarray) -> bool:
    """Returns whether a result of `encode` stands for no class."""
    return int(ids[0]) == self._count

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the name of a class, or its number if there are no names; '' for none."""
    number = int(ids[0])
    return self._names[number] if number < self._count else ''


def _check_different(texts: Sequence[str]) -> None:
  """Raises UserError if two classes have the same name, or one is named as the number of another."""
  known = {str(number): number for number in range(len(texts))}
  for number, text in enumerate(map(_spaced, texts)):
    if (other := known.setdefault(text, number)) != number:
      raise UserError(
        f'the class {number} has the name {text!r}, which also stands for the class {other}; give it '
        'another name'
      )


def _spaced(text: str) -> str:
  """Returns a text with single spaces between words."""
  return ' '.join(text.split())

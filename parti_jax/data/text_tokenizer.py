"""Turns texts into token ids with a SentencePiece model, a tokenizer.json of Hugging Face's, or classes.

| file | class |
|---|---|
| SentencePiece model | `parti_jax.data.vocabulary.TextVocabulary` |
| `tokenizer.json`, such as of CLIP's byte pairs | `parti_jax.data.json_tokenizer.JsonTokenizer` |
| names of classes | `parti_jax.data.class_tokenizer.ClassTokenizer` |
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from parti_jax.core import storage
from parti_jax.core.errors import UserError

# Maximum bytes of a tokenizer's file; one of 250,000 pieces has five million as a SentencePiece
# model, and 35 million as a tokenizer.json.
LARGEST_FILE = 64 * 2**20


class TextTokenizer(Protocol):
  """Converts texts to token ids of a fixed length.

  Attributes:
    path: its file.
    fingerprint: fingerprint of the file's contents, as in `parti_jax.core.fingerprints`.
  """

  path: str
  fingerprint: str

  @property
  def size(self) -> int:
    """The number of ids, including the special ones."""

  def encode(self, text: str, length: int) -> tuple[np.ndarray, str]:
    """Encodes a text.

    Args:
      text: any text.
      length: the number of ids to return.

    Returns:
      The ids, int32 [length], with the special ones that the network expects, padded with 0; and
      the end of the text that did not fit, '' if the whole text fits. A cut text keeps the
      special ids at its end.

    Raises:
      UserError: the text isn't UTF-8, or `length` leaves no place for the special ids.
    """

  def is_empty(self, ids: Sequence[int] | np.ndarray) -> bool:
    """Returns whether a result of `encode` has nothing between the special ids."""

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, without special ids and padding."""


def read_file(path: str | os.PathLike[str], hint: str = '') -> bytes:
  """Reads a tokenizer's file.

  Args:
    path: a path or URL.
    hint: what to do about a missing file, for the message.

  Raises:
    UserError: the file is missing or too large.
  """
  try:
    return storage.read(os.fspath(path), LARGEST_FILE)
  except OSError as error:
    raise UserError(
      f'the vocabulary {os.fspath(path)} cannot be read ({error.strerror or error}){hint}'
    ) from error


def check_text(text: str) -> None:
  """Raises UserError for a text with lone surrogates.

  Python creates them for command line arguments that aren't UTF-8.
  """
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'the text {text[:80]!r} is not UTF-8: character {error.start + 1} of it is '
      'half a character; write it in UTF-8'
    ) from error


def open_tokenizer(path: str | os.PathLike[str], lower_case: bool = False) -> TextTokenizer:
  """Opens a tokenizer of any kind.

  Args:
    path: a path or URL.
    lower_case: whether texts are made lower case first; of a SentencePiece model that doesn't do
      so itself. A tokenizer.json says by itself what it does.

  Raises:
    UserError: the file is missing or damaged, or of another kind.
  """
  # Imported here because they import this module.
  from parti_jax.data import class_tokenizer
  from parti_jax.data import json_tokenizer
  from parti_jax.data import vocabulary

  content = read_file(path)
  if class_tokenizer.is_file(content):
    return class_tokenizer.ClassTokenizer(path)
  if content.lstrip()[:1] == b'{':
    return json_tokenizer.JsonTokenizer(path)
  return vocabulary.TextVocabulary(os.fspath(path), lower_case)

"""Text features: the output of a frozen text encoder for the tokens of a text, in a token cache.

`info.json` of a token cache with text features has two more entries:

  "text_features": {"encoder": "5d3c...", "vocabulary": "9f8e...", "text_length": 128,
                    "width": 4096, "dtype": "bfloat16"},
  "empty_text": the features of the empty text, in base64

`encoder` and `vocabulary` are fingerprints. They and `text_length` determine the features, so a
run may use them only if its own are the same. Padding has no features.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from parti_jax.core.errors import UserError
from parti_jax.data import damage
from parti_jax.data import text_tokenizer

# Names of the dtypes in which a cache may store features.
DTYPES: Mapping[str, np.dtype] = {
  'bfloat16': np.dtype(ml_dtypes.bfloat16),
  'float16': np.dtype(np.float16),
}
# The entries of `info.json`.
ENTRY, EMPTY_TEXT = 'text_features', 'empty_text'
WITHOUT = 'set token_cache.text_features=False to run the text encoder in each step'
# Bytes of the number of tokens before the features of a text.
_COUNT = np.dtype('<u4')

Rows = Float[np.ndarray, 'tokens width']


@dataclasses.dataclass(frozen=True)
class TextFeatures:
  """What a token cache says about its text features.

  Attributes:
    encoder: fingerprint of the text encoder.
    vocabulary: fingerprint of its text tokenizer.
    text_length: maximum number of text tokens, beyond which texts were cut.
    width: number of features of a token.
    dtype: name of the stored dtype, in `DTYPES`.
    empty: the features of the empty text, in the form of `to_bytes`.
    name: name of the cache, for messages.
  """

  encoder: str
  vocabulary: str
  text_length: int
  width: int
  dtype: str
  empty: bytes = b''
  name: str = dataclasses.field(default='', compare=False)

  @property
  def bytes_of_token(self) -> int:
    """Bytes of the features of one token."""
    return self.width * DTYPES[self.dtype].itemsize

  def info(self) -> dict[str, Any]:
    """Returns the entries of `info.json`."""
    return {
      ENTRY: {name: getattr(self, name) for name in _FIELDS},
      EMPTY_TEXT: base64.b64encode(self.empty).decode(),
    }

  def to_bytes(self, rows: Rows) -> bytes:
    """Returns the stored form of a text's features.

    Raises:
      ValueError: they have another shape or dtype, or more tokens than `text_length`.
    """
    if rows.dtype != DTYPES[self.dtype] or rows.shape[1:] != (self.width,):
      raise ValueError(f'text features are {rows.dtype}{list(rows.shape)}, expected {self}')
    if len(rows) > self.text_length:
      raise ValueError(f'text features of {len(rows)} tokens, expected {self.text_length} at most')
    return np.array(len(rows), _COUNT).tobytes() + rows.tobytes()

  def from_bytes(self, data: bytes, count: int) -> list[Rows] | None:
    """Returns the features of `count` texts, the inverse of `to_bytes`; None if `data` is invalid."""
    found: list[Rows] = []
    place = 0
    for _ in range(count):
      start = place + _COUNT.itemsize
      if start > len(data):
        return None
      tokens = int(np.frombuffer(data, _COUNT, 1, place)[0])
      place = start + tokens * self.bytes_of_token
      if tokens > self.text_length or place > len(data):
        return None
      rows = np.frombuffer(data, DTYPES[self.dtype], tokens * self.width, start)
      found.append(rows.reshape(tokens, self.width))
    return found if place == len(data) else None

  def padded(self, rows: Rows | None) -> Float[np.ndarray, 'text_length width']:
    """Returns a text's features with zeros for padding, which attention masks hide.

    Args:
      rows: the features of the text; None for those of the empty text.

    Raises:
      damage.Unusable: the cache has no features of this text.
    """
    if rows is None:
      (rows,) = self.from_bytes(self.empty, 1) or [np.zeros((0, self.width))]
    if not len(rows):
      raise damage.Unusable('caption without text features')
    found = np.zeros((self.text_length, self.width), DTYPES[self.dtype])
    found[: len(rows)] = rows
    return found

  def check_texts(self, vocabulary: text_tokenizer.TextTokenizer, text_length: int) -> None:
    """Checks that a run makes the same text tokens.

    Raises:
      UserError: it has another vocabulary or cuts texts elsewhere.
    """
    if vocabulary.fingerprint != self.vocabulary:
      raise UserError(
        f'{self.name} has text features of the vocabulary {self.vocabulary}, but vocabulary.path='
        f'{vocabulary.path!r} has {vocabulary.fingerprint}; set vocabulary.path to the folder that '
        f'was given to `parti-jax tokenize --text_encoder`, or {WITHOUT}'
      )
    if text_length != self.text_length:
      raise UserError(
        f'{self.name} has text features of {self.text_length} text tokens, but the run has '
        f'text_length={text_length}; set imported_text_encoder.text_length={self.text_length}, '
        f'`parti-jax tokenize` with --text_length={text_length}, or {WITHOUT}'
      )


_FIELDS = ('encoder', 'vocabulary', 'text_length', 'width', 'dtype')


def of_info(info: Mapping[str, Any], name: str = '') -> TextFeatures | None:
  """Returns the text features that an `info.json` describes; None if the cache has none.

  Args:
    info: the content of `info.json`.
    name: name of the cache, for messages.

  Raises:
    ValueError: the entries are damaged.
  """
  entry = info.get(ENTRY)
  if entry is None:
    return None
  if not isinstance(entry, dict) or set(entry) != set(_FIELDS):
    raise ValueError(f'{ENTRY} is damaged')
  whole = lambda value, most: type(value) is int and 1 <= value <= most
  try:
    empty = base64.b64decode(info.get(EMPTY_TEXT, 0), validate=True)
  except (TypeError, binascii.Error) as error:
    raise ValueError(f'{EMPTY_TEXT} is damaged') from error
  found = TextFeatures(**entry, empty=empty, name=name)
  if not (
    all(isinstance(value, str) for value in (found.encoder, found.vocabulary, found.dtype))
    and found.dtype in DTYPES
    and whole(found.text_length, 2**20)
    and whole(found.width, 2**20)
    and (rows := found.from_bytes(empty, 1)) is not None
    and len(rows[0])
  ):
    raise ValueError(f'{ENTRY} is damaged')
  return found


def check_same(
  first: TextFeatures | None, other: TextFeatures | None, names: Sequence[str]
) -> None:
  """Raises UserError unless the examples of two caches can be in one batch."""
  one, two = (
    None if found is None else dataclasses.replace(found, empty=b'') for found in (first, other)
  )
  if one == two:
    return
  if one is None or two is None:
    having, lacking = names if two is None else reversed(names)
    raise UserError(
      f'mixture.sources: {having} has text features, but {lacking} has none; `parti-jax tokenize` '
      f'it with --text_encoder, or {WITHOUT}'
    )
  name = next(name for name in _FIELDS if getattr(one, name) != getattr(two, name))
  raise UserError(
    f'mixture.sources: the text features of {names[0]} have {name} {getattr(one, name)}, and those '
    f'of {names[1]} {getattr(two, name)}; `parti-jax tokenize` both with one --text_encoder, or '
    f'{WITHOUT}'
  )

"""Tokenizers of Hugging Face's `tokenizers` library, from a tokenizer.json."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

import numpy as np

from parti_jax.core import checks
from parti_jax.core import fingerprints
from parti_jax.core.errors import UserError
from parti_jax.data import dalle_mini_texts
from parti_jax.data import text_tokenizer

# An entry that `tokenizers` doesn't know: a name in `dalle_mini_texts.NORMALIZERS`.
NORMALIZER = 'parti_jax_normalizer'


class JsonTokenizer:
  """Converts texts to token ids as a tokenizer.json defines.

  The special ids around a text are those of its post-processor. Its own settings of truncation
  and padding are not used: `encode` gets the length, and padding is 0. With an entry NORMALIZER, texts
  are changed as that says before all else, and special tokens in a text are characters.
  """

  def __init__(self, path: str | os.PathLike[str]):
    """Reads a tokenizer.json.

    Args:
      path: a path or URL.

    Raises:
      UserError: the file is missing or isn't a tokenizer.json.
    """
    # An optional package.
    import tokenizers

    self.path = os.fspath(path)
    content = text_tokenizer.read_file(path)
    self._normalize, known = self._split(content)
    try:
      self._tokenizer = tokenizers.Tokenizer.from_buffer(known)
    except Exception as error:  # The library raises plain exceptions.
      raise UserError(f'{self.path} is not a tokenizer.json: {error}') from error
    self._tokenizer.encode_special_tokens = self._normalize is not None
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self._special = self._with_special(self._tokenizer.encode('', add_special_tokens=False)).ids
    self.fingerprint = fingerprints.of_vocabulary(content)

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    # The library doesn't pickle it.
    self._tokenizer.encode_special_tokens = self._normalize is not None

  def _split(self, content: bytes) -> tuple[Callable[[str], str] | None, bytes]:
    """Returns what the entry NORMALIZER says, and the rest, which `tokenizers` knows."""
    if NORMALIZER.encode() not in content:
      return None, content
    try:
      found = json.loads(content)
      name = found.pop(NORMALIZER, None)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
      raise UserError(f'{self.path} is not a tokenizer.json: {error}') from error
    if name is None:  # It is a word of the vocabulary.
      return None, content
    if not isinstance(name, str) or name not in dalle_mini_texts.NORMALIZERS:
      raise UserError(
        f'{self.path}: {NORMALIZER} is {checks.shown_as_json(name)}, not one of '
        f'{", ".join(dalle_mini_texts.NORMALIZERS)}'
      )
    rest = json.dumps(found, ensure_ascii=False).encode()
    return dalle_mini_texts.NORMALIZERS[name], rest

  @property
  def size(self) -> int:
    """The number of ids, including the special ones."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

  def encode(self, text: str, length: int) -> tuple[np.ndarray, str]:
    """Encodes a text, as `text_tokenizer.TextTokenizer.encode` describes.

    Raises:
      UserError: the text isn't UTF-8, or `length` leaves no place for the special ids.
    """
    text_tokenizer.check_text(text)
    special = self._tokenizer.num_special_tokens_to_add(is_pair=False)
    if length < max(special, 1):
      raise UserError(f'{length} text tokens leave no place for the {special} special ones')
    text = text if self._normalize is None else self._normalize(text)
    whole = self._tokenizer.encode(text, add_special_tokens=False)
    kept = min(len(whole.ids), length - special)
    cut = text[whole.offsets[kept][0] :] if kept < len(whole.ids) else ''
    whole.truncate(kept)
    ids = self._with_special(whole).ids
    padded = np.zeros([length], np.int32)
    padded[: len(ids)] = ids
    return padded, cut.strip()

  def is_empty(self, ids: Sequence[int] | np.ndarray) -> bool:
    """Returns whether a result of `encode` has nothing between the special ids."""
    count = len(self._special)
    return list(ids[:count]) == self._special and not np.any(ids[count:])

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text of ids, without special ids and padding."""
    ids = [int(i) for i in ids]
    if self._special and self._special[-1] in ids:
      ids = ids[: ids.index(self._special[-1])]
    else:
      while ids and ids[-1] == 0:
        ids.pop()
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def _with_special(self, encoding: Any) -> Any:
    return self._tokenizer.post_process(encoding, None, add_special_tokens=True)

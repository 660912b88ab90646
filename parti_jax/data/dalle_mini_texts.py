"""What is done to texts before DALL·E mini's byte pairs, under the name of the code that does so.

| name | texts |
|---|---|
| min_dalle | lower-case ASCII; emoji become their names, other characters are dropped |
| dalle_mini | what the published models were trained on: ASCII, commas as the only punctuation |

A tokenizer.json holds the name (`json_tokenizer.NORMALIZER`), since the steps are more than the
`tokenizers` library offers.
"""

from __future__ import annotations

import html
import importlib
import re
from collections.abc import Callable
from typing import Any

from parti_jax.core.errors import UserError

# Stand for what later steps would replace.
_DOT, _APOSTROPHE, _SLASH = '\x00', '\x01', '\x02'


def min_dalle(text: str) -> str:
  """Returns a text as min-dalle's `TextTokenizer` sees it.

  Raises:
    UserError: if the text has characters beyond ASCII and a package for them is missing.
  """
  if not text.isascii():
    text = _package('emoji', text).demojize(text, delimiters=('', ''))
  return text.lower().encode('ascii', errors='ignore').decode()


def dalle_mini(text: str) -> str:
  """Returns a text as dalle-mini's `TextNormalizer` does, with three differences.

  - A hashtag is not split into words, for which dalle-mini has a list of word frequencies; only '_'
    splits it.
  - A single `<person>`, as in the captions of CC12M, always becomes 'a person', which dalle-mini draws
    from three expressions.
  - What has no letters is the empty text, not a space, so that it isn't taken for a prompt.

  Raises:
    UserError: if a package is missing.
  """
  if not text:
    return ''
  ftfy, emoji, unidecode = (_package(name, text) for name in ('ftfy', 'emoji', 'unidecode'))
  text = html.unescape(html.unescape(ftfy.fix_text(text)))
  text = unidecode.unidecode(emoji.demojize(text)).lower()
  for pattern, replacement in _STEPS:
    text = re.sub(pattern, replacement, text)
  text = text.strip().removesuffix(',').removeprefix(',').strip()
  return f' {text}' if text else ''


def _words(hashtag: re.Match[str]) -> str:
  return ' '.join(part for part in re.split(r"[^a-zA-Z0-9']+", hashtag[1]) if part)


# Patterns and what replaces them, one after another.
_STEPS: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...] = (
  (f'[{_DOT}{_APOSTROPHE}{_SLASH}]', ''),
  # The placeholders for persons in CC12M's captions.
  (r'<person>(?:[,\s]*(?:and)*[,\s]*<person>)+', ' people '),
  ('<person>', ' a person '),
  # References of Wikipedia at both ends, HTML and links.
  (r'\A\s*\[\d+\]', ''),
  (r'\[\d+\]\s*\Z', ''),
  (r'<[^<]+?>', ' '),
  (r'http\S+', ''),
  # Thousands: twice, since a match takes the digit before a comma.
  (r'(\d),(\d{3})', r'\1\2'),
  (r'(\d),(\d{3})', r'\1\2'),
  (r'(\w)\.(\w)', rf'\1{_DOT}\2'),
  (r"'(?=([stdm]|ll|re|ve)\b)", _APOSTROPHE),
  (r'(\d)/(\d)', rf'\1{_SLASH}\2'),
  (r'(\w)-(\w)', r'\1 \2'),
  (r'([%&/$*])', r' \1 '),
  (r'#(\w+)', _words),
  (r'[_#\\]', ' '),
  (r"""['"`]""", ' " '),
  (r'[()\[\].,|:;?!=+~\-/{}]', ','),
  (_DOT, '.'),
  (_APOSTROPHE, "'"),
  (_SLASH, '/'),
  # A character four times or more; Roman numerals have three.
  (r'(\D)\1{3,}', r'\1'),
  (r'\s+', ' '),
  (r'[\s"]*"[\s"]*', ' " '),
  (r'[\s,]*,[\s,]*', ', '),
  (r'\s+', ' '),
)


def _package(name: str, text: str) -> Any:
  try:
    return importlib.import_module(name)
  except ModuleNotFoundError as error:
    raise UserError(
      f'the text {text[:80]!r} needs the package {name} to become what DALL·E mini reads; run: '
      'pip install "parti_jax[dalle_mini]"'
    ) from error


# By the names in a tokenizer.json.
NORMALIZERS: dict[str, Callable[[str], str]] = {'min_dalle': min_dalle, 'dalle_mini': dalle_mini}

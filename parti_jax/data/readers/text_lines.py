"""Reads files with one text per line."""

import io
from collections.abc import Iterator
from collections.abc import Mapping
from typing import AnyStr
from typing import IO

from parti_jax.core import storage
from parti_jax.data import captions
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import packed


def lines(path: str) -> Iterator[Mapping[str, bytes] | Damaged]:
  """Yields {'caption': line} for the lines of a text file, plain or packed.

  Only newlines end a line. A file in UTF-16 or UTF-32 must begin with a byte order mark.
  """
  with storage.open_file(path) as file:
    try:
      file = packed.unpacked(file, path)
      encoding = storage.encoding_of(file.peek(4)[:4])
      if encoding == 'utf-8-sig':
        for line in _lines(file, b'\n'):
          yield {'caption': line}
      else:
        text = io.TextIOWrapper(file, encoding, newline='\n')
        for characters in _lines(text, '\n'):
          yield {'caption': characters.encode('utf-8', 'surrogatepass')}
    except (OSError, UnicodeDecodeError):
      yield Damaged('rest of a damaged text file')


def _lines(file: IO[AnyStr], newline: AnyStr) -> Iterator[AnyStr]:
  """Yields the lines of a binary or text file, truncated if they are too long."""
  while line := file.readline(captions.MAX_BYTES + 1):
    yield line
    # Skips the rest of a long line without keeping it in memory.
    while line and not line.endswith(newline):
      line = file.readline(captions.MAX_BYTES)

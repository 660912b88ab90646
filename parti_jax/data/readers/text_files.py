"""Reads text files as a whole; detects their encoding and splits their lines.

Only newlines end a line. `str.splitlines` also splits at U+2028, U+0085 and other characters that
may occur within a text.
"""

import os

from parti_jax.core import storage
from parti_jax.core.errors import UserError

# Maximum size in bytes of a text file that is read as a whole.
MAX_BYTES = 2**26


def read(path: str | os.PathLike[str], what: str) -> str:
  """Returns the content of a text file, without its byte order mark.

  Args:
    path: a path or URL.
    what: description of the file, for the beginning of messages.

  Raises:
    UserError: it can't be read, is too large or isn't text.
  """
  try:
    data = storage.read(path, MAX_BYTES)
    return data.decode(storage.encoding_of(data))
  except OSError as error:
    raise UserError(f'{what} cannot be read: {error.strerror or error}') from error
  except UnicodeDecodeError as error:
    raise UserError(
      f'{what} cannot be read: it is not {error.encoding.upper()} text; save it as UTF-8'
    ) from error


def lines(text: str) -> list[str]:
  r"""Returns the lines of a text, which end with \n or \r\n, or with \r if it has no \n.

  Some spreadsheet programs still write bare \r. In a text with \n, a bare \r is whitespace.
  """
  if '\n' not in text:
    return text.removesuffix('\r').split('\r')
  return [line.removesuffix('\r') for line in text.removesuffix('\n').split('\n')]

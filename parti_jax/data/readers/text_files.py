"""Text files that are read whole: their encoding and their lines.

Lines end at newlines alone. `str.splitlines` ends them at U+2028, U+0085 and other characters as
well, which may stand within a text.
"""

import os

from parti_jax.core import storage
from parti_jax.core.errors import UserError

# The most bytes of a text file that is read whole.
MAX_BYTES = 2**26


def read(path: str | os.PathLike[str], what: str) -> str:
  """Returns the content of a text file, without its byte order mark.

  Args:
    path: a path or URL.
    what: the file, as messages begin.

  Raises:
    UserError: it can't be read, is too large or not text.
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
  r"""Returns the lines of a text, which end at \n or \r\n, or at \r where it has no \n.

  Spreadsheet programs still write \r alone. In a text that has \n, \r alone is a blank in a line.
  """
  if '\n' not in text:
    return text.removesuffix('\r').split('\r')
  return [line.removesuffix('\r') for line in text.removesuffix('\n').split('\n')]

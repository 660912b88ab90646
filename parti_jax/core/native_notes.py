"""Keeps what native libraries write to the terminal out of it."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def hidden() -> Iterator[None]:
  """Hides what native code writes to stderr, unless an error follows.

  Libraries such as TensorFlow and libtpu write notes on their build and on the machine before
  their own log levels hold, so settings alone do not stop them.
  """
  sys.stderr.flush()
  terminal = os.dup(2)
  with tempfile.TemporaryFile() as notes:
    os.dup2(notes.fileno(), 2)
    try:
      yield
    except BaseException:
      notes.seek(0)
      os.write(terminal, notes.read())
      raise
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)

"""Hides the notes that native libraries write to the terminal."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def hidden() -> Iterator[None]:
  """Hides what native code writes to stderr, unless an error follows.

  Libraries such as TensorFlow and libtpu write notes about their build and the machine before
  their log levels take effect, so log settings alone don't silence them.
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

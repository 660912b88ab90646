"""TensorFlow, seqio and tensorflow-datasets, quiet and kept off the accelerator.

Every module that reads data takes them from here, so that the settings are made before
TensorFlow starts: it would otherwise fill the terminal with notes on its build and take the GPU
memory that JAX needs.
"""

# pylint: disable=g-import-not-at-top

import contextlib
import os
import sys
import tempfile

from parti_jax import optional_packages
from parti_jax.errors import UserError

__all__ = ['seqio', 'tf', 'tfds']


@contextlib.contextmanager
def _without_native_notes():
  """Keeps what native code writes to stderr from the terminal, unless an error follows.

  TensorFlow writes notes on its build before its own log level holds, so TF_CPP_MIN_LOG_LEVEL
  alone does not stop them.
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


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
try:
  with _without_native_notes():
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    import seqio
    import tensorflow_datasets as tfds
except ImportError as error:
  raise UserError(optional_packages.missing_extra(error) or str(error)) from error

if not sys.stderr.isatty():
  tfds.disable_progress_bar()

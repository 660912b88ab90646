"""TensorFlow, seqio and tensorflow-datasets, quiet and kept off the accelerator.

Every module that reads data takes them from here, so that the settings are made before
TensorFlow starts: it would otherwise fill the terminal with notes on its build and take the GPU
memory that JAX needs.
"""

# pylint: disable=g-import-not-at-top,wrong-import-position

import os
import sys

from parti_jax.errors import UserError

os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')

try:
  import seqio
  import tensorflow as tf
  import tensorflow_datasets as tfds
except ImportError as error:
  raise UserError(
      f'reading data needs the package {error.name!r}: pip install "parti_jax[data]"'
  ) from error

tf.config.set_visible_devices([], 'GPU')
if not sys.stderr.isatty():
  tfds.disable_progress_bar()

__all__ = ['seqio', 'tf', 'tfds']

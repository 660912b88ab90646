"""Imports TensorFlow, seqio and tensorflow-datasets, quiet and kept off the accelerator.

All modules that read data with them import them from here, so that the settings are made before
TensorFlow starts. Otherwise it fills the terminal with notes on its build and takes the GPU memory
that JAX needs.
"""

import os

from parti_jax.core import native_notes
from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError
from parti_jax.data.quiet_tfds import tfds

__all__ = ['seqio', 'tf', 'tfds']


os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')
try:
  with native_notes.hidden():
    import tensorflow as tf

    tf.config.set_visible_devices([], 'GPU')
    import seqio
except ImportError as error:
  raise UserError(optional_packages.missing_extra(error) or str(error)) from error

"""Imports tensorflow-datasets, without TensorFlow, and keeps it quiet.

All modules that use it import it from here. Otherwise it draws progress bars into files and pipes,
and warns of every picture size that is not among the builder's own.
"""

import logging
import sys

from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError

__all__ = ['tfds']

try:
  import tensorflow_datasets as tfds
except ImportError as error:
  raise UserError(optional_packages.missing_extra(error) or str(error)) from error


def _is_wanted(record: logging.LogRecord) -> bool:
  return not str(record.msg).startswith('Using custom data configuration')


logging.getLogger('absl').addFilter(_is_wanted)
if not sys.stderr.isatty():
  tfds.disable_progress_bar()

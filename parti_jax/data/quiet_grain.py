"""Imports grain, configured so that its exceptions contain no extra text.

All modules that read through grain import it from here.
"""

from absl import flags

from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError

__all__ = ['grain']

try:
  import grain
except ImportError as error:
  raise UserError(optional_packages.missing_extra(error) or str(error)) from error

if not flags.FLAGS.is_parsed():
  # Worker processes need absl's flags, and nothing parses them here.
  flags.FLAGS.mark_as_parsed()
# Otherwise grain appends a paragraph on filtered tracebacks to each message.
grain.config.update('py_traceback_filtering', 'off')

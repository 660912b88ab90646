"""grain, set so that an exception in it is the exception alone.

Every module that reads through grain takes it from here.
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
  # Worker processes ask for absl's flags, and nobody parses any here.
  flags.FLAGS.mark_as_parsed()
# Otherwise a paragraph on filtered tracebacks is added to every message.
grain.config.update('py_traceback_filtering', 'off')

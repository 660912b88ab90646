"""Keeps the host allocator's freed memory between steps, for computing on a CPU."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> bool:
  """Lets glibc keep freed memory instead of giving it back to the system.

  On a CPU, XLA allocates its buffers again at each step. By default glibc maps and unmaps the
  large ones each time, and the page faults cost more than the element-wise work on them. A thread
  with a separate arena would do so in any case: only the first arena can grow beyond 64 MiB. Call
  this before XLA starts its threads.

  Returns:
    Whether the allocator accepted the settings; False where the C library isn't glibc.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  # One arena, no mappings; trim and grow by sizes that a step doesn't reach (bytes).
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
  return all(mallopt(name, value) == 1 for name, value in settings)

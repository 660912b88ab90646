"""Memory of the host's allocator, kept between steps where the host itself computes."""

from __future__ import annotations

import ctypes
import sys

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8


def keep_freed() -> bool:
  """Lets glibc keep freed memory instead of giving it back to the system.

  XLA on a CPU allocates its buffers anew at each step. By default glibc maps and unmaps the
  large ones each time, and the page faults cost more than the element-wise work on them. A thread
  with an arena of its own would do so in any case: arenas other than the first can't grow beyond
  64 MiB. So this must come before the threads that XLA runs on.

  Returns:
    Whether the allocator took it; False where the C library is not glibc.
  """
  if not sys.platform.startswith('linux'):
    return False
  try:
    mallopt = ctypes.CDLL(None).mallopt
  except (AttributeError, OSError):
    return False
  # One arena, 0 mappings; trim and grow by sizes that a step does not reach (bytes).
  settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 * 2**20))
  return all(mallopt(name, value) == 1 for name, value in settings)

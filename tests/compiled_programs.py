"""The memory of what JAX keeps of the programs that tests compile."""

import ctypes
import os
import pathlib


def drop_lowered() -> None:
  """Drops the MLIR modules that programs were compiled from; the programs stay.

  JAX keeps a module as long as its function, to compile it again. Each has a context of its own of about
  1 MB, several times as much as the program of a single operation. JAX has no public way to drop them.
  """
  from jax._src import pjit
  from jax._src.interpreters import pxla

  try:
    caches = pjit._pjit_lower, pxla._cached_lowering_to_hlo
  except AttributeError:  # Another version of JAX: test_compiled_programs.py fails, others needn't.
    return
  for cache in caches:
    cache.cache_clear()


def return_freed_memory() -> None:
  """Returns freed memory to the system, as far as the C library can; by itself glibc keeps most of it."""
  if trim := getattr(ctypes.CDLL(None), 'malloc_trim', None):
    trim(0)


def resident_bytes() -> float:
  """Returns the memory of this process, or infinity where the system doesn't say."""
  try:
    pages = int(pathlib.Path('/proc/self/statm').read_text().split()[1])
  except (OSError, ValueError):
    return float('inf')
  return pages * os.sysconf('SC_PAGE_SIZE')

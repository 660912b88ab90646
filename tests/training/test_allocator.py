"""Tests that memory freed by a thread is reused by the next step without page faults."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.process

# Runs in a separate process, since the settings affect a whole process.
_SCRIPT = """
import ctypes, resource, threading
from parti_jax.runs import allocator
print(allocator.keep_freed() if {keep} else None)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def touch():
  for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(100 * 2 ** 20)
    ctypes.memset(block, 1, 100 * 2 ** 20)
    libc.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

faults = []
thread = threading.Thread(target=touch)
thread.start()
thread.join()
print(faults[-1])
"""


def _run(keep):
  out = subprocess.run(
    [sys.executable, '-c', _SCRIPT.format(keep=keep)], check=True, capture_output=True, text=True
  ).stdout.split()
  return out[0], int(out[1])


def test_a_block_that_a_thread_frees_is_not_mapped_again():
  kept, faults = _run(True)
  if kept == 'False':
    pytest.skip('the C library is not glibc')
  assert faults < 100


def test_without_it_the_block_is_mapped_again():
  if _run(True)[0] == 'False':
    pytest.skip('the C library is not glibc')
  assert _run(False)[1] > 100

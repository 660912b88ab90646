"""Tests that the memory of compiled programs can be had back, as the tests' own fixture does."""

import gc

import compiled_programs
import jax
import numpy as np
import pytest
from jaxlib.mlir import ir


def test_modules_are_dropped_and_their_programs_kept(caplog):
  one = np.float32(1)
  functions = [jax.jit(lambda x, number=number: x * number) for number in range(3)]
  with jax.log_compiles():
    for function in functions:
      function(one)
    assert 'Compiling' in caplog.text
    caplog.clear()
    gc.collect()
    before = ir.Context._get_live_count()
    compiled_programs.drop_lowered()
    gc.collect()
    assert ir.Context._get_live_count() <= before - len(functions)
    assert [float(function(one)) for function in functions] == [0, 1, 2]
    assert 'Compiling' not in caplog.text


def test_freed_memory_is_returned():
  if compiled_programs.resident_bytes() == float('inf'):
    pytest.skip('the system does not say how much memory a process has')
  # Too small for an allocation of its own in glibc, so that it keeps them when they are freed.
  blocks = [np.ones(2**13, np.uint8) for _ in range(2**13)]
  last = np.ones(2**13, np.uint8)
  full = compiled_programs.resident_bytes()
  del blocks
  compiled_programs.return_freed_memory()
  assert compiled_programs.resident_bytes() < full - 2**25 and last.all()

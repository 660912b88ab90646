"""A topology that libtpu can compile for, if it is installed."""

import importlib.util

import pytest

from parti_jax.planning import topology


@pytest.fixture(scope='session')
def tpu_devices():
  """Returns the devices of four v5e chips."""
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu is not installed (pip install "parti_jax[tpu]"): no TPU to compile for')
  return topology.parse('v5e:2x2').devices()

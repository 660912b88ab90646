"""Settings that must stand before JAX and TensorFlow are imported, and a clean gin."""

import os
import tempfile

import gin
import pytest

_DEVICES = '--xla_force_host_platform_device_count=8'

os.environ['JAX_PLATFORMS'] = 'cpu'
if _DEVICES.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Tests leave nothing in the user's cache folder.
os.environ.setdefault('PARTI_JAX_CACHE', 'off')
# What one test compiles the next ones, and the processes that they start, find compiled.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix='parti_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _compiled.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')


@pytest.fixture(autouse=True)
def clean_gin():
  """Gives every test an empty gin configuration."""
  gin.clear_config()
  yield
  gin.clear_config()

"""Settings that must stand before JAX and TensorFlow are imported."""

import os

_DEVICES = '--xla_force_host_platform_device_count=8'

os.environ['JAX_PLATFORMS'] = 'cpu'
if _DEVICES not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_DEVICES}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# Tests leave nothing in the user's cache folder.
os.environ.setdefault('PARTI_JAX_CACHE', 'off')

"""Settings that must stand before JAX and TensorFlow are imported, and a clean gin."""

import dataclasses
import gc
import importlib.util
import os
import pathlib
import socket
import sys
import tempfile

import gin
import pytest

# Tests everywhere import the modules of this folder.
sys.path.append(str(pathlib.Path(__file__).parent))

import compiled_programs  # noqa: E402
import xla_flags  # noqa: E402

os.environ['JAX_PLATFORMS'] = 'cpu'
for _flag in xla_flags.of(devices=8):
  if _flag.split('=')[0] not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_flag}'.strip()
os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
# gcsfs reads this when it is imported, which may be before a test starts the emulator: without it,
# it would ask Google over gRPC what kind a bucket is of, and wait forever where there is no network.
os.environ['GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT'] = 'false'
# Tests leave nothing in the user's cache folder.
os.environ.setdefault('PARTI_JAX_CACHE', 'off')
# What one test compiles the next ones, and the processes that they start, find compiled.
if 'JAX_COMPILATION_CACHE_DIR' not in os.environ:
  _compiled = tempfile.TemporaryDirectory(prefix='parti_jax_tests_')
  os.environ['JAX_COMPILATION_CACHE_DIR'] = _compiled.name
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.3')

# Tracing makes many objects that live on. Python's own threshold, 700, looks through them too often.
gc.set_threshold(20_000, 20, 20)
# The memory that a process may take for the programs of earlier files before they are dropped.
_ROOM = 5 * 2**28

import runtime_types  # noqa: E402

runtime_types.install()


def pytest_collection_finish():
  """Has garbage collections pass over what was imported and collected, which stays to the end.

  Looking through its 800,000 objects after each file takes as long as a dozen small tests.
  """
  global _most_bytes
  gc.collect()
  gc.freeze()
  # All files together import TensorFlow and much else: more than 1 GiB.
  _most_bytes = min(compiled_programs.resident_bytes(), 2**31) + _ROOM


@pytest.fixture(autouse=True)
def clean_gin():
  """Gives every test an empty gin configuration."""
  gin.clear_config()
  yield
  gin.clear_config()


@pytest.fixture(autouse=True, scope='module')
def few_programs():
  """Frees what a file's tests have compiled, as far as the next files don't need it.

  The programs of single operations are kept as long as there is room. Each file of training tests
  would otherwise compile hundreds of them again.
  """
  yield
  jax = sys.modules.get('jax')
  if jax:
    compiled_programs.drop_lowered()
  gc.collect()
  compiled_programs.return_freed_memory()
  if jax and compiled_programs.resident_bytes() > _most_bytes:
    jax.clear_caches()
    gc.collect()
    compiled_programs.return_freed_memory()


@pytest.fixture(autouse=True, scope='module')
def arrays_saved_whole():
  """Has Orbax save an array that all devices hold from one of them.

  By default each device saves a slice, and XLA compiles every slice of every shape for each device,
  which takes longer than the rest of saving. Processes that tests start keep the default.
  """
  if ocp := sys.modules.get('orbax.checkpoint'):
    import jax

    handler = ocp.type_handlers.get_type_handler(jax.Array)
    assert handler._use_replica_parallel in (True, False)
    handler._use_replica_parallel = False


@pytest.fixture(autouse=True)
def no_store_retries():
  """Forgets the requests to stores that other tests repeated."""
  from parti_jax.core import store_retries

  store_retries.begin()


@pytest.fixture(autouse=True)
def few_ahead(monkeypatch):
  """Prepares at most 8 examples ahead of their use, or at once; by default that is 256.

  Tests use a few examples of tiny splits, where finding the next one of the order takes longest.
  """
  # Most other modules of tests don't import it.
  if share := sys.modules.get('parti_jax.data.share'):
    divided = share.Settings.divided

    def less(self, shares):
      found = divided(self, shares)
      return dataclasses.replace(found, prefetch=min(found.prefetch, 8))

    monkeypatch.setattr(share.Settings, 'divided', less)
    monkeypatch.setattr(share, '_OTHERS_AT_ONCE', 8)


@pytest.fixture(scope='session')
def s3_bucket():
  """URL of a bucket on an S3 server on the loopback interface, with the environment set for it."""
  pytest.importorskip('s3fs', reason='s3fs is not installed')
  server = pytest.importorskip('moto.server', reason='moto[server] is not installed')
  server = server.ThreadedMotoServer(ip_address='127.0.0.1', port=0, verbose=False)
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('AWS_ENDPOINT_URL', 'http://{}:{}'.format(*server.get_host_and_port()))
    patch.setenv('AWS_ACCESS_KEY_ID', 'test')
    patch.setenv('AWS_SECRET_ACCESS_KEY', 'test')
    patch.setenv('AWS_DEFAULT_REGION', 'us-east-1')
    import fsspec

    fsspec.filesystem('s3').mkdir('bucket')
    yield 's3://bucket'
  server.stop()


@pytest.fixture(scope='session')
def gs_bucket():
  """URL of a bucket on a server of Google Cloud Storage's interface, likewise."""
  # Not imported here: how it behaves is settled when it is.
  if importlib.util.find_spec('gcsfs') is None:
    pytest.skip('gcsfs is not installed')
  emulator = pytest.importorskip(
    'gcp_storage_emulator.server', reason='gcp-storage-emulator is not installed'
  )
  import generations

  generations.install()
  with socket.socket() as unused:
    unused.bind(('127.0.0.1', 0))
    port = unused.getsockname()[1]
  server = emulator.create_server('127.0.0.1', port, in_memory=True, default_bucket='bucket')
  server.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('STORAGE_EMULATOR_HOST', f'http://127.0.0.1:{port}')
    yield 'gs://bucket'
  server.stop()


@pytest.fixture(params=['s3', 'gs'])
def bad_store(request, monkeypatch, tmp_path):
  """A `MisbehavingStore` before each of these servers, with a `folder` in it; no fault at first."""
  import fsspec
  import misbehaving_store

  from parti_jax.core import store_retries

  bucket = request.getfixturevalue(f'{request.param}_bucket')
  variable = {'s3': 'AWS_ENDPOINT_URL', 'gs': 'STORAGE_EMULATOR_HOST'}[request.param]
  with misbehaving_store.MisbehavingStore(os.environ[variable], lambda *_: None) as store:
    monkeypatch.setenv(variable, store.url)
    if request.param == 'gs':
      monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', store.url)
    monkeypatch.setattr(store_retries, '_FIRST_DELAY', 0.01)
    monkeypatch.setattr(store_retries, '_LONGEST_DELAY', 0.05)
    kind = lambda: fsspec.get_filesystem_class(request.param)
    kind().clear_instance_cache()
    store.folder = f'{bucket}/{tmp_path.name}'
    yield store
    kind().clear_instance_cache()

"""The folder of compiled programs: its path, and that it never fails a run."""

import pathlib

import jax
import jax.experimental.compilation_cache.compilation_cache
import jax.numpy as jnp
import pytest

from parti_jax.core import compilation_cache

_OPTIONS = (
  'jax_compilation_cache_dir',
  'jax_persistent_cache_min_compile_time_secs',
  'jax_persistent_cache_min_entry_size_bytes',
  'jax_enable_compilation_cache',
)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
  """Starts without a cache and restores JAX's settings afterwards."""
  saved = {option: getattr(jax.config, option) for option in _OPTIONS}
  jax.config.update('jax_compilation_cache_dir', None)
  jax.config.update('jax_enable_compilation_cache', True)
  jax.experimental.compilation_cache.compilation_cache.reset_cache()
  monkeypatch.delenv('PARTI_JAX_CACHE', raising=False)
  monkeypatch.setattr(jax, 'device_count', lambda: 1)  # The tests may emulate several.
  yield
  for option, value in saved.items():
    jax.config.update(option, value)
  jax.experimental.compilation_cache.compilation_cache.reset_cache()


def test_folder_follows_the_environment(monkeypatch):
  monkeypatch.setenv('HOME', '/home/someone')
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  assert compilation_cache.folder() == pathlib.Path('/home/someone/.cache/parti_jax/xla')
  monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
  assert compilation_cache.folder() == pathlib.Path('/caches/parti_jax/xla')
  monkeypatch.setenv('PARTI_JAX_CACHE', '~/elsewhere')
  assert compilation_cache.folder() == pathlib.Path('/home/someone/elsewhere')


@pytest.mark.parametrize('value', ['', 'off', '0', 'None'])
def test_switched_off(value, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', value)
  assert compilation_cache.enable() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_keeps_even_small_programs(tmp_path, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', str(tmp_path / 'new' / 'folder'))
  assert compilation_cache.enable() == tmp_path / 'new' / 'folder'
  jax.jit(lambda x: jnp.sin(x) * 3.5)(jnp.ones(7)).block_until_ready()
  assert list((tmp_path / 'new' / 'folder').glob('*-cache'))


def test_programs_for_several_cpu_devices_are_not_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', str(tmp_path / 'ours'))
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  assert compilation_cache.enable() is None
  # A cache configured in JAX isn't used either.
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'theirs'))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  assert compilation_cache.enable() is None
  jax.jit(lambda x: jnp.cos(x) * 4.5)(jnp.ones(7)).block_until_ready()
  assert not list(tmp_path.iterdir())


def test_programs_for_several_accelerators_are_kept(tmp_path, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', str(tmp_path))
  monkeypatch.setattr(jax, 'device_count', lambda: 8)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
  assert compilation_cache.enable() == tmp_path and jax.config.jax_enable_compilation_cache


def test_a_folder_that_cannot_be_written_does_not_fail(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  monkeypatch.setenv('PARTI_JAX_CACHE', str(tmp_path / 'file' / 'below'))
  assert compilation_cache.enable() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_jaxs_own_choice_stands(tmp_path, monkeypatch):
  monkeypatch.setenv('PARTI_JAX_CACHE', str(tmp_path / 'ours'))
  jax.config.update('jax_compilation_cache_dir', str(tmp_path / 'theirs'))
  assert compilation_cache.enable() == tmp_path / 'theirs'
  assert not (tmp_path / 'ours').exists()

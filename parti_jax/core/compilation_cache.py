"""Keeps XLA's compiled programs between runs, in the user's cache folder.

Programs for several CPU devices are not cached. XLA runs the collectives of such a program in one
order on all devices. When it reads the program from the cache, it loses that order between
collectives inside and outside of loops (jaxlib 0.10.2): devices wait for each other until XLA
aborts.
"""

import os
import pathlib
import tempfile

# Values of PARTI_JAX_CACHE that switch the cache off.
_OFF = ('', '0', 'off', 'none')


def folder() -> pathlib.Path | None:
  """Returns the folder for compiled programs; None when the cache is switched off.

  $PARTI_JAX_CACHE names the folder, or switches the cache off if it is empty, `0`, `off` or
  `none`. By default the folder is `parti_jax/xla` in $XDG_CACHE_HOME or ~/.cache.
  """
  chosen = os.environ.get('PARTI_JAX_CACHE')
  if chosen is not None:
    return None if chosen.strip().lower() in _OFF else pathlib.Path(chosen).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'parti_jax' / 'xla'


def enable() -> pathlib.Path | None:
  """Enables JAX's persistent compilation cache, if its folder is writable.

  Call it before the first compilation, and after JAX has connected to other processes. A cache
  configured in JAX itself ($JAX_COMPILATION_CACHE_DIR) is kept. With several CPU devices no cache
  is used.

  Returns:
    The folder in use, or None. Without a cache, a run only starts more slowly.
  """
  import jax

  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)
    return None
  known = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if known:
    return pathlib.Path(known)
  try:
    path = folder()
    if path is None:
      return None
    path.mkdir(parents=True, exist_ok=True)
    # os.access is not enough: a folder can look writable on a read-only or full file system.
    with tempfile.TemporaryFile(dir=path):
      pass
  except (OSError, RuntimeError):  # RuntimeError: the home folder is unknown.
    return None
  jax.config.update('jax_compilation_cache_dir', str(path))
  # The defaults keep only programs that took a second to compile; a sampling run has many
  # smaller ones.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return path

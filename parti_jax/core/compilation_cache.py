"""Keeps XLA's compiled programs between runs, in the user's cache folder.

Programs for several CPU devices are not kept. XLA runs the collectives of such a program in one
order on all devices, and loses that order for those within loops and outside of them when it reads
the program from the cache (jaxlib 0.10.2): devices then wait for each other until XLA aborts.
"""

import os
import pathlib
import tempfile

# Values of PARTI_JAX_CACHE that switch the cache off.
_OFF = ('', '0', 'off', 'none')


def folder() -> pathlib.Path | None:
  """Returns the folder for compiled programs; None when the cache is switched off.

  $PARTI_JAX_CACHE names the folder, or switches the cache off when it is empty, `0`, `off` or
  `none`. Without it the folder is `parti_jax/xla` in $XDG_CACHE_HOME or ~/.cache.
  """
  chosen = os.environ.get('PARTI_JAX_CACHE')
  if chosen is not None:
    return None if chosen.strip().lower() in _OFF else pathlib.Path(chosen).expanduser()
  base = os.environ.get('XDG_CACHE_HOME') or '~/.cache'
  return pathlib.Path(base).expanduser() / 'parti_jax' / 'xla'


def enable() -> pathlib.Path | None:
  """Switches on JAX's persistent compilation cache, if its folder can be written to.

  Call it before the first compilation, and after JAX has met other processes. A cache that JAX
  itself was told to use ($JAX_COMPILATION_CACHE_DIR) is left as it is, but on several CPU devices
  no cache is used.

  Returns:
    The folder in use, or None: a run without a cache is slower to start and otherwise the same.
  """
  import jax

  if jax.default_backend() == 'cpu' and jax.device_count() > 1:
    jax.config.update('jax_enable_compilation_cache', False)
    return None
  if jax.config.jax_compilation_cache_dir:
    return pathlib.Path(jax.config.jax_compilation_cache_dir)
  try:
    path = folder()
    if path is None:
      return None
    path.mkdir(parents=True, exist_ok=True)
    # os.access is not enough: a folder can look writable on a read-only or full file system.
    with tempfile.TemporaryFile(dir=path):
      pass
  except (OSError, RuntimeError):  # RuntimeError: there is no home folder.
    return None
  jax.config.update('jax_compilation_cache_dir', str(path))
  # The defaults keep only programs that took a second to compile; a sampling run has many
  # smaller ones.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return path

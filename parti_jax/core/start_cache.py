"""Keeps what each start would otherwise compute again, next to XLA's compiled programs.

Each entry is a file whose name is a digest of everything that its content depends on: versions,
the package's sources, JAX's settings, and what the caller adds. An entry that is missing, damaged or
not the user's own counts as missing, so the cache affects nothing but the time of a start.

The digest knows this package's sources, not code that changes the package while it runs. So only our
commands turn the cache on, and only without modules of the user's own. Entries that have not been
used for longest are removed once the cache grows too large.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
import stat
import sys
import tempfile
import time
from typing import Any

import parti_jax
from parti_jax.core import compilation_cache
from parti_jax.core import user_modules

_FOLDER = 'starts'
_DIGEST_BYTES = 32
# Maximum size of an entry, and of all entries together, in bytes.
_LARGEST = 1 << 26
_MOST_BYTES = 1 << 28
# The subpackages whose sources determine what is computed for a loaded model.
_SOURCES = ('core', 'exported_model', 'models', 'partitioning', 'sampling')
# Permission to write, of the group and of others.
_WRITABLE = stat.S_IWGRP | stat.S_IWOTH
# Sources that changed later may differ from those that this process has imported.
_IMPORTED = time.time() - 10.0

_folder: pathlib.Path | None = None


def enable() -> None:
  """Enables the compilation cache and, for a command, this one; call it like the former's `enable`."""
  folder = compilation_cache.enable()
  use(None if user_modules.loaded() else folder)


def use(cache: pathlib.Path | None) -> None:
  """Turns the cache on or off.

  Args:
    cache: the folder of compiled programs, a result of `compilation_cache.enable`, in which the
      entries have a folder of their own; None turns the cache off.
  """
  global _folder
  # Whose files they are is only known on POSIX.
  _folder = cache / _FOLDER if cache is not None and hasattr(os, 'getuid') else None


def key(*parts: Any) -> str | None:
  """Returns the name of an entry; None if the cache is not in use.

  Args:
    *parts: what the entry depends on besides this package and JAX; their `repr` must tell them
      apart.
  """
  if _folder is None:
    return None
  environment = _environment()
  if environment is None:
    return None
  return hashlib.sha256(repr((environment, _settings(), parts)).encode()).hexdigest()


def read(name: str) -> bytes | None:
  """Returns the content of an entry; None if there is none that can be trusted.

  Args:
    name: a result of `key`.
  """
  folder = _folder
  if folder is None or not _is_own(folder):
    return None
  try:
    with (folder / name).open('rb') as file:
      found = os.fstat(file.fileno())
      if not _only_user_writes(found) or found.st_size > _DIGEST_BYTES + _LARGEST:
        return None
      digest, content = file.read(_DIGEST_BYTES), file.read()
  except OSError:
    return None
  if hashlib.sha256(content).digest() != digest:
    return None
  with contextlib.suppress(OSError):
    os.utime(folder / name)  # It has been used just now.
  return content


def write(name: str, content: bytes) -> None:
  """Writes an entry atomically. If that fails, there is none, and the next start takes longer.

  Args:
    name: a result of `key`.
    content: its content.
  """
  folder = _folder
  if folder is None or len(content) > _LARGEST:
    return
  with contextlib.suppress(OSError):
    folder.mkdir(mode=0o700, exist_ok=True)
    if not _is_own(folder):
      return
    handle, temporary = tempfile.mkstemp(dir=folder)
    try:
      with open(handle, 'wb') as file:
        file.write(hashlib.sha256(content).digest() + content)
      os.replace(temporary, folder / name)
    except BaseException:
      os.unlink(temporary)
      raise
    _remove_oldest(folder)


def is_package_code(value: Any) -> bool:
  """Returns whether a config, and the configs in it, are of classes that this package defines.

  What other classes mean is not in the digest of our sources, and their `repr` may not tell.
  """
  if isinstance(value, (tuple, list)):
    return all(map(is_package_code, value))
  if not dataclasses.is_dataclass(value):
    return value is None or type(value) in (bool, int, float, str)
  if not type(value).__module__.startswith(f'{parti_jax.__name__}.'):
    return False
  return all(is_package_code(getattr(value, field.name)) for field in dataclasses.fields(value))


def _remove_oldest(folder: pathlib.Path) -> None:
  """Removes the entries that have not been used for longest, beyond the size of all together."""
  files = []
  for path in folder.iterdir():
    with contextlib.suppress(OSError):  # Another process has just removed it.
      found = path.stat()
      files.append((found.st_mtime, found.st_size, path))
  total = 0
  for _, size, path in sorted(files, reverse=True):
    total += size
    if total > _MOST_BYTES:
      path.unlink(missing_ok=True)


def _is_own(folder: pathlib.Path) -> bool:
  try:
    found = os.lstat(folder)
  except OSError:
    return False
  return stat.S_ISDIR(found.st_mode) and _only_user_writes(found)


def _only_user_writes(found: os.stat_result) -> bool:
  return found.st_uid == os.getuid() and not found.st_mode & _WRITABLE


@functools.cache
def _environment() -> str | None:
  """Returns the versions and the digest of the sources; None if the sources are unknown."""
  import flax
  import jax
  import numpy as np

  package = pathlib.Path(parti_jax.__file__).parent
  digest = hashlib.sha256()
  try:
    for subpackage in _SOURCES:
      paths = sorted((package / subpackage).rglob('*.py'))
      if not paths:  # Such as in an archive, or without sources.
        return None
      for path in paths:
        if path.stat().st_mtime > _IMPORTED:
          return None
        content = path.read_bytes()
        digest.update(f'{path.relative_to(package)} {len(content)} '.encode() + content)
  except OSError:
    return None
  versions = (sys.version, np.__version__, jax.__version__, jax.lib.__version__, flax.__version__)
  return repr((parti_jax.__version__, versions, digest.hexdigest()))


def _settings() -> str:
  """Returns JAX's global settings, and where it computes."""
  import jax

  device = jax.local_devices()[0]
  return repr(
    (
      sorted(jax.config.values.items(), key=lambda item: item[0]),
      os.environ.get('XLA_FLAGS'),
      device.platform,
      device.device_kind,
      jax.device_count(),
    )
  )

"""Describes where a process runs: host, versions, devices, git revision, command line."""

from __future__ import annotations

import importlib.metadata
import os
import pathlib
import platform
import re
import shlex
import socket
import subprocess
import sys
from typing import Any

import parti_jax

_PACKAGES = (
  'jax',
  'jaxlib',
  'libtpu',
  'jax-cuda12-plugin',
  'flax',
  'optax',
  'orbax-checkpoint',
  'numpy',
  'tensorflow',
  'seqio',
)
# Any other variable may be secret.
_VARIABLES = re.compile('XLA_FLAGS|LIBTPU_INIT_ARGS|JAX_.*')
_PASSWORD = re.compile(r'(://)[^/@\s]+@')


def describe() -> dict[str, Any]:
  """Describes this process for a journal.

  Returns:
    A JSON-compatible dict: host; pid; processes, their number; devices, {'kind', 'count',
    'platform'} of all of them; versions, {package: version} of those installed; git, the result
    of `git_revision`; command, the command line without passwords in its URLs; environment, the
    variables that JAX and XLA read.
  """
  import jax

  device = jax.devices()[0]
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'processes': jax.process_count(),
    'devices': {
      'kind': device.device_kind,
      'count': jax.device_count(),
      'platform': device.platform,
    },
    'versions': versions(),
    'git': git_revision(),
    'command': without_passwords(shlex.join(sys.argv)),
    'environment': {
      name: value for name, value in sorted(os.environ.items()) if _VARIABLES.fullmatch(name)
    },
  }


def versions() -> dict[str, str]:
  """Returns versions of this package, Python and the installed libraries that affect results."""
  found = {'parti_jax': parti_jax.__version__, 'python': platform.python_version()}
  for package in _PACKAGES:
    try:
      found[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      pass
  return found


def git_revision() -> dict[str, Any] | None:
  """Returns the commit that this package runs from.

  Returns:
    {'revision': hash of the commit, 'uncommitted': whether tracked files differ from it}; None
    if the package isn't at the top of a checkout or git fails.
  """
  top = pathlib.Path(parti_jax.__file__).resolve().parents[1]
  if not (top / '.git').exists():
    return None
  revision = _git(top, 'rev-parse', 'HEAD')
  changes = _git(top, 'status', '--porcelain', '--untracked-files=no')
  if revision is None or changes is None:
    return None
  return {'revision': revision, 'uncommitted': bool(changes)}


def without_passwords(text: str) -> str:
  """Returns `text` without user names and passwords in its URLs."""
  return _PASSWORD.sub(r'\1***@', text)


def _git(top: pathlib.Path, *arguments: str) -> str | None:
  try:
    return subprocess.run(
      ['git', '--no-optional-locks', '-C', str(top), *arguments],
      check=True,
      timeout=30,
      capture_output=True,
      text=True,
    ).stdout.strip()
  except (OSError, subprocess.SubprocessError):
    return None

"""Turns errors of writing a run's folder, such as a full disk, into one helpful line."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator

import orbax.checkpoint as ocp

from parti_jax.checkpoints import manifest
from parti_jax.core import errors
from parti_jax.core import storage
from parti_jax.core import store_errors

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
# Advice for errors of writing, by errno.
_ADVICE = {
  errno.ENOSPC: 'make room there',
  errno.EDQUOT: 'make room there, or ask for a larger quota',
  errno.EFBIG: 'raise the file size limit (ulimit -f)',
  errno.EROFS: 'make the folder writable, or choose another --model_dir',
  errno.EACCES: 'make the folder writable, or choose another --model_dir',
  errno.EPERM: 'make the folder writable, or choose another --model_dir',
  errno.EIO: 'check the disk',
}


@contextlib.contextmanager
def reported(model_dir, checkpoint_bytes: int | None = None) -> Iterator[None]:
  """Turns errors of writing in the body, or in the background, into one line that says what to do.

  Args:
    model_dir: the run's folder.
    checkpoint_bytes: approximate size of a checkpoint; None for the size of the newest one.

  Raises:
    UserError: instead of such an error; names the folder, its free space and the step to resume
      from.
  """
  # Orbax logs failures in the background with the whole call chain.
  logger, quiet = logging.getLogger('absl'), _Quiet()
  logger.addFilter(quiet)
  try:
    yield
  except errors.UserError:
    raise
  except Exception as error:
    code = _code(error)
    if storage.is_url(model_dir) and (failure := store_errors.failure(error)):
      raise errors.UserError(
        f'{model_dir}: {failure}; the run has stopped; start again when the '
        'store responds: it resumes from its last whole checkpoint'
      ) from error
    if code is None or not _is_of(error, model_dir, code):
      raise
    raise errors.UserError(_line(model_dir, code, checkpoint_bytes)) from error
  finally:
    logger.removeFilter(quiet)


def check_room(model_dir, checkpoint_bytes: int) -> None:
  """Raises UserError if a run's disk has too little free space for one checkpoint.

  Args:
    model_dir: the run's folder, which need not exist yet; URLs aren't checked.
    checkpoint_bytes: approximate size of a checkpoint.
  """
  if storage.is_url(model_dir):
    return
  folder = pathlib.Path(model_dir).absolute()
  while not folder.exists():
    folder = folder.parent
  free = shutil.disk_usage(folder).free
  if free < checkpoint_bytes:
    raise errors.UserError(
      f'{model_dir}: a checkpoint takes about {_megabytes(checkpoint_bytes)} and '
      f'{_megabytes(free)} are free; make room there, or choose another --model_dir'
    )


class _Quiet(logging.Filter):
  """Drops log entries about errors that are reported in one line instead."""

  def filter(self, record: logging.LogRecord) -> bool:
    error = record.exc_info and record.exc_info[1]
    return not (error and (_code(error) or store_errors.failure(error)))


def _line(model_dir, code: int, checkpoint_bytes: int | None) -> str:
  directory = storage.as_epath(model_dir) / 'checkpoints'
  with contextlib.suppress(OSError):
    steps = ocp.utils.checkpoint_steps(directory)
    if steps and checkpoint_bytes is None:
      checkpoint_bytes = manifest.size(directory / str(max(steps)))
    room = ''
    if code in _NO_ROOM and '://' not in str(model_dir):
      room = f'; {_megabytes(shutil.disk_usage(model_dir).free)} are free'
      if checkpoint_bytes:
        room += f' and a checkpoint takes about {_megabytes(checkpoint_bytes)}'
    where = (
      f'it resumes from its last whole checkpoint, step {max(steps)}'
      if steps
      else 'it starts from the beginning, since it has no checkpoint yet'
    )
    return (
      f'{model_dir}: {os.strerror(code).lower()}: the run has stopped{room}; '
      f'{_ADVICE[code]} and start again: {where}'
    )
  return f'{model_dir}: {os.strerror(code).lower()}: the run has stopped; {_ADVICE[code]}'


def _chain(error: BaseException | None) -> Iterator[BaseException]:
  """Yields an error and its causes; an error that is raised twice may be its own cause."""
  seen = []
  while error is not None and error not in seen:
    seen.append(error)
    yield error
    error = error.__cause__ or error.__context__


def _code(error: BaseException) -> int | None:
  """Returns the errno of an error of writing among an error's causes; None without one."""
  for link in _chain(error):
    if isinstance(link, OSError):
      found = link.errno
    # TensorStore states the number, TensorFlow the text.
    elif stated := re.search(r"os_error_code='(\d+)'", str(link)):
      found = int(stated.group(1))
    else:
      found = next((code for code in _ADVICE if os.strerror(code) in str(link)), None)
    if found in _ADVICE:
      return found
  return None


def _is_of(error: BaseException, model_dir, code: int) -> bool:
  """Returns whether an error is about a file in the run's folder, or a full disk without a name."""
  named = [
    str(link.filename)
    for link in _chain(error)
    if isinstance(link, OSError) and link.filename is not None
  ]
  if any(str(model_dir) in text for text in [*named, *map(str, _chain(error))]):
    return True
  return not named and code in (*_NO_ROOM, errno.EFBIG)


def _megabytes(count: int) -> str:
  return f'{count / 1e6:.1f} MB'

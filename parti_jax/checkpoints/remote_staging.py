"""Stages checkpoints in a local folder, for stores such as s3:// that Orbax can't write to.

Orbax, with TensorStore, writes to disks and to gs://. For any other URL it gets a temporary folder
on a disk (set TMPDIR to choose where), from which each whole checkpoint is uploaded in the
background. The manifest is uploaded last: a checkpoint in the store counts only with it. Reading
downloads the checkpoint to such a folder.
"""

from __future__ import annotations

import atexit
import concurrent.futures
import shutil
import tempfile
from collections.abc import Sequence

import jax
from etils import epath

from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import verification
from parti_jax.core import errors
from parti_jax.core import storage

_THREADS = 8


def is_needed(model_dir) -> bool:
  """Returns whether Orbax can't access a run's folder itself."""
  return storage.is_url(model_dir) and not str(model_dir).startswith('gs://')


class Staging:
  """The checkpoints of a run in a store, with a local copy of the newest whole one.

  Attributes:
    directory: the local folder, removed by `close` or at the end of the process. It has the newest
      whole checkpoint and any newer, damaged ones.

  Args:
    model_dir: the run's folder, a URL.
    keep: number of checkpoints to keep in the store.

  Raises:
    UserError: if the store can't be read, or if the run has several processes.
  """

  def __init__(self, model_dir, keep: int = 1):
    if jax.process_count() > 1:
      raise errors.UserError(
        f"{model_dir}: a run of several processes can't keep its checkpoints there; give a "
        'gs:// URL or a folder that all of them see, such as the bucket mounted with '
        'mountpoint-s3 or gcsfuse'
      )
    self._url, self._keep = storage.join(model_dir, 'checkpoints'), keep
    top = tempfile.mkdtemp(prefix='parti_jax_checkpoints_')
    self._remove = lambda: shutil.rmtree(top, ignore_errors=True)
    atexit.register(self._remove)
    self.directory = epath.Path(top) / 'checkpoints'
    self.directory.mkdir()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'upload')
    self._uploading: concurrent.futures.Future | None = None
    for step in reversed(steps(model_dir)):
      if self._download(step) is None:
        break

  def move_aside(self, damaged: Sequence) -> None:
    """Renames damaged checkpoints in the store, like `verification.move_aside` on a disk."""
    existing = storage.names(self._url)
    for bad in damaged:
      target = verification.free_name(bad.step, existing.__contains__)
      storage.move_folder(self._step(bad.step), storage.join(self._url, target))

  def upload(self, step: int) -> None:
    """Starts uploading a whole checkpoint; afterwards older ones in the store are removed."""
    self.wait()
    self._uploading = self._thread.submit(self._upload, step)

  def check(self) -> None:
    """Raises the error of a failed upload, without waiting for one that still runs."""
    if self._uploading is not None and self._uploading.done():
      self.wait()

  def wait(self) -> None:
    """Waits until the upload that was started is in the store.

    Raises:
      UserError: if the upload fails.
    """
    uploading, self._uploading = self._uploading, None
    if uploading is not None:
      uploading.result()

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints in the store."""
    return _steps(self._url)

  def close(self) -> None:
    """Waits for uploads and removes the local folder."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      self._remove()
      atexit.unregister(self._remove)

  def _step(self, step: int) -> str:
    return storage.join(self._url, str(step))

  def _download(self, step: int) -> str | None:
    """Downloads a checkpoint; returns its fault, or None if it is whole."""
    url, local = self._step(step), self.directory / str(step)
    names = storage.sizes(url)
    for name in names:
      (local / name).parent.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(lambda name: storage.download(f'{url}/{name}', local / name), names))
    return manifest.fault(local)

  def _upload(self, step: int) -> None:
    url, local = self._step(step), self.directory / str(step)
    # Removes the remains of an interrupted upload, or a checkpoint without a manifest.
    storage.remove_folder(url)
    names = [name for name in storage.sizes(local) if name != manifest.NAME]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(lambda name: storage.upload(local / name, f'{url}/{name}'), names))
    storage.upload(local / manifest.NAME, storage.join(url, manifest.NAME))
    kept = {*self.steps()[-self._keep :], *_numbers(storage.names(self.directory))}
    for old in _numbers(storage.names(self._url)):
      if old < step and old not in kept:
        # Without its manifest it no longer counts, even if the removal is interrupted.
        if storage.exists(manifest_of := storage.join(self._step(old), manifest.NAME)):
          storage.remove(manifest_of)
        storage.remove_folder(self._step(old))


def steps(model_dir) -> list[int]:
  """Returns the steps of the whole checkpoints in a store, the newest last.

  Args:
    model_dir: the run's folder, a URL.
  """
  return _steps(storage.join(model_dir, 'checkpoints'))


def _steps(url: str) -> list[int]:
  return [
    step
    for step in _numbers(storage.names(url))
    if storage.exists(storage.join(url, str(step), manifest.NAME))
  ]


def _numbers(names) -> list[int]:
  return sorted(int(name) for name in names if name.isdecimal())

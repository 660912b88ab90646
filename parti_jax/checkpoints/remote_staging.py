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
import sys
import tempfile
import threading
from collections.abc import Sequence

from etils import epath

from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import verification
from parti_jax.core import storage

_THREADS = 8
# Seconds between two looks at what the other processes have uploaded.
_POLL = 1.0
# Files of a checkpoint's arrays that every process writes with the same content.
_OF_ALL = ('_METADATA', '_sharding', '.zarray', 'commit_success.txt')


def is_needed(model_dir) -> bool:
  """Returns whether a run's folder is in a store that Orbax can't access."""
  return storage.is_url(model_dir) and not str(model_dir).startswith('gs://')


class Staging:
  """The checkpoints of a run in a store, with a local copy of the newest whole one.

  With several processes, each has a separate folder with a copy of the newest checkpoint, and
  uploads what it wrote itself. They learn from the store how far the others are: each puts a part
  of the manifest there once its files are, and the first makes one manifest of all parts.

  Attributes:
    directory: the local folder, removed by `close` or at the end of the process. It has the newest
      whole checkpoint and any newer, damaged ones.

  Args:
    model_dir: the run's folder, a URL.
    keep: how many checkpoints stay in the store.
    process: index of this process among those that use the store's checkpoints together.
    processes: how many they are; the same calls are made in all of them.
    start: a number of this start of the run that all of them share, and no earlier start has.

  Raises:
    UserError: if the store can't be read.
  """

  def __init__(
    self, model_dir, keep: int = 1, process: int = 0, processes: int = 1, start: int = 0
  ):
    self._url, self._keep = storage.join(model_dir, 'checkpoints'), keep
    self._process, self._processes = process, processes
    self._begun = f'uploading.{start}'
    top = tempfile.mkdtemp(prefix='parti_jax_checkpoints_')
    self._remove = lambda: shutil.rmtree(top, ignore_errors=True)
    atexit.register(self._remove)
    self.directory = epath.Path(top) / 'checkpoints'
    self.directory.mkdir()
    self._thread = concurrent.futures.ThreadPoolExecutor(1, 'upload')
    self._uploading: concurrent.futures.Future | None = None
    self._closing = threading.Event()
    for step in reversed(verification.of_the_first(steps(model_dir))):
      if verification.of_any(self._download(step)) is None:
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
    if sys.exc_info()[1] is not None:
      self._closing.set()  # The others may have failed too, and never finish what they upload.
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
    if not self._begin(url):
      return
    names = [name for name in storage.sizes(local) if self._is_own(name)]
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(lambda name: storage.upload(local / name, f'{url}/{name}'), names))
    if self._process:
      storage.write(f'{url}/{manifest.part_name(self._process)}', manifest.text_of(local, names))
      self._wait_for(url, [manifest.NAME])
    elif self._finish(url, local, names):
      self._tidy_up(step)

  def _begin(self, url: str) -> bool:
    """Waits until the folder in the store is empty; False if the run fails before."""
    if self._process:
      return self._wait_for(url, [self._begun])
    # Left by an interrupted upload, or by a checkpoint without a manifest.
    storage.remove_folder(url)
    if self._processes > 1:
      storage.write(f'{url}/{self._begun}', '')
    return True

  def _is_own(self, name: str) -> bool:
    """Whether this process is the one that uploads a file of a checkpoint."""
    if name.startswith(manifest.NAME):
      return False
    # All write the same metadata; pieces of arrays are each of one process.
    return self._process == 0 or (
      name.startswith('state/') and name.rpartition('/')[2] not in _OF_ALL
    )

  def _finish(self, url: str, local: epath.Path, names: Sequence[str]) -> bool:
    """Writes the manifest once all processes have uploaded theirs; says whether it did."""
    parts = [manifest.part_name(process) for process in range(1, self._processes)]
    if not self._wait_for(url, parts):
      return False
    texts = [storage.read(f'{url}/{part}', storage.MAX_JSON) for part in parts]
    storage.write(storage.join(url, manifest.NAME), manifest.text_of(local, names, texts))
    for name in parts + [self._begun] * bool(parts):
      storage.remove(f'{url}/{name}')
    return True

  def _wait_for(self, url: str, names: Sequence[str]) -> bool:
    """Waits until files are in a folder of the store, or the run fails; says whether they are."""
    while not set(names) <= set(storage.names(url) if names else ()):
      if self._closing.wait(_POLL):
        return False
    return True

  def _tidy_up(self, step: int) -> None:
    """Removes checkpoints of the store that are older than so many are kept."""
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

"""The output folder of prepared pictures: claimed by one run, and published only when complete."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import socket
import uuid
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import token_cache_info
from parti_jax.data.sources import prepared

_OWNER = 'owner.json'
REPORT = 'report.json'
_MAX_REPORT = 2**26


class Output:
  """A split in an output folder; picklable.

  During writing, `.SPLIT.unfinished` holds `owner.json`, which names the run, and a folder that
  only this run uses, so leftover processes of an earlier run can't interfere.

  Args:
    folder: the folder, a path or a URL.
    split: the split.
    staged: whether shards are first written to the unfinished folder.

  Raises:
    UserError: the split's name can't be part of a file name.
  """

  def __init__(self, folder: str, split: str, staged: bool):
    token_cache_info.check_split_name(split)
    self.folder, self.split = folder, split
    self._unfinished = storage.join(folder, f'.{token_cache_info.file_part(split)}.unfinished')
    self._staging = storage.join(self._unfinished, uuid.uuid4().hex)
    # A store shows only complete objects; on a disk, a killed run would leave a partial file.
    self.staged = staged or not storage.is_url(folder)

  def place(self, number: int) -> str:
    """Returns the path of a shard."""
    return storage.join(self.folder, token_cache_info.shard_name(self.split, number))

  def staging_place(self, number: int) -> str:
    """Returns the path that a shard is first written to."""
    if not self.staged:
      return self.place(number)
    return storage.join(self._staging, token_cache_info.shard_name('shard', number))

  def written(self) -> int:
    """Returns the number of shards written, staged or in place."""
    folders = (self.folder, self.split), (self._staging, 'shard')
    return sum(
      _is_shard(name, begin) for folder, begin in folders for name in storage.names(folder)
    )

  def claim(self, overwrite: bool) -> None:
    """Claims the folder for this run.

    Args:
      overwrite: whether to replace a finished split, or an unfinished one of another run.

    Raises:
      UserError: the folder has the split, is in use, has other content, or isn't writable.
    """
    if storage.exists(self.folder) and not storage.is_folder(self.folder):
      raise UserError(f'--output_dir={self.folder} is a file; choose a folder')
    splits = self._finished()
    shards = [name for name in storage.names(self.folder) if _is_shard(name, self.split)]
    if self.split in splits and not overwrite:
      raise UserError(
        f'--output_dir={self.folder} holds a finished split {self.split!r}; choose '
        'another folder or another --split, or replace it with --overwrite'
      )
    left = self._remove_leftovers(overwrite)
    if shards and not (left or overwrite):
      raise UserError(
        f'--output_dir={self.folder} holds {shards[0]}, which belongs to no finished '
        'split; choose another folder, or remove these shards with --overwrite'
      )
    try:
      storage.make_folder(self._unfinished)
      storage.create(storage.join(self._unfinished, _OWNER), json.dumps(_this_process()).encode())
      if self.split in splits:
        self._write_info({name: value for name, value in splits.items() if name != self.split})
      for name in shards:
        storage.remove(storage.join(self.folder, name))
    except FileExistsError as error:
      raise UserError(
        f'--output_dir={self.folder}: another run has just begun to prepare '
        f'{self.split!r} there; choose another folder'
      ) from error
    except OSError as error:
      raise UserError(
        f'--output_dir={self.folder} cannot be written: {error.strerror or error}'
      ) from error

  def release(self, finished: bool) -> None:
    """Removes the unfinished folder and, unless the split is finished, its shards."""
    for name in () if finished else storage.names(self.folder):
      if _is_shard(name, self.split):
        storage.remove(storage.join(self.folder, name))
    token_cache_info.remove_folder(self._unfinished)
    if not storage.is_url(self.folder):
      with contextlib.suppress(OSError):
        os.rmdir(self.folder)  # Only if nothing is in it.

  def publish(self, shards: Sequence[Mapping[str, Any]], report: Mapping[str, Any]) -> None:
    """Writes the report and, if there are examples, adds the split to `info.json`.

    Args:
      shards: 'examples', 'bytes' and 'digest' of each shard.
      report: report of the split, for JSON.
    """
    reports = self._read(REPORT, _MAX_REPORT).get('splits', {})
    storage.write(
      storage.join(self.folder, REPORT), _json({'splits': {**reports, self.split: report}})
    )
    info = token_cache_info.split_info(shards)
    if info['examples']:
      self._write_info({**self._finished(), self.split: info})

  def report(self) -> dict[str, Any]:
    """Returns the report that `publish` wrote.

    Raises:
      UserError: the report is missing.
    """
    try:
      return self._read(REPORT, _MAX_REPORT)['splits'][self.split]
    except LookupError as error:
      raise UserError(
        f'{self.folder} has no {REPORT} for {self.split!r}; the workers must have '
        'written elsewhere: use a URL or a folder on a shared disk'
      ) from error

  def _finished(self) -> dict[str, Any]:
    """Returns the finished splits of the folder."""
    if not storage.exists(storage.join(self.folder, 'info.json')):
      return {}
    return prepared.read_info(self.folder)['splits']

  def _write_info(self, splits: Mapping[str, Any]) -> None:
    storage.write(
      storage.join(self.folder, 'info.json'),
      _json({'kind': prepared.KIND, 'version': prepared.VERSION, 'splits': splits}),
    )

  def _remove_leftovers(self, overwrite: bool) -> bool:
    """Removes the leftovers of an earlier run; returns whether there were any.

    Raises:
      UserError: that run may still be active.
    """
    owner = self._read(storage.join(storage.name(self._unfinished), _OWNER), 2**16)
    if not owner:
      return False
    if not overwrite and not _has_ended(owner):
      raise UserError(
        f'--output_dir={self.folder}: process {owner.get("pid", "?")} on host '
        f'{owner.get("host", "?")} has prepared {self.split!r} there since '
        f'{owner.get("since", "?")}; if it has ended, replace what it left with --overwrite'
      )
    token_cache_info.remove_folder(self._unfinished)
    return True

  def _read(self, name: str, limit: int) -> dict[str, Any]:
    """Returns the content of a JSON file in the folder; {} without one."""
    path = storage.join(self.folder, name)
    try:
      found = storage.read_json(path, limit)
    except (FileNotFoundError, NotADirectoryError):
      return {}
    except ValueError:
      return {'damaged': path}
    return found if isinstance(found, dict) else {'damaged': path}


def _is_shard(name: str, split: str) -> bool:
  return name.endswith('.array_record') and token_cache_info.is_shard(name, split)


def _json(value: Any) -> str:
  return json.dumps(value, indent=2, ensure_ascii=False) + '\n'


def _this_process() -> dict[str, Any]:
  now = datetime.datetime.now(datetime.UTC)
  return {'host': socket.gethostname(), 'pid': os.getpid(), 'since': f'{now:%Y-%m-%d %H:%M:%S} UTC'}


def _has_ended(owner: Mapping[str, Any]) -> bool:
  """Returns whether a run's process was on this machine and has ended."""
  if owner.get('host') != socket.gethostname() or type(owner.get('pid')) is not int:
    return False
  try:
    os.kill(owner['pid'], 0)
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):
    return False
  return owner['pid'] == os.getpid()  # A stale file: this process has written nothing yet.

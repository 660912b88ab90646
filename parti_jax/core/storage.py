"""Files by path or by URL: a local path, gs://, s3://, or any other that fsspec knows.

fsspec's file systems read and write gs:// (gcsfs) and s3:// (s3fs), with credentials and endpoints
from the usual places: AWS_* and the files of `aws configure`, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS and gcloud's defaults, STORAGE_EMULATOR_HOST. Orbax reaches the same
file systems through etils.epath, which importing this module sees to.

Errors of all functions: FileNotFoundError, FileExistsError and IsADirectoryError as for local
files; UserError, which names the URL, for a store that can't be reached, is not there or lets one
not in, and for a package that is missing. Local files raise OSError as usual.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import glob as local_glob
import io
import json
import logging
import os
import pathlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import IO

from parti_jax.core import store_errors
from parti_jax.core.errors import UserError

# epath would hand URLs to TensorFlow where that is installed, which knows no s3:// and no endpoint
# other than Google's for gs://.
os.environ.setdefault('EPATH_USE_TF', '0')

# The most bytes of a file of trained weights for evaluation or a loss; VGG16's has 553 million.
MAX_WEIGHTS = 2**31
# The most bytes of a JSON file: configs and metadata have thousands of them.
MAX_JSON = 2**26
# How often an object is read anew that was replaced meanwhile, and a folder removed anew.
_READ_ANEW, _REMOVED_ANEW = 5, 5
# What epath hands to fsspec.
_EPATH_SCHEMES = ('gs', 's3', 'az', 'hf')
# Byte order marks; that of UTF-16 begins one of UTF-32.
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)


def is_url(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, such as gs://bucket/folder; file:// counts as a local path."""
  scheme, separator, _ = os.fspath(path).partition('://')
  return bool(separator) and scheme != 'file' and '/' not in scheme


def check_local(path: str | os.PathLike[str]) -> None:
  """Raises UserError for a URL where only local paths do; else a folder `s3:` would be made."""
  if is_url(path):
    raise UserError(
      f'{path}: only a local path does here; copy the folder, or mount the bucket as a folder'
    )


def join(path: str | os.PathLike[str], *names: str) -> str:
  """Returns a path, or URL, within a folder."""
  return os.path.join(os.fspath(path), *names)


def name(path: str | os.PathLike[str]) -> str:
  """Returns the last part of a path or URL."""
  return os.path.basename(os.fspath(path).rstrip('/'))


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str], mode: str = 'rb') -> Iterator[IO[bytes]]:
  """Opens a file to read it from its beginning to its end; to be used in `with`.

  Args:
    path: a path or URL.
    mode: 'rb', or 'rt' for text in UTF-8, or in UTF-16 or UTF-32 by its byte order mark.

  Yields:
    The open file.
  """
  if not is_url(path):
    with open(_local(path), 'rb') as file:
      yield file if mode == 'rb' else _as_text(file)
    return
  with _opened(path) as file:
    yield file if mode == 'rb' else _as_text(file)


def _opened(path: str | os.PathLike[str]) -> io.BufferedReader:
  from parti_jax.core import store_systems

  with store_errors.translated(path):
    system = _file_system(path)
  return io.BufferedReader(
    store_systems.Pieces(system, os.fspath(path), store_errors.translated), store_systems.PIECE
  )


def encoding_of(data: bytes) -> str:
  """Returns the encoding of a text by its byte order mark, which decoding takes off."""
  return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), 'utf-8-sig')


def _as_text(file: IO[bytes]) -> IO[str]:
  encoding = encoding_of(file.read(4))
  file.seek(0)
  return io.TextIOWrapper(file, encoding)


def exists(path: str | os.PathLike[str]) -> bool:
  """Whether there is a file or folder; a folder of a store is there if an object is in it."""
  if not is_url(path):
    return os.path.exists(_local(path))
  return _info(path) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Whether there is a folder; one of a store is there if an object is in it."""
  if not is_url(path):
    return os.path.isdir(_local(path))
  found = _info(path)
  return found is not None and found['type'] == 'directory'


def _info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """fsspec's description of what is at a URL; None if nothing is.

  fsspec's own `exists` and `isdir` take any error of a store for an object that is missing.
  """
  with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
    return _file_system(path).info(os.fspath(path))
  return None


def size(path: str | os.PathLike[str]) -> int:
  """Returns the bytes of a file."""
  if not is_url(path):
    return os.path.getsize(_local(path))
  with store_errors.translated(path):
    return _file_system(path).size(os.fspath(path))


def glob(pattern: str | os.PathLike[str]) -> list[str]:
  """Returns the paths, or URLs, that fit a pattern with *, ?, [] and **, sorted."""
  if not is_url(pattern):
    return sorted(local_glob.glob(_local(pattern), recursive=True))
  with store_errors.translated(pattern):
    system = _file_system(pattern)
    return sorted(system.unstrip_protocol(found) for found in system.glob(os.fspath(pattern)))


def names(folder: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the files and folders in a folder, sorted; none where there is none."""
  if not is_url(folder):
    try:
      return sorted(os.listdir(_local(folder)))
    except FileNotFoundError:
      return []
  with store_errors.translated(folder):
    try:
      return sorted(
        {name(found) for found in _file_system(folder).ls(os.fspath(folder), detail=False)}
      )
    except FileNotFoundError:
      return []


def sizes(folder: str | os.PathLike[str]) -> dict[str, int]:
  """Returns {path within the folder, with /: bytes} of all files in a folder and those within."""
  if not is_url(folder):
    top, found = pathlib.Path(_local(folder)), {}
    for path in top.rglob('*'):
      with contextlib.suppress(FileNotFoundError):  # Another process may be moving files.
        if path.is_file():
          found[path.relative_to(top).as_posix()] = path.stat().st_size
    return found
  with store_errors.translated(folder):
    system = _file_system(folder)
    top = system._strip_protocol(os.fspath(folder)).rstrip('/') + '/'
    return {
      path.removeprefix(top): details['size']
      for path, details in system.find(os.fspath(folder), detail=True).items()
    }


def sizes_of(files: Sequence[str]) -> list[int]:
  """Returns the bytes of each file, -1 for those that are not there; asks a store once a folder."""
  found, folders = [], {}
  for file in files:
    if not is_url(file):
      local = _local(file)
      found.append(os.path.getsize(local) if os.path.exists(local) else -1)
      continue
    folder, _, name = os.fspath(file).rpartition('/')
    if folder not in folders:
      folders[folder] = sizes(folder)
    found.append(folders[folder].get(name, -1))
  return found


def read(path: str | os.PathLike[str], limit: int) -> bytes:
  """Returns what is in a file.

  Args:
    path: a path or URL.
    limit: the most bytes that it may have, so that a file from elsewhere can't fill the memory.

  Raises:
    UserError: it is larger.
  """
  if not is_url(path):
    with open(_local(path), 'rb') as file:
      content = file.read(limit + 1)
    found = len(content) if len(content) <= limit else max(size(path), limit + 1)
  else:
    content = _read_url(path, limit)
    found = len(content) if len(content) <= limit else max(size(path), limit + 1)
  _check_bytes(path, found, limit)
  return content


def _read_url(path: str | os.PathLike[str], limit: int) -> bytes:
  """Reads an object, again if it was replaced meanwhile, as a run's lock is again and again."""
  from parti_jax.core import store_systems

  for attempt in range(_READ_ANEW + 1):
    try:
      with _opened(path) as file:
        return file.read(limit + 1)
    except store_systems.Changed:
      if attempt == _READ_ANEW:
        raise
  raise AssertionError


def check_size(path: str | os.PathLike[str], limit: int) -> None:
  """Raises UserError if a file has more bytes than one of its kind may have."""
  _check_bytes(path, size(path), limit)


def _check_bytes(path, found: int, limit: int) -> None:
  if found > limit:
    raise UserError(
      f'{path}: has {found:,} bytes, and {limit:,} are the most that a file of its '
      'kind may have; is it the right file?'
    )


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
  """Returns what is in a JSON file.

  Args:
    path: a path or URL.
    limit: the most bytes that it may have.

  Raises:
    ValueError: it is no JSON, has a name twice in one object, or is nested deeper than anything
      that is meant to be read.
    UserError: it is larger.
  """
  try:
    return json.loads(read(path, limit), object_pairs_hook=_object)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """A JSON object; of a name that is there twice, nobody knows which value is meant."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f'the name {twice[:80]!r} is there twice in one object')
  return found


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
  """Writes a file whole or not at all, in place of one that is there; makes its folder.

  Args:
    path: a path or URL.
    content: bytes, or a text that is written as UTF-8.
  """
  content = content.encode() if isinstance(content, str) else content
  if is_url(path):
    # Stores put an object in place when the last of its bytes has come.
    with store_errors.translated(path, writing=True):
      _file_system(path).pipe_file(os.fspath(path), content)
    return
  path = pathlib.Path(_local(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  # Processes of other hosts, or of other containers, may have the same number.
  unfinished = path.with_name(f'.{path.name}.{secrets.token_hex(4)}.unfinished')
  try:
    with open(unfinished, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    unfinished.replace(path)
  except BaseException:
    unfinished.unlink(missing_ok=True)
    raise


def create(path: str | os.PathLike[str], content: bytes) -> None:
  """Writes a file that is not there yet; of several that do so at once, one succeeds.

  Stores do this by a condition on the request: s3:// by If-None-Match, gs:// by ifGenerationMatch.
  One that ignores the condition replaces the object.

  Args:
    path: a path or URL.
    content: what no other process writes, since an object at a URL that has it already counts as
      created by this call: the answer to an attempt may be lost.

  Raises:
    FileExistsError: the file is there.
  """
  if not is_url(path):
    with open(_local(path), 'xb') as file:
      file.write(content)
    return
  try:
    with store_errors.translated(path, writing=True):
      try:
        _file_system(path).pipe_file(os.fspath(path), content, mode='create')
      except OSError as error:
        if 'ConditionalRequestConflict' not in str(error):  # Of S3, while another one creates it.
          raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from error
  except FileExistsError:
    # It is this process' own if only the answer to an earlier attempt was lost.
    if _read_if_there(path, len(content)) != content:
      raise


def _read_if_there(path: str | os.PathLike[str], limit: int) -> bytes | None:
  try:
    return read(path, limit)
  except (FileNotFoundError, UserError):
    return None


def check_can_write(name: str, path: str | os.PathLike[str]) -> None:
  """Raises UserError if a local file or folder can't be written; makes nothing.

  Args:
    name: what the message begins with.
    path: need not be there.
  """
  nearest = pathlib.Path(_local(path)).absolute()
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if nearest != pathlib.Path(_local(path)).absolute() and not nearest.is_dir():
    raise UserError(f'{name}: {nearest} is not a folder; choose another path')
  if not os.access(nearest, os.W_OK):
    raise UserError(
      f'{name}: {nearest} can not be written; make it writable, or choose another path'
    )


def make_folder(path: str | os.PathLike[str]) -> None:
  """Makes a folder and those around it, unless they are there; stores need none."""
  if not is_url(path):
    os.makedirs(_local(path), exist_ok=True)


def remove(path: str | os.PathLike[str]) -> None:
  """Removes a file; at a URL one that is not there is no error, as S3 has it."""
  if not is_url(path):
    os.remove(_local(path))
    return
  with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
    _file_system(path).rm_file(os.fspath(path))


def upload(file: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
  """Copies a local file of any size to a URL, where it appears whole or not at all."""
  with store_errors.translated(path, writing=True):
    _file_system(path).put_file(os.fspath(file), os.fspath(path))
  wanted, found = os.path.getsize(file), size(path)
  if found != wanted:
    raise UserError(f'{path}: the store has {found:,} bytes of it and {wanted:,} were written')


def download(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
  """Copies what is at a URL to a local file, whose folder must be there."""
  with open_file(path) as source, open(file, 'wb') as copy:
    shutil.copyfileobj(source, copy, 2**20)


def move(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Moves a file within its disk or store, in place of one that is there."""
  if not is_url(path):
    os.replace(_local(path), _local(target))
    return
  with store_errors.translated(path):
    _file_system(path).cp_file(os.fspath(path), os.fspath(target))
  remove(path)


def move_folder(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Renames a folder of a store: all is copied within the store, then removed."""
  # fsspec's own `mv` also asks for an object with the folder's name, which s3:// does not have.
  with store_errors.translated(path):
    for file in sizes(path):
      _file_system(path).cp_file(join(path, file), join(target, file))
  remove_folder(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
  """Removes a folder of a store with all that is in it; does nothing where there is none."""
  # s3fs passes over objects that the store could not remove.
  for _ in range(_REMOVED_ANEW):
    with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
      _file_system(path).rm(os.fspath(path), recursive=True)
    if not sizes(path):
      return
  raise UserError(f'{path}: the store does not remove all of it')


def as_epath(path: str | os.PathLike[str]):
  """Returns a path or URL as an etils.epath.Path, for libraries that take no other.

  Raises:
    UserError: the package that reads such URLs is not installed, or epath knows none.
  """
  from etils import epath

  if is_url(path):
    import fsspec

    scheme = os.fspath(path).partition('://')[0]
    if scheme not in _EPATH_SCHEMES:
      raise UserError(f'{path}: only paths and URLs of {", ".join(_EPATH_SCHEMES)} do here')
    with store_errors.translated(path):
      _configure(scheme)
      fsspec.get_filesystem_class(scheme)
  return epath.Path(_local(path))


def local_folder(url: str, wanted: list[str]) -> str:
  """Copies files of a folder, those of some names that are there, to a temporary local folder.

  Args:
    url: of the folder.
    wanted: names of files.

  Returns:
    The local folder; it is removed when the process ends.
  """
  folder = tempfile.mkdtemp(prefix='parti_jax_')
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  for file in set(wanted) & set(names(url)):
    download(join(url, file), os.path.join(folder, file))
  return folder


@contextlib.contextmanager
def local_copy(path: str | os.PathLike[str]) -> Iterator[str]:
  """Yields a local path of a file, for readers that take no other; within `with` alone."""
  if not is_url(path):
    yield _local(path)
    return
  with tempfile.TemporaryDirectory(prefix='parti_jax_') as folder:
    copy = os.path.join(folder, name(path))
    download(path, copy)
    yield copy


def _local(path: str | os.PathLike[str]) -> str:
  return os.fspath(path).removeprefix('file://')


def _file_system(path: str | os.PathLike[str]):
  """fsspec's file system of a URL; it keeps one for each kind."""
  import fsspec

  _configure(os.fspath(path).partition('://')[0])
  return fsspec.core.url_to_fs(os.fspath(path))[0]


def _configure(protocol: str) -> None:
  """Sets what fsspec's file systems need here and their user has not set."""
  import fsspec

  for scheme in ('s3', 'gcs'):
    # Other processes write too.
    fsspec.config.conf.setdefault(scheme, {}).setdefault('use_listings_cache', False)
  if 'STORAGE_EMULATOR_HOST' in os.environ:
    os.environ.setdefault('TENSORSTORE_GCS_HTTP_URL', os.environ['STORAGE_EMULATOR_HOST'])
    fsspec.config.conf['gcs'].setdefault('token', 'anon')
    # Else gcsfs asks over gRPC, which emulators do not speak, what kind each bucket is of.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  # It logs the errors that it raises, with all calls.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  from parti_jax.core import store_systems

  store_systems.register(protocol)

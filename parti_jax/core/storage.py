"""Files by path or by URL: local paths, gs://, s3:// and the other schemes of fsspec.

fsspec's file systems read and write gs:// (gcsfs) and s3:// (s3fs). They take credentials and
endpoints from the usual sources: AWS_* and the files of `aws configure`, AWS_ENDPOINT_URL,
GOOGLE_APPLICATION_CREDENTIALS and gcloud's defaults, STORAGE_EMULATOR_HOST. Importing this module
makes Orbax use the same file systems through etils.epath.

All functions raise FileNotFoundError, FileExistsError and IsADirectoryError as for local files.
They raise UserError, which names the URL, if a store can't be reached, doesn't exist or denies
access, and if a package is missing. Local files raise OSError as usual.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import glob as local_glob
import io
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any
from typing import IO

from parti_jax.core import store_errors
from parti_jax.core.errors import UserError

# By default epath passes URLs to TensorFlow if it is installed. TensorFlow doesn't support s3://,
# and for gs:// only Google's endpoint.
os.environ.setdefault('EPATH_USE_TF', '0')

# Maximum bytes of a file of trained weights for evaluation or a loss; VGG16's has 553 million.
MAX_WEIGHTS = 2**31
# Maximum bytes of a JSON file; configs and metadata have thousands.
MAX_JSON = 2**26
# How often to retry reading an object that was replaced meanwhile, and removing a folder.
_READ_RETRIES, _REMOVE_ATTEMPTS = 5, 5
# Schemes that epath passes to fsspec.
_EPATH_SCHEMES = ('gs', 's3', 'az', 'hf')
# Byte order marks; UTF-32 is first because its mark begins with that of UTF-16.
_MARKS = (
  (codecs.BOM_UTF32_LE, 'utf-32'),
  (codecs.BOM_UTF32_BE, 'utf-32'),
  (codecs.BOM_UTF16_LE, 'utf-16'),
  (codecs.BOM_UTF16_BE, 'utf-16'),
)


def is_url(path: str | os.PathLike[str]) -> bool:
  """Returns whether a path is a URL, such as gs://bucket/folder; file:// counts as local."""
  scheme, separator, _ = os.fspath(path).partition('://')
  return bool(separator) and scheme != 'file' and '/' not in scheme


def check_local(path: str | os.PathLike[str]) -> None:
  """Raises UserError for a URL where only local paths work; it would create a folder `s3:`."""
  if is_url(path):
    raise UserError(
      f'{path}: only local paths are supported here; copy the folder, or mount the bucket'
    )


def join(path: str | os.PathLike[str], *names: str) -> str:
  """Returns the path or URL of a name within a folder."""
  return os.path.join(os.fspath(path), *names)


def name(path: str | os.PathLike[str]) -> str:
  """Returns the last part of a path or URL."""
  return os.path.basename(os.fspath(path).rstrip('/'))


@contextlib.contextmanager
def open_file(path: str | os.PathLike[str], mode: str = 'rb') -> Iterator[IO[Any]]:
  """Opens a file for sequential reading; use it in a `with` statement.

  Args:
    path: a path or URL.
    mode: 'rb', or 'rt' for text in UTF-8, or in UTF-16 or UTF-32 with a byte order mark.

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
  """Returns the encoding of a text according to its byte order mark; decoding strips the mark."""
  return next((encoding for mark, encoding in _MARKS if data.startswith(mark)), 'utf-8-sig')


def _as_text(file: IO[bytes]) -> IO[str]:
  encoding = encoding_of(file.read(4))
  file.seek(0)
  return io.TextIOWrapper(file, encoding)


def exists(path: str | os.PathLike[str]) -> bool:
  """Returns whether a file or folder exists; in a store, a folder exists if it has an object."""
  if not is_url(path):
    return os.path.exists(_local(path))
  return _info(path) is not None


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Returns whether a folder exists; in a store, a folder exists if it has an object."""
  if not is_url(path):
    return os.path.isdir(_local(path))
  found = _info(path)
  return found is not None and found['type'] == 'directory'


def _info(path: str | os.PathLike[str]) -> dict[str, Any] | None:
  """Returns fsspec's description of the object at a URL; None if there isn't one.

  fsspec's own `exists` and `isdir` treat any error of a store as a missing object.
  """
  with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
    return _file_system(path).info(os.fspath(path))
  return None


def size(path: str | os.PathLike[str]) -> int:
  """Returns the size of a file in bytes."""
  if not is_url(path):
    return os.path.getsize(_local(path))
  with store_errors.translated(path):
    return _file_system(path).size(os.fspath(path))


def glob(pattern: str | os.PathLike[str]) -> list[str]:
  """Returns the paths or URLs that match a pattern with *, ?, [] and **, sorted."""
  if not is_url(pattern):
    return sorted(local_glob.glob(_local(pattern), recursive=True))
  with store_errors.translated(pattern):
    system = _file_system(pattern)
    return sorted(system.unstrip_protocol(found) for found in system.glob(os.fspath(pattern)))


def names(folder: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the files and folders in a folder, sorted; [] if it doesn't exist."""
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
  """Returns {path within the folder, with /: bytes} of all files below a folder."""
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
  """Returns the bytes of each file, -1 if it is missing; lists each folder of a store once."""
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
  """Returns the content of a file.

  Args:
    path: a path or URL.
    limit: maximum size in bytes, so that an untrusted file can't fill the memory.

  Raises:
    UserError: the file is larger.
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
  """Reads an object; retries if it is replaced meanwhile, which happens to a run's lock."""
  from parti_jax.core import store_systems

  for attempt in range(_READ_RETRIES + 1):
    try:
      with _opened(path) as file:
        return file.read(limit + 1)
    except store_systems.Changed:
      if attempt == _READ_RETRIES:
        raise
  raise AssertionError


def check_size(path: str | os.PathLike[str], limit: int) -> None:
  """Raises UserError if a file has more than `limit` bytes."""
  _check_bytes(path, size(path), limit)


def _check_bytes(path, found: int, limit: int) -> None:
  if found > limit:
    raise UserError(
      f'{path}: has {found:,} bytes, but such a file may have at most {limit:,}; '
      'is it the right file?'
    )


def read_json(path: str | os.PathLike[str], limit: int = MAX_JSON) -> Any:
  """Returns the content of a JSON file.

  Args:
    path: a path or URL.
    limit: maximum size in bytes.

  Raises:
    ValueError: it isn't valid JSON, has a duplicate name in an object, or is nested too deeply.
    UserError: the file is larger.
  """
  try:
    return json.loads(read(path, limit), object_pairs_hook=_object)
  except RecursionError as error:
    raise ValueError('nested too deeply') from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a JSON object; rejects duplicate names, whose value would be ambiguous."""
  found = dict(pairs)
  if len(found) < len(pairs):
    keys = [key for key, _ in pairs]
    twice = next(key for key in keys if keys.count(key) > 1)
    raise ValueError(f'the name {twice[:80]!r} appears twice in one object')
  return found


def write(path: str | os.PathLike[str], content: bytes | str) -> None:
  """Writes a file atomically, replacing an existing one; creates its folder.

  Args:
    path: a path or URL.
    content: bytes, or a string that is written as UTF-8.
  """
  content = content.encode() if isinstance(content, str) else content
  if is_url(path):
    # Stores publish an object when its last byte has arrived.
    with store_errors.translated(path, writing=True):
      _file_system(path).pipe_file(os.fspath(path), content)
    return
  path = pathlib.Path(_local(path))
  path.parent.mkdir(parents=True, exist_ok=True)
  # A process id isn't unique across hosts or containers.
  unfinished = path.with_name(f'.{path.name}.{os.urandom(4).hex()}.unfinished')
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
  """Creates a file that must not exist yet; of several concurrent calls, one succeeds.

  Stores ensure this by a condition on the request: If-None-Match for s3://, ifGenerationMatch for
  gs://. A store that ignores the condition replaces the object.

  Args:
    path: a path or URL.
    content: bytes that no other process writes. The response to an attempt may be lost, so an
      existing object with the same content counts as created by this call.

  Raises:
    FileExistsError: the file exists.
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
        if 'ConditionalRequestConflict' not in str(
          error
        ):  # S3's error while another client creates it.
          raise
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from error
  except FileExistsError:
    # This process created it if only the response to an earlier attempt was lost.
    if _read_if_there(path, len(content)) != content:
      raise


def _read_if_there(path: str | os.PathLike[str], limit: int) -> bytes | None:
  try:
    return read(path, limit)
  except (FileNotFoundError, UserError):
    return None


def check_can_write(name: str, path: str | os.PathLike[str]) -> None:
  """Raises UserError if a local file or folder can't be written; creates nothing.

  Args:
    name: prefix of the message.
    path: the path, which need not exist.
  """
  nearest = pathlib.Path(_local(path)).absolute()
  while not os.path.lexists(nearest):
    nearest = nearest.parent
  if nearest != pathlib.Path(_local(path)).absolute() and not nearest.is_dir():
    raise UserError(f'{name}: {nearest} is not a folder; choose another path')
  if not os.access(nearest, os.W_OK):
    raise UserError(f'{name}: {nearest} is not writable; make it writable, or choose another path')


def make_folder(path: str | os.PathLike[str]) -> None:
  """Creates a folder and its parents if they don't exist; does nothing for a store."""
  if not is_url(path):
    os.makedirs(_local(path), exist_ok=True)


def remove(path: str | os.PathLike[str]) -> None:
  """Removes a file; at a URL, a missing file isn't an error, as in S3."""
  if not is_url(path):
    os.remove(_local(path))
    return
  with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
    _file_system(path).rm_file(os.fspath(path))


def upload(file: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
  """Copies a local file of any size to a URL atomically."""
  with store_errors.translated(path, writing=True):
    _file_system(path).put_file(os.fspath(file), os.fspath(path))
  wanted, found = os.path.getsize(file), size(path)
  if found != wanted:
    raise UserError(f'{path}: the store has {found:,} bytes of it, but {wanted:,} were written')


def download(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
  """Copies the file at a URL to a local file, whose folder must exist."""
  with open_file(path) as source, open(file, 'wb') as copy:
    shutil.copyfileobj(source, copy, 2**20)


def move(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Moves a file within its disk or store, replacing an existing one."""
  if not is_url(path):
    os.replace(_local(path), _local(target))
    return
  with store_errors.translated(path):
    _file_system(path).cp_file(os.fspath(path), os.fspath(target))
  remove(path)


def move_folder(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Renames a folder of a store by copying all its files, then removing it."""
  # fsspec's own `mv` also asks for an object with the folder's name, which s3:// does not have.
  with store_errors.translated(path):
    for file in sizes(path):
      _file_system(path).cp_file(join(path, file), join(target, file))
  remove_folder(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
  """Removes a folder of a store with all its content; does nothing if it doesn't exist."""
  # s3fs silently skips objects that the store could not remove.
  for _ in range(_REMOVE_ATTEMPTS):
    with store_errors.translated(path), contextlib.suppress(FileNotFoundError):
      _file_system(path).rm(os.fspath(path), recursive=True)
    if not sizes(path):
      return
  raise UserError(f'{path}: the store did not remove all of it')


def as_epath(path: str | os.PathLike[str]):
  """Returns a path or URL as an etils.epath.Path, for libraries that require one.

  Raises:
    UserError: the package for such URLs isn't installed, or epath doesn't support them.
  """
  from etils import epath

  if is_url(path):
    import fsspec

    scheme = os.fspath(path).partition('://')[0]
    if scheme not in _EPATH_SCHEMES:
      schemes = ', '.join(_EPATH_SCHEMES)
      raise UserError(f'{path}: only paths and URLs of {schemes} are supported here')
    with store_errors.translated(path):
      _configure(scheme)
      fsspec.get_filesystem_class(scheme)
  return epath.Path(_local(path))


def local_folder(url: str, wanted: list[str]) -> str:
  """Copies the wanted files of a folder that exist to a temporary local folder.

  Args:
    url: URL of the folder.
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
  """Yields a local path of a file, for readers that require one; valid only within `with`."""
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
  """Returns fsspec's file system for a URL; fsspec caches one per kind."""
  import fsspec

  _configure(os.fspath(path).partition('://')[0])
  return fsspec.core.url_to_fs(os.fspath(path))[0]


def _configure(protocol: str) -> None:
  """Sets fsspec options that we need, unless the user has set them."""
  import logging

  import fsspec

  for scheme in ('s3', 'gcs'):
    # Other processes write too, so cached listings may be stale.
    fsspec.config.conf.setdefault(scheme, {}).setdefault('use_listings_cache', False)
  if 'STORAGE_EMULATOR_HOST' in os.environ:
    os.environ.setdefault('TENSORSTORE_GCS_HTTP_URL', os.environ['STORAGE_EMULATOR_HOST'])
    fsspec.config.conf['gcs'].setdefault('token', 'anon')
    # Otherwise gcsfs queries the type of each bucket over gRPC, which emulators don't support.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  # gcsfs logs the errors that it raises, with their tracebacks.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)
  from parti_jax.core import store_systems

  store_systems.register(protocol)

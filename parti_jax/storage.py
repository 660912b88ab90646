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
from typing import IO, Any

from parti_jax import optional_packages
from parti_jax.errors import UserError

# epath would hand URLs to TensorFlow where that is installed, which knows no s3:// and no endpoint
# other than Google's for gs://.
os.environ.setdefault('EPATH_USE_TF', '0')

# The most bytes of a file of trained weights for evaluation or a loss; VGG16's has 553 million.
MAX_WEIGHTS = 2**31
# The most bytes of a JSON file: configs and metadata have thousands of them.
MAX_JSON = 2**26
# Packages whose errors say something of the store and not of us.
_STORE_PACKAGES = ('aiobotocore', 'aiohttp', 'botocore', 'gcsfs', 'google', 'requests', 's3fs')
# What epath hands to fsspec.
_EPATH_SCHEMES = ('gs', 's3', 'az', 'hf')
# Byte order marks; that of UTF-16 begins one of UTF-32.
_MARKS = ((codecs.BOM_UTF32_LE, 'utf-32'), (codecs.BOM_UTF32_BE, 'utf-32'),
          (codecs.BOM_UTF16_LE, 'utf-16'), (codecs.BOM_UTF16_BE, 'utf-16'))
# Errors that mean the same for objects as for local files.
_OF_FILES = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)


def is_url(path: str | os.PathLike[str]) -> bool:
  """Whether a path is a URL, such as gs://bucket/folder; file:// counts as a local path."""
  scheme, separator, _ = os.fspath(path).partition('://')
  return bool(separator) and scheme != 'file' and '/' not in scheme


def check_local(path: str | os.PathLike[str]) -> None:
  """Raises UserError for a URL where only local paths do; else a folder `s3:` would be made."""
  if is_url(path):
    raise UserError(f'{path}: only a local path does here; copy the folder, or mount the bucket as '
                    'a folder')


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
  with _store_errors(path):
    opened = _file_system(path).open(os.fspath(path), 'rb')
  # What fails in the caller's own code must not be laid to the store.
  with opened as file, _store_errors(path, in_body=True):
    yield file if mode == 'rb' else _as_text(file)


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
  with _store_errors(path):
    return _file_system(path).exists(os.fspath(path))


def is_folder(path: str | os.PathLike[str]) -> bool:
  """Whether there is a folder; one of a store is there if an object is in it."""
  if not is_url(path):
    return os.path.isdir(_local(path))
  with _store_errors(path):
    return _file_system(path).isdir(os.fspath(path))


def size(path: str | os.PathLike[str]) -> int:
  """Returns the bytes of a file."""
  if not is_url(path):
    return os.path.getsize(_local(path))
  with _store_errors(path):
    return _file_system(path).size(os.fspath(path))


def glob(pattern: str | os.PathLike[str]) -> list[str]:
  """Returns the paths, or URLs, that fit a pattern with *, ?, [] and **, sorted."""
  if not is_url(pattern):
    return sorted(local_glob.glob(_local(pattern), recursive=True))
  with _store_errors(pattern):
    system = _file_system(pattern)
    return sorted(system.unstrip_protocol(found) for found in system.glob(os.fspath(pattern)))


def names(folder: str | os.PathLike[str]) -> list[str]:
  """Returns the names of the files and folders in a folder, sorted; none where there is none."""
  if not is_url(folder):
    try:
      return sorted(os.listdir(_local(folder)))
    except FileNotFoundError:
      return []
  with _store_errors(folder):
    try:
      return sorted({name(found) for found in _file_system(folder).ls(
          os.fspath(folder), detail=False)})
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
  with _store_errors(folder):
    system = _file_system(folder)
    top = system._strip_protocol(os.fspath(folder)).rstrip('/') + '/'  # pylint: disable=protected-access
    return {path.removeprefix(top): details['size']
            for path, details in system.find(os.fspath(folder), detail=True).items()}


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
    content, found = b'', size(path)
    if found <= limit:
      with _store_errors(path):
        content = _file_system(path).cat_file(os.fspath(path))
  _check_bytes(path, found, limit)
  return content


def check_size(path: str | os.PathLike[str], limit: int) -> None:
  """Raises UserError if a file has more bytes than one of its kind may have."""
  _check_bytes(path, size(path), limit)


def _check_bytes(path, found: int, limit: int) -> None:
  if found > limit:
    raise UserError(f'{path}: has {found:,} bytes, and {limit:,} are the most that a file of its '
                    'kind may have; is it the right file?')


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
    with _store_errors(path, writing=True):
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

  Raises:
    FileExistsError: the file is there.
  """
  if not is_url(path):
    with open(_local(path), 'xb') as file:
      file.write(content)
    return
  with _store_errors(path, writing=True):
    try:
      _file_system(path).pipe_file(os.fspath(path), content, mode='create')
    except OSError as error:
      if 'ConditionalRequestConflict' not in str(error):  # Of S3, while another one creates it.
        raise
      raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(path)) from error


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
    raise UserError(f'{name}: {nearest} can not be written; make it writable, or choose another '
                    'path')


def make_folder(path: str | os.PathLike[str]) -> None:
  """Makes a folder and those around it, unless they are there; stores need none."""
  if not is_url(path):
    os.makedirs(_local(path), exist_ok=True)


def remove(path: str | os.PathLike[str]) -> None:
  """Removes a file."""
  if not is_url(path):
    os.remove(_local(path))
    return
  with _store_errors(path, writing=True):
    _file_system(path).rm_file(os.fspath(path))


def upload(file: str | os.PathLike[str], path: str | os.PathLike[str]) -> None:
  """Copies a local file of any size to a URL, where it appears whole or not at all."""
  with _store_errors(path, writing=True):
    _file_system(path).put_file(os.fspath(file), os.fspath(path))


def download(path: str | os.PathLike[str], file: str | os.PathLike[str]) -> None:
  """Copies what is at a URL to a local file, whose folder must be there."""
  with _store_errors(path):
    _file_system(path).get_file(os.fspath(path), os.fspath(file))


def move(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Moves a file within its disk or store, in place of one that is there."""
  if not is_url(path):
    os.replace(_local(path), _local(target))
    return
  with _store_errors(path):
    _file_system(path).mv(os.fspath(path), os.fspath(target))


def move_folder(path: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
  """Renames a folder of a store: all is copied within the store, then removed."""
  # fsspec's own `mv` also asks for an object with the folder's name, which s3:// does not have.
  with _store_errors(path):
    for file in sizes(path):
      _file_system(path).cp_file(join(path, file), join(target, file))
  remove_folder(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
  """Removes a folder of a store with all that is in it; does nothing where there is none."""
  with _store_errors(path), contextlib.suppress(FileNotFoundError):
    _file_system(path).rm(os.fspath(path), recursive=True)


def as_epath(path: str | os.PathLike[str]):
  """Returns a path or URL as an etils.epath.Path, for libraries that take no other.

  Raises:
    UserError: the package that reads such URLs is not installed, or epath knows none.
  """
  from etils import epath  # pylint: disable=import-outside-toplevel

  if is_url(path):
    import fsspec  # pylint: disable=import-outside-toplevel

    _configure()
    scheme = os.fspath(path).partition('://')[0]
    if scheme not in _EPATH_SCHEMES:
      raise UserError(f'{path}: only paths and URLs of {", ".join(_EPATH_SCHEMES)} do here')
    with _store_errors(path):
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
  import fsspec  # pylint: disable=import-outside-toplevel

  _configure()
  return fsspec.core.url_to_fs(os.fspath(path))[0]


def _configure() -> None:
  """Sets what fsspec's file systems need here and their user has not set."""
  import fsspec  # pylint: disable=import-outside-toplevel

  for scheme in ('s3', 'gcs'):
    # Other processes write too.
    fsspec.config.conf.setdefault(scheme, {}).setdefault('use_listings_cache', False)
  if 'STORAGE_EMULATOR_HOST' in os.environ:
    fsspec.config.conf['gcs'].setdefault('token', 'anon')
    # Else gcsfs asks over gRPC, which emulators do not speak, what kind each bucket is of.
    os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  # It logs the errors that it raises, with all calls.
  logging.getLogger('gcsfs').setLevel(logging.CRITICAL)


@contextlib.contextmanager
def _store_errors(path, writing: bool = False, in_body: bool = False) -> Iterator[None]:
  """Turns a store's errors into UserErrors that name the URL.

  Args:
    path: the URL.
    writing: whether a missing object can only be a missing bucket.
    in_body: whether the code inside is not only the store's.
  """
  try:
    yield
  except UserError:
    raise
  except _OF_FILES as error:
    if not isinstance(error, FileNotFoundError):
      raise
    if writing:
      raise UserError(f'{path}: the bucket of this URL is not there; make it first') from error
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path)) from error
  except ImportError as error:
    explained = optional_packages.missing_extra(error.__cause__ or error)
    raise UserError(f'{path}: {explained or error}') from error
  except Exception as error:  # pylint: disable=broad-except
    if not in_body and isinstance(error, (OSError, ValueError)) or _from_store(error):
      raise UserError(f'{path}: {_reason(error)}') from error
    raise


def _from_store(error: BaseException | None) -> bool:
  packages = {type(e).__module__.split('.')[0] for e in (error, error.__cause__)}
  return not packages.isdisjoint(_STORE_PACKAGES)


def _reason(error: Exception) -> str:
  """Says in one line what a store, or the way to it, has refused."""
  names = {type(e).__name__ for e in (error, error.__cause__) if e is not None}
  text = ' '.join(str(error).split()) or type(error).__name__
  if names & {'NoCredentialsError', 'PartialCredentialsError', 'DefaultCredentialsError'}:
    return (f'no credentials for this store ({text}); set AWS_ACCESS_KEY_ID and '
            'AWS_SECRET_ACCESS_KEY, or run `aws configure`; for gs:// run '
            '`gcloud auth application-default login`')
  if 'PermissionError' in names or text.startswith('Forbidden') or 'Unauthorized' in text:
    return f'access denied ({text}); check the credentials and their rights to the bucket'
  if names & {'EndpointConnectionError', 'ClientConnectorError', 'ConnectTimeoutError'}:
    return (f'the store can not be reached ({text}); check the network, AWS_ENDPOINT_URL and '
            'STORAGE_EMULATOR_HOST')
  return f'the store failed: {text}'

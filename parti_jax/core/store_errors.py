"""Turns errors of object stores and their libraries into one readable line."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from parti_jax.core import optional_packages
from parti_jax.core import store_retries
from parti_jax.core.errors import UserError

# Packages whose errors concern the store and not our code.
_STORE_PACKAGES = ('aiobotocore', 'aiohttp', 'botocore', 'gcsfs', 'google', 'requests', 's3fs')
# Errors that mean the same for objects as for local files.
_FILE_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_TENSORSTORE_ERROR = re.compile(
  r'(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|INTERNAL|PERMISSION_DENIED|UNAUTHENTICATED): .*'
  r'(gs://|https?://)',
  re.DOTALL,
)

# TensorStore's words where an answer to a conditional request has no generation.
_NO_GENERATIONS = 'Malformed StorageGeneration'


@contextlib.contextmanager
def translated(path, writing: bool = False) -> Iterator[store_retries.Operation]:
  """Turns a store's errors into UserErrors that name the URL; its body is one operation.

  Args:
    path: the URL.
    writing: whether a missing object must mean a missing bucket.
  """
  with store_retries.operation() as operation:
    try:
      yield operation
    except UserError:
      raise
    except Exception as error:
      found = _translated(error, path, writing, operation)
      if found is error:
        raise
      raise found from error
    if operation.failure:  # A library has swallowed it.
      raise UserError(f'{path}: the store failed: {operation.failure}')


def _translated(error: Exception, path, writing: bool, operation) -> Exception:
  """Returns the error that callers of `storage` get for an error of a file system."""
  if operation.failure:
    return UserError(f'{path}: {_reason(error, operation.failure)}')
  if isinstance(error, FileNotFoundError):
    if writing:
      return UserError(f'{path}: the bucket of this URL does not exist; create it first')
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), os.fspath(path))
  if isinstance(error, _FILE_ERRORS):
    return error
  if isinstance(error, ImportError):
    explained = optional_packages.missing_extra(error.__cause__ or error)
    return UserError(f'{path}: {explained or error}')
  if isinstance(error, (OSError, ValueError)) or _from_store(error):
    return UserError(f'{path}: {_reason(error)}')
  return error


def _from_store(error: BaseException) -> bool:
  packages = {type(e).__module__.split('.')[0] for e in (error, error.__cause__)}
  return not packages.isdisjoint(_STORE_PACKAGES)


def failure(error: BaseException) -> str | None:
  """Describes a store's failure in one line, given an error of a library that reads URLs itself.

  Returns:
    The description; None if the error doesn't come from a store.
  """
  found: BaseException | None = error
  while found is not None:
    if _NO_GENERATIONS in str(found):
      return (
        'the server of gs:// gives no generations of objects (x-goog-generation), or ignores '
        'conditions on them; checkpoints need both, as Google Cloud Storage has them'
      )
    # TensorStore doesn't define error classes.
    if _from_store(found) or _TENSORSTORE_ERROR.search(str(found)):
      return _reason(found)
    found = found.__cause__ or found.__context__
  return None


def _reason(error: BaseException, text: str = '') -> str:
  """Describes in one line why a request to a store failed."""
  names = {type(e).__name__ for e in (error, error.__cause__) if e is not None}
  text = text or ' '.join(str(error).split()) or type(error).__name__
  if names & {'NoCredentialsError', 'PartialCredentialsError', 'DefaultCredentialsError'}:
    return (
      f'no credentials for this store ({text}); set AWS_ACCESS_KEY_ID and '
      'AWS_SECRET_ACCESS_KEY, or run `aws configure`; for gs:// run '
      '`gcloud auth application-default login`'
    )
  if 'PermissionError' in names or text.startswith('Forbidden') or 'Unauthorized' in text:
    return f'access denied ({text}); check the credentials and their rights to the bucket'
  if names & {'EndpointConnectionError', 'ClientConnectorError', 'ConnectTimeoutError'}:
    return (
      f'the store cannot be reached ({text}); check the network, AWS_ENDPOINT_URL and '
      'STORAGE_EMULATOR_HOST'
    )
  if names & {'FSTimeoutError', 'ReadTimeoutError', 'SocketTimeoutError', 'TimeoutError'}:
    return f'the store does not answer ({text})'
  return f'the store failed: {text}'

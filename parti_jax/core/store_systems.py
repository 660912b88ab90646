"""fsspec's file systems for s3:// and gs://, with the retries and timeouts of `store_retries`.

The libraries' own retries are disabled: they aren't counted, some give up after a second, and
others wait for minutes. `register` makes fsspec, and therefore Orbax's paths, use these classes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import json
import re
import time
import urllib.parse
from typing import Any

import fsspec
import fsspec.asyn

from parti_jax.core import store_retries
from parti_jax.core.errors import UserError

# Bytes of an object that are read at once; also the buffer size of an open object.
PIECE = 2**22
_SCHEMES = {'s3': 's3', 's3a': 's3', 'gs': 'gs', 'gcs': 'gs'}
# Temporary errors by class name, since their packages may not be installed.
_KINDS = {
  store_retries.NO_CONNECTION: frozenset(
    (
      'ClientConnectorError',
      'ConnectTimeoutError',
      'ConnectionRefusedError',
      'ConnectionTimeoutError',
      'EndpointConnectionError',
      'ProxyConnectionError',
    )
  ),
  store_retries.NO_ANSWER: frozenset(
    ('FSTimeoutError', 'ReadTimeoutError', 'ServerTimeoutError', 'Timeout', 'TimeoutError')
  ),
  store_retries.LOST: frozenset(
    (
      'ChecksumError',
      'ChunkedEncodingError',
      'ClientConnectionError',
      'ClientPayloadError',
      'ConnectionClosedError',
      'ConnectionError',
      'HTTPClientError',
      'IncompleteReadError',
      'ProxyError',
      'RefreshError',
      'ResponseParserError',
      'ResponseStreamingError',
    )
  ),
}
# S3 error codes; some come with a status that isn't in `store_retries.STATUSES`.
_S3_CODES = frozenset(
  (
    'BadDigest',
    'IncompleteBody',
    'InternalError',
    'RequestLimitExceeded',
    'RequestTimeout',
    'ServiceUnavailable',
    'SlowDown',
    'Throttling',
    'ThrottlingException',
    'TooManyRequests',
    'XAmzContentSHA256Mismatch',
  )
)


class Changed(UserError):
  """An object was replaced or removed during reading."""


def register(scheme: str) -> None:
  """Makes fsspec use this module's class for a scheme, if we have one.

  Raises:
    ImportError: the package for the scheme is missing.
  """
  kind = _SCHEMES.get(scheme)
  if kind is None or issubclass(fsspec.get_filesystem_class(scheme), _Retrying):
    return
  found = _s3_class() if kind == 's3' else _gs_class()
  for name, same in _SCHEMES.items():
    if same == kind:
      fsspec.register_implementation(name, found, clobber=True)


def kind_of(error: BaseException | None) -> str | None:
  """Returns the kind of a temporary failure; None for any other error."""
  if error is None:
    return None
  code = str(getattr(error, 'code', ''))
  if code.isdecimal() and int(code) in store_retries.STATUSES:
    return store_retries.status_kind(int(code))
  names = {base.__name__ for base in type(error).__mro__}
  return next((kind for kind, known in _KINDS.items() if names & known), kind_of(error.__cause__))


class _Retrying:
  """Base of this module's classes."""

  loop: Any

  async def _fetch(self, path: str, details: dict[str, Any], start: int, end: int) -> bytes:
    """Reads a range of the object that `details` describe."""
    raise NotImplementedError


def _s3_class():
  import s3fs
  from aiobotocore.httpsession import AIOHTTPSession
  from aiobotocore.httpsession import ReadTimeoutError
  from aiobotocore.session import AioSession

  class BoundedSession(AIOHTTPSession):
    """Gives up a stalled upload, which aiohttp would wait for."""

    async def _get_session(self, proxy_url):
      return _without_own_retry(await super()._get_session(proxy_url))

    async def send(self, request):
      size = int(request.headers.get('Content-Length') or 0)
      try:
        return await asyncio.wait_for(super().send(request), store_retries.attempt_seconds(size))
      except TimeoutError as error:
        raise ReadTimeoutError(endpoint_url=request.url, error=error) from error

  def begin(request_signer, params, context, model, **_):
    """Botocore's hook before the first attempt."""
    del request_signer
    context['parti_jax_attempts'] = store_retries.Attempts('s3', f'{model.name} {params["url"]}')

  def needs_retry(response, caught_exception, request_dict, **_):
    """Botocore's hook after each attempt; returns seconds until the next one, or None."""
    kind = kind_of(caught_exception)
    reason = ' '.join(str(caught_exception).split())
    if response is not None:
      store_retries.answered('s3')
      status = response[0].status_code
      error = response[1].get('Error', {})
      if status in store_retries.STATUSES or error.get('Code') in _S3_CODES:
        kind = store_retries.status_kind(status)
        reason = f'{status} {error.get("Code", "")} {error.get("Message", "")}'.strip()
    if kind is None:
      return None
    return request_dict['context']['parti_jax_attempts'].delay(kind, reason)

  class RetryingS3(_Retrying, s3fs.S3FileSystem):
    """S3 with our retries."""

    retries = 1
    session: Any

    def _prepare_config_kwargs(self):
      connect, read = store_retries.timeouts()
      return {
        'connect_timeout': connect,
        'read_timeout': read,
        **self.config_kwargs,
        'http_session_cls': BoundedSession,
        'retries': {'mode': 'standard', 'total_max_attempts': 1},
      }

    async def set_session(self, refresh=False, kwargs={}):  # noqa: B006
      if self.session is None:
        self.session = AioSession(**self.kwargs)
        self.session.register('before-call.s3', begin)
        self.session.register('needs-retry.s3', needs_retry)
      return await super().set_session(refresh, kwargs)

    async def _fetch(self, path: str, details: dict[str, Any], start: int, end: int) -> bytes:
      bucket, key, _ = self.split_path(path)
      match = {'IfMatch': details['ETag']} if details.get('ETag') else {}
      found = await self._call_s3(
        'get_object', Bucket=bucket, Key=key, Range=f'bytes={start}-{end - 1}', **match
      )
      async with found['Body'] as body:
        return await body.read()

  return RetryingS3


def _gs_class():
  import aiohttp
  import gcsfs
  import gcsfs.core

  attempt = gcsfs.core.GCSFileSystem._request.__wrapped__  # Without gcsfs' own retries.

  class RetryingGs(_Retrying, gcsfs.GCSFileSystem):
    """Google Cloud Storage with our retries."""

    def __init__(self, *args, **kwargs):
      super().__init__(*args, **kwargs)
      connect, read = store_retries.timeouts()
      self.requests_timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=connect, sock_read=read
      )

    async def _set_session(self):
      return _without_own_retry(await super()._set_session())

    async def _request(self, method, path, *args, **kwargs):
      attempts = store_retries.Attempts('gs', f'{method} {path.partition("?")[0]}')
      data, repeated = kwargs.get('data'), False
      while True:
        try:
          sent = attempt(self, method, path, *args, **kwargs)
          if data is not None:
            sent = asyncio.wait_for(sent, store_retries.attempt_seconds(_size(data)))
          found = await sent
          store_retries.answered('gs')
          if repeated and path == self.batch_url_base:  # Removals, as below.
            found = *found[:3], re.sub(rb'(HTTP/[0-9.]+) 404', rb'\1 204', found[3])
          return found
        except Exception as error:
          if repeated and isinstance(error, FileNotFoundError):
            if method == 'DELETE':
              return 204, {}, None, b''  # An earlier attempt removed it.
            if found := await self._finished(path, data, kwargs.get('headers') or {}):
              return found
          kind = kind_of(error)
          if kind not in _KINDS:
            store_retries.answered('gs')
          reason = ' '.join(str(error).split()) or type(error).__name__
          delay = attempts.delay(kind, reason) if kind else None
          if delay is None:
            raise
          repeated = True
          await asyncio.sleep(delay)

    async def _finished(self, path: str, data, headers):
      """Returns the response to a finished upload whose last response was lost.

      Returns:
        The same as `_request`; None for other requests, or if the object differs.
      """
      url = urllib.parse.urlsplit(path)
      name = urllib.parse.parse_qs(url.query).get('name', [''])[0]
      bucket = re.search(r'/b/([^/]+)/o$', url.path)
      part = re.fullmatch(r'bytes (\d+)-(\d+)/(\d+)', headers.get('Content-Range', ''))
      if not (bucket and name and part and int(part[2]) + 1 == int(part[3])):
        return None
      found = await self._request('GET', 'b/{}/o/{}', bucket[1], name)
      details = json.loads(found[3])
      whole = int(part[1]) == 0 and isinstance(data, (bytes, bytearray, memoryview))
      digest = base64.b64encode(hashlib.md5(data).digest()).decode() if whole else None
      same = int(details['size']) == int(part[3]) and (
        digest is None or details.get('md5Hash') in (None, digest)
      )
      return found if same else None

    async def _fetch(self, path: str, details: dict[str, Any], start: int, end: int) -> bytes:
      return await self._cat_file(path, start=start, end=end, generation=details.get('generation'))

  return RetryingGs


def _without_own_retry(session):
  """Disables aiohttp's own retry, which would not be counted."""
  session._retry_connection = False
  return session


def _size(data) -> int:
  """Returns the bytes of a request's body."""
  return len(data) if hasattr(data, '__len__') else len(data.getbuffer())


class Pieces(io.RawIOBase):
  """Reads an object of a store in pieces, with retries for each.

  All pieces come from the version that existed when the object was opened, if the store has
  versions.

  Args:
    system: fsspec's file system.
    path: the URL.
    errors: a context manager that turns the store's errors into UserErrors.

  Raises:
    FileNotFoundError: the object doesn't exist.
  """

  def __init__(self, system, path: str, errors):
    super().__init__()
    self._system, self._path, self._errors = system, path, errors
    with errors(path):
      self._details = system.info(path)
      if self._details.get('type') == 'directory':
        raise IsADirectoryError(path)
    self._end, self._position = self._details['size'], 0

  def readable(self) -> bool:
    return True

  def seekable(self) -> bool:
    return True

  def tell(self) -> int:
    return self._position

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._end}[whence]
    self._position = max(0, start + offset)
    return self._position

  def readinto(self, buffer) -> int:
    count = min(len(buffer), PIECE, self._end - self._position)
    if count <= 0:
      return 0
    with self._errors(self._path) as operation:
      buffer[:count] = self._read(count, operation)
    self._position += count
    return count

  def _read(self, count: int, operation: store_retries.Operation) -> bytes:
    """Returns exactly the next `count` bytes."""
    attempts = store_retries.Attempts(self._path.partition('://')[0], self._path)
    while True:
      try:
        found = self._fetch(self._position, self._position + count)
        if len(found) == count:
          return found
        kind: str | None = store_retries.SHORT
        reason = f'{len(found):,} bytes received instead of {count:,}'
      except Exception as error:
        kind, reason = kind_of(error), ' '.join(str(error).split()) or type(error).__name__
        if kind is None and (isinstance(error, FileNotFoundError) or _status(error) == 412):
          raise Changed(
            f'{self._path}: was replaced or removed during reading; start again when it is complete'
          ) from error
        if kind is None or operation.failure:
          raise
      assert kind is not None
      delay = attempts.delay(kind, reason)
      if delay is None:
        raise UserError(f'{self._path}: the store failed: {operation.failure}')
      time.sleep(delay)

  def _fetch(self, start: int, end: int) -> bytes:
    if isinstance(self._system, _Retrying):
      return fsspec.asyn.sync(
        self._system.loop, self._system._fetch, self._path, self._details, start, end
      )
    return self._system.cat_file(self._path, start=start, end=end)


def _status(error: BaseException) -> int | None:
  """Returns the HTTP status of an error of S3's library."""
  response = getattr(error.__cause__ or error, 'response', None)
  return response['ResponseMetadata']['HTTPStatusCode'] if isinstance(response, dict) else None

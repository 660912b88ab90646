"""A proxy in front of an object store that answers some requests as stores do on bad days.

Which request fails, and how, depends on the seed, the request and how often it came before, and not
on the order in which threads send their requests.
"""

import collections
import contextlib
import hashlib
import http.client
import http.server
import threading
import time
import urllib.parse

STATUSES = ('429', '500', '503')
# 'lost' does what was asked for and does not answer. Others are 'hang', which never answers, and
# 'short', where a part of an object is asked for, half of it that claims to be whole.
FAULTS = (*STATUSES, 'cut', 'lost', 'refused', 'slow')


class MisbehavingStore:
  """Forwards requests to a server of S3's or Google's interface; a context manager.

  Args:
    upstream: URL of the server.
    faults: called with the method, the path with its query, and how often this method and the path
      without its query came before; returns one of `FAULTS`, 'hang', or None.

  Attributes:
    url: of the proxy.
    sent: fault -> how often it was.
    log: (method, path, range, fault) of all requests.
  """

  def __init__(self, upstream: str, faults):
    self.faults, self.sent, self.log = faults, collections.Counter(), []
    self._upstream = urllib.parse.urlsplit(upstream).netloc
    self._seen, self._lock = collections.Counter(), threading.Lock()
    self._ending = threading.Event()
    handler = type('Handler', (_Handler,), {'store': self})
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    self._server.daemon_threads = True
    self.url = f'http://127.0.0.1:{self._server.server_address[1]}'

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
    return self

  def __exit__(self, *_):
    self._ending.set()
    self._server.shutdown()
    self._server.server_close()

  def fault(self, method: str, path: str, headers) -> str | None:
    """What becomes of a request."""
    with self._lock:
      key = method, path.partition('?')[0]
      count = self._seen[key]
      self._seen[key] += 1
      found = self.faults(method, path, count)
      if found == 'short' and 'Range' not in headers:
        found = None
      self.log.append((method, path, headers.get('Range', ''), found))
      if found:
        self.sent[found] += 1
    return found

  def hang(self):
    """Waits until the proxy ends."""
    self._ending.wait(600)

  def forward(self, method: str, path: str, headers, body: bytes):
    """Returns the server's answer: status, reason, headers and body."""
    connection = http.client.HTTPConnection(self._upstream, timeout=60)
    try:
      connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
      for name, value in headers.items():
        if name.lower() not in ('expect', 'connection', 'transfer-encoding', 'content-length'):
          connection.putheader(name, value)
      connection.putheader('Content-Length', str(len(body)))
      connection.putheader('Connection', 'close')
      connection.endheaders(body)
      answer = connection.getresponse()
      return answer.status, answer.reason, answer.getheaders(), answer.read()
    finally:
      connection.close()


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers requests of one connection."""

  protocol_version = 'HTTP/1.1'
  store: MisbehavingStore

  def _answer(self):
    body = self._body()
    fault = self.store.fault(self.command, self.path, self.headers)
    if fault == 'hang':
      self.store.hang()
    if fault in ('hang', 'refused'):
      self.close_connection = True
      return
    if fault in STATUSES:
      self._send(int(fault), '', [('Content-Type', 'application/xml')], _error(fault, self.path))
      return
    if fault == 'slow':
      time.sleep(0.2)
    answer = self.store.forward(self.command, self.path, self.headers, body)
    if fault == 'lost' or (fault == 'cut' and not answer[-1]):
      self.close_connection = True
      return
    if fault == 'short':
      answer = *answer[:-1], answer[-1][: len(answer[-1]) // 2]
    self._send(*answer, cut=fault == 'cut')

  def _body(self) -> bytes:
    if self.headers.get('Transfer-Encoding', '').lower() != 'chunked':
      return self.rfile.read(int(self.headers.get('Content-Length', 0)))
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _send(self, status, reason, headers, body, cut=False):
    self.send_response_only(status, reason or None)
    length = len(body)
    for name, value in headers:
      if name.lower() == 'content-length' and self.command == 'HEAD':
        length = value
      elif name.lower() not in ('connection', 'content-length', 'transfer-encoding'):
        self.send_header(name, value)
    self.send_header('Content-Length', str(length))
    self.end_headers()
    self.close_connection |= cut
    if self.command == 'HEAD':
      return
    with contextlib.suppress(ConnectionError):
      self.wfile.write(body[: len(body) // 2] if cut else body)

  do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _answer

  def handle(self):
    with contextlib.suppress(ConnectionError):
      super().handle()

  def log_message(self, *_):
    pass


def seeded(seed: int, rate: float, kinds=FAULTS):
  """Faults of so large a share of the requests, drawn by a seed."""

  def fault(method: str, path: str, count: int) -> str | None:
    text = f'{seed} {method} {path.partition("?")[0]} {count}'.encode()
    number = int.from_bytes(hashlib.sha256(text).digest()[:8])
    if number % 10_000 >= rate * 10_000:
      return None
    return kinds[number // 10_000 % len(kinds)]

  return fault


def first(kinds, times: int = 1):
  """Each request, by its method, path and query, fails at first, in these ways in turn.

  Args:
    kinds: of `FAULTS`.
    times: how often each request fails.
  """
  turns, seen = iter(range(10**9)), collections.Counter()

  def fault(method: str, path: str, count: int) -> str | None:
    del count
    seen[method, path] += 1
    return kinds[next(turns) % len(kinds)] if seen[method, path] <= times else None

  return fault


def every(number: int, kinds=FAULTS):
  """Of all requests each so many-th fails, in these ways in turn."""
  turns = iter(range(10**9))

  def fault(method: str, path: str, count: int) -> str | None:
    del method, path, count
    turn = next(turns)
    return None if turn % number else kinds[turn // number % len(kinds)]

  return fault


def _error(status: str, path: str) -> bytes:
  """An answer as S3 gives it, or Google where the path is of its interface."""
  if '/storage/v1/' in path or path.startswith('/batch'):
    return f'{{"error": {{"code": {status}, "message": "try again"}}}}'.encode()
  code = {'503': 'SlowDown', '429': 'TooManyRequests'}.get(status, 'InternalError')
  return (
    f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code>'
    '<Message>try again</Message></Error>'
  ).encode()

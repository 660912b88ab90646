"""The HTTP server: OpenAI's images endpoints, with previews as server-sent events.

It serves no files. Whatever is wrong with a request, the answer is JSON with one line.
"""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from collections.abc import Iterator
from typing import Any

import uvicorn
from starlette import applications
from starlette import exceptions
from starlette import requests
from starlette import responses
from starlette import routing
from starlette import types
from uvicorn.protocols.http import h11_impl

from parti_jax.core import checks
from parti_jax.sampling import images as images_lib
from parti_jax.sampling import results
from parti_jax.sampling import running_batch
from parti_jax.serving import image_requests
from parti_jax.serving import image_service

GENERATIONS = '/v1/images/generations'
EDITS = '/v1/images/edits'
# Seconds between two lines that keep a stream of events open.
_QUIET_SECONDS = 15.0
# Names of kinds of errors, as OpenAI has them.
_KINDS = {404: 'not_found_error', 429: 'rate_limit_error', 500: 'server_error', 503: 'server_error'}
_RETRY_SECONDS = 5
_CONNECTION_BACKLOG = 1024
# Fields of a form that aren't files.
_MOST_FIELDS = 64
# Seconds that sending an error may take.
_ERROR_SECONDS = 5.0

_Event = tuple[int, running_batch.Preview] | None


def app(service: image_service.ImageService) -> applications.Starlette:
  """Returns the application.

  Args:
    service: draws the pictures.
  """
  handlers = _Handlers(service)
  found = applications.Starlette(
    routes=[
      routing.Route('/health', handlers.health, methods=['GET']),
      routing.Route('/v1/models', handlers.models, methods=['GET']),
      routing.Route('/v1/models/{name:path}', handlers.model, methods=['GET']),
      routing.Route(GENERATIONS, handlers.generations, methods=['POST']),
      routing.Route(EDITS, handlers.edits, methods=['POST']),
    ],
    exception_handlers={
      image_requests.RequestError: _refuse,
      exceptions.HTTPException: _refuse_route,
      requests.ClientDisconnect: _nobody,
      Exception: _fail,
    },
  )
  found.router.redirect_slashes = False  # A redirection would repeat the client's own Host.
  return found


class _Handlers:
  """The endpoints."""

  def __init__(self, service: image_service.ImageService):
    self._service = service
    self._created = int(time.time())

  async def health(self, request: requests.Request) -> responses.Response:
    """Says whether requests are accepted, and how many pictures are being drawn."""
    service = self._service
    accepting = service.accepting
    content = {
      'status': 'ok' if accepting else 'stopping',
      'model': service.offer.model,
      'slots': service.sampler.batch_size,
      'running': service.sampler.running,
      'waiting': service.sampler.waiting,
      'pending': service.pending,
    }
    return responses.JSONResponse(content, 200 if accepting else 503)

  async def models(self, request: requests.Request) -> responses.Response:
    """Lists the model."""
    return responses.JSONResponse({'object': 'list', 'data': [self._model()]})

  async def model(self, request: requests.Request) -> responses.Response:
    """Describes the model."""
    name = request.path_params['name']
    if name != self._service.offer.model:
      raise image_requests.RequestError(
        f'the model {checks.shown_as_json(name)} is not served; the model here is '
        f'{self._service.offer.model}',
        404,
        'model',
        'model_not_found',
      )
    return responses.JSONResponse(self._model())

  def _model(self) -> dict[str, Any]:
    offer = self._service.offer
    upscaled = [] if offer.upscaled is None else [offer.pixels(upscaled=True)]
    return {
      'id': offer.model,
      'object': 'model',
      'created': self._created,
      'owned_by': 'parti_jax',
      'sizes': [offer.pixels(), *upscaled],
      'rank': offer.ranked,
    }

  async def generations(self, request: requests.Request) -> responses.Response:
    """Draws pictures for a prompt."""
    _check_kind(request, 'application/json')
    limits = self._service.limits
    body = await _body(request, limits, limits.body)
    return await self._answer(image_requests.parse(body, self._service.offer, limits))

  async def edits(self, request: requests.Request) -> responses.Response:
    """Redraws parts of a picture."""
    _check_kind(request, 'multipart/form-data')
    limits = self._service.limits
    texts, files = await _form(request, await _body(request, limits, limits.files))
    return await self._answer(
      await asyncio.to_thread(image_requests.parse_form, texts, files, self._service.offer, limits)
    )

  async def _answer(self, asked: image_requests.ImageRequest) -> responses.Response:
    """Asks for the pictures of a request."""
    answer = _Stream(self._service, asked) if asked.stream else _Whole(self._service, asked)
    if asked.edit is None:
      answer.start()
    else:  # The devices encode the picture first.
      await asyncio.to_thread(answer.start)
    return answer


def _check_kind(request: requests.Request, kind: str) -> None:
  if request.headers.get('content-type', '').partition(';')[0].strip().lower() != kind:
    raise image_requests.RequestError(f'the body must be of the Content-Type {kind}', 415)


async def _form(request: requests.Request, body: bytes) -> tuple[dict[str, str], dict[str, bytes]]:
  """Returns the texts and the files of a form."""

  async def replay() -> types.Message:
    return {'type': 'http.request', 'body': body, 'more_body': False}

  texts: dict[str, str] = {}
  files: dict[str, bytes] = {}
  try:
    form = await requests.Request(request.scope, replay).form(
      max_files=len(image_requests.FILES), max_fields=_MOST_FIELDS, max_part_size=len(body) + 1
    )
  except (exceptions.HTTPException, ValueError) as error:  # The latter are python_multipart's.
    reason = str(getattr(error, 'detail', error))[:200]
    raise image_requests.RequestError(f'the form cannot be read: {reason}') from None
  async with contextlib.AsyncExitStack() as stack:
    stack.push_async_callback(form.close)
    for name, value in form.multi_items():
      if name in texts or name in files:
        raise image_requests.RequestError(
          f'{checks.shown_as_json(name)} is there twice', field=name[:80]
        )
      if isinstance(value, str):
        texts[name] = value
      else:
        files[name] = await value.read()
  return texts, files


async def _body(request: requests.Request, limits: image_requests.Limits, most: int) -> bytes:
  """Reads the body of a request, within limits of size and time."""
  too_long = image_requests.RequestError(
    f'the body is longer than {most:,} bytes', 413, code='body_too_long'
  )
  length = request.headers.get('content-length', '0')
  if not length.isdecimal() or int(length) > most:
    raise too_long
  content = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for chunk in request.stream():
        content += chunk
        if len(content) > most:
          raise too_long
  except TimeoutError:
    raise image_requests.RequestError(
      f'the body did not arrive within {limits.body_seconds:g} seconds', 408
    ) from None
  return bytes(content)


class _Answer(responses.Response):
  """Answers with pictures once they are drawn, and withdraws them if the client goes away."""

  def __init__(self, service: image_service.ImageService, asked: image_requests.ImageRequest):
    super().__init__()
    self._service = service
    self._asked = asked
    self._loop = asyncio.get_running_loop()
    self._events: asyncio.Queue[_Event] = asyncio.Queue()
    self._future: concurrent.futures.Future[dict[str, Any]]
    self._started = False

  def start(self) -> None:
    """Asks for the pictures; raises RequestError if they are refused."""
    self._future = self._service.submit(self._asked, self._content, self._show)
    self._future.add_done_callback(lambda _: self._put(None))

  def _content(self, result: results.Result) -> dict[str, Any]:
    """Returns the answer, as OpenAI has it."""
    assert result.image_index is not None
    pictures = []
    for column, index in enumerate(result.image_index[0].tolist()):
      picture = {'b64_json': _base64(result.png(0, column)), 'image_index': index}
      if result.scores is not None:
        picture['score'] = float(result.scores[0, column])
      pictures.append(picture)
    content = {
      'created': int(time.time()),
      'model': self._service.offer.model,
      'seed': self._asked.seed,
      'size': self._service.offer.pixels(self._asked.upscale),
      'output_format': 'png',
      'data': pictures,
    }
    if found := self._service.warnings(self._asked):
      content['warnings'] = found
    return content

  def _show(self, index: int, preview: running_batch.Preview) -> None:
    self._put((index, preview))

  def _put(self, event: _Event) -> None:
    """Adds an event, from any thread."""
    with contextlib.suppress(RuntimeError):  # The loop is closed, and nobody waits any more.
      self._loop.call_soon_threadsafe(self._events.put_nowait, event)

  async def __call__(self, scope: types.Scope, receive: types.Receive, send: types.Send) -> None:
    """Sends the answer."""
    watch = asyncio.create_task(self._watch(receive))
    try:
      await self._send_or_fail(send)
    finally:
      self._future.cancel()
      watch.cancel()

  async def _send_or_fail(self, send: types.Send) -> None:
    """Sends the answer, or what went wrong."""
    limit = self._service.limits.seconds
    try:
      async with asyncio.timeout(limit):
        await self._send(send)
      return
    except concurrent.futures.CancelledError:
      return  # The client is gone.
    except TimeoutError:
      found = image_requests.RequestError(
        f'the pictures took longer than {limit:g} seconds; ask for fewer, or try again later',
        503,
        code='timeout',
      )
    except OSError:
      return  # The client is gone.
    except image_requests.RequestError as error:
      found = error
    except Exception:
      traceback.print_exc(file=sys.stderr)
      found = _internal()
    async with asyncio.timeout(_ERROR_SECONDS):  # The client may not read.
      await self._send_error(send, found)

  async def _watch(self, receive: types.Receive) -> None:
    """Withdraws the pictures once the client is gone."""
    while (await receive())['type'] != 'http.disconnect':
      pass
    self._future.cancel()

  async def _send(self, send: types.Send) -> None:
    raise NotImplementedError

  async def _send_error(self, send: types.Send, error: image_requests.RequestError) -> None:
    """Sends an error, unless the answer has begun."""
    if not self._started:
      self._started = True
      await _send_json(send, _error(error), error.status)


class _Whole(_Answer):
  """Answers with one JSON object."""

  async def _send(self, send: types.Send) -> None:
    while await self._events.get() is not None:
      pass
    content = self._future.result(0)
    self._started = True
    await _send_json(send, content, 200)


class _Stream(_Answer):
  """Answers with events: one for each preview, and one for each picture."""

  async def _send(self, send: types.Send) -> None:
    count: dict[int, int] = {}
    while True:
      try:
        event = await asyncio.wait_for(self._events.get(), _QUIET_SECONDS)
      except TimeoutError:
        await self._send_text(send, ': waiting\n\n')
        continue
      if event is None:
        break
      index, preview = event
      png = await asyncio.to_thread(_preview_png, preview)
      count[index] = count.get(index, -1) + 1
      await self._send_event(
        send,
        'image_generation.partial_image',
        b64_json=_base64(png),
        partial_image_index=count[index],
        image_index=index,
        rows=preview.rows,
        of_rows=preview.of_rows,
      )
    content = self._future.result(0)
    shared = {name: value for name, value in content.items() if name != 'data'}
    for picture in content['data']:
      await self._send_event(send, 'image_generation.completed', **shared, **picture)
    await self._send_text(send, '', more=False)

  async def _send_event(self, send: types.Send, kind: str, **content: Any) -> None:
    content = {'type': kind, 'created_at': int(time.time()), **content}
    await self._send_text(send, f'event: {kind}\ndata: {json.dumps(content)}\n\n')

  async def _send_text(self, send: types.Send, text: str, more: bool = True) -> None:
    if not self._started:
      self._started = True
      headers = {'content-type': 'text/event-stream; charset=utf-8', 'cache-control': 'no-store'}
      await _send_start(send, 200, headers)
    await send({'type': 'http.response.body', 'body': text.encode(), 'more_body': more})

  async def _send_error(self, send: types.Send, error: image_requests.RequestError) -> None:
    if not self._started:
      await super()._send_error(send, error)
      return
    await self._send_event(send, 'error', **_error(error))
    await self._send_text(send, '', more=False)


async def _send_start(send: types.Send, status: int, headers: dict[str, str]) -> None:
  encoded = [(name.encode(), value.encode()) for name, value in headers.items()]
  await send({'type': 'http.response.start', 'status': status, 'headers': encoded})


async def _send_json(send: types.Send, content: dict[str, Any], status: int) -> None:
  body = json.dumps(content).encode()
  headers = {'content-type': 'application/json', 'content-length': str(len(body))}
  await _send_start(send, status, headers | _retry(status))
  await send({'type': 'http.response.body', 'body': body})


def _preview_png(preview: running_batch.Preview) -> bytes:
  return images_lib.png(preview.image, {'rows': f'{preview.rows} of {preview.of_rows}'})


def _base64(content: bytes) -> str:
  return base64.b64encode(content).decode()


def _error(error: image_requests.RequestError) -> dict[str, Any]:
  """Returns an error as OpenAI has it."""
  kind = _KINDS.get(error.status, 'invalid_request_error')
  return {'error': {'message': str(error), 'type': kind, 'param': error.field, 'code': error.code}}


def _internal() -> image_requests.RequestError:
  return image_requests.RequestError(
    'an error of the server, which its log describes', 500, code='internal_error'
  )


def _retry(status: int) -> dict[str, str]:
  return {'retry-after': str(_RETRY_SECONDS)} if status in (429, 503) else {}


def _refusal(
  error: image_requests.RequestError, headers: dict[str, str] | None = None
) -> responses.Response:
  """Returns the answer to a refused request; after it, the connection ends.

  What is left of the body has not been read.
  """
  headers = {'connection': 'close', **_retry(error.status), **(headers or {})}
  return responses.JSONResponse(_error(error), error.status, headers)


async def _refuse(request: requests.Request, error: Exception) -> responses.Response:
  assert isinstance(error, image_requests.RequestError)
  return _refusal(error)


async def _refuse_route(request: requests.Request, error: Exception) -> responses.Response:
  """Answers requests for what is not there."""
  assert isinstance(error, exceptions.HTTPException)
  path = checks.shown_as_json(request.scope['path'])
  message = {
    404: f'{path} is not here; pictures are drawn by POST {GENERATIONS}',
    405: f'{path} does not take the method {checks.shown_as_json(request.method)}',
  }.get(error.status_code, error.detail)
  return _refusal(
    image_requests.RequestError(message, error.status_code), dict(error.headers or {})
  )


async def _nobody(request: requests.Request, error: Exception) -> responses.Response:
  return responses.Response(status_code=400)  # The client is gone before its request was read.


async def _fail(request: requests.Request, error: Exception) -> responses.Response:
  return _refusal(_internal())


class _Protocol(h11_impl.H11Protocol):
  """HTTP/1.1 that closes connections on which no whole request head arrives in time."""

  head_seconds = 20.0
  _head_timer: asyncio.TimerHandle | None = None

  def connection_made(self, transport) -> None:
    super().connection_made(transport)
    self._expect_head()

  def data_received(self, data: bytes) -> None:
    super().data_received(data)
    if self._is_answering():
      self._stop_timer()
    elif self._head_timer is None:
      self._expect_head()

  def connection_lost(self, exc) -> None:
    self._stop_timer()
    super().connection_lost(exc)

  def _is_answering(self) -> bool:
    return self.cycle is not None and not self.cycle.response_complete

  def _expect_head(self) -> None:
    self._head_timer = self.loop.call_later(self.head_seconds, self._give_up)

  def _give_up(self) -> None:
    self._head_timer = None
    if not self._is_answering() and not self.transport.is_closing():
      self.transport.close()

  def _stop_timer(self) -> None:
    if self._head_timer is not None:
      self._head_timer.cancel()
      self._head_timer = None


class Server(uvicorn.Server):
  """A server that finishes what was accepted when it is asked to stop.

  SIGTERM and SIGINT stop it: it refuses new requests, and ends once all answers are sent or
  `stop_seconds` have passed. A second signal ends it without waiting for them.
  """

  def __init__(
    self,
    service: image_service.ImageService,
    stop_seconds: float = 60.0,
    ready: Callable[[], None] = lambda: None,
  ):
    """Prepares the server.

    Args:
      service: draws the pictures.
      stop_seconds: time that accepted requests have after a signal.
      ready: called once clients can connect.
    """
    self._service = service
    self._ready = ready
    protocol = type('Protocol', (_Protocol,), {'head_seconds': service.limits.body_seconds})
    super().__init__(
      uvicorn.Config(
        app(service),
        http=protocol,
        ws='none',
        lifespan='off',
        log_level='warning',
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=service.limits.connections,
        backlog=_CONNECTION_BACKLOG,
        timeout_graceful_shutdown=max(1, round(stop_seconds)),
      )
    )

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    """Begins to accept connections."""
    await super().startup(sockets)
    self._ready()

  def handle_exit(self, sig: int, frame: Any) -> None:
    """Stops at a signal."""
    if self.should_exit:
      self.force_exit = True
    self._service.stop_accepting()
    self.should_exit = True

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    """Handles signals while the server runs; a graceful stop is a success."""
    if threading.current_thread() is not threading.main_thread():
      yield
      return
    before = {kind: signal.signal(kind, self.handle_exit) for kind in _signals()}
    try:
      yield
    finally:
      for kind, handler in before.items():
        signal.signal(kind, handler)


def _signals() -> tuple[signal.Signals, ...]:
  return signal.SIGINT, signal.SIGTERM


def serve(
  service: image_service.ImageService,
  listening: socket.socket,
  stop_seconds: float = 60.0,
  ready: Callable[[], None] = lambda: None,
) -> None:
  """Answers requests until a signal stops the server; then closes the service.

  Args:
    service: draws the pictures.
    listening: a result of `addresses.listen`.
    stop_seconds: an argument of Server.
    ready: an argument of Server.
  """
  try:
    asyncio.run(Server(service, stop_seconds, ready).serve([listening]))
  finally:
    service.close(cancel=True)

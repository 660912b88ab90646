"""The server: pictures of `generate` for everybody who asks, and one line for what is wrong."""

import asyncio
import concurrent.futures
import contextlib
import importlib.util
import io
import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.sampling import slots

_SPEC = importlib.util.spec_from_file_location(
  'http_client', pathlib.Path(__file__).parent / 'http_client.py'
)
http_client = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(http_client)

pytest.importorskip('uvicorn', reason='uvicorn is not installed')
pytest.importorskip('starlette', reason='starlette is not installed')

from parti_jax.serving import addresses  # noqa: E402
from parti_jax.serving import http_server  # noqa: E402

pixels, wait_until, head = http_client.pixels, http_client.wait_until, http_client.head


class Running(http_client.Client):
  """A server in a thread, and a client of it."""

  def __init__(self, service, stop_seconds=60.0):
    self.service = service
    ready = threading.Event()
    listening = addresses.listen('127.0.0.1', 0)
    super().__init__(listening.getsockname()[1])
    self.server = http_server.Server(service, stop_seconds, ready.set)
    self.thread = threading.Thread(
      target=lambda: asyncio.run(self.server.serve([listening])), daemon=True
    )
    self.thread.start()
    assert ready.wait(60)

  def signal(self):
    """Does what SIGTERM does."""
    self.server.handle_exit(signal.SIGTERM, None)

  def close(self):
    self.signal()
    self.server.force_exit = True
    self.thread.join(60)
    assert not self.thread.is_alive()


@pytest.fixture
def running(service_of, gate):
  """Returns a function that starts a server with limits; the servers are stopped in the end."""
  with contextlib.ExitStack() as stack:

    def start(stop_seconds=60.0, **limits):
      found = Running(service_of(**limits), stop_seconds)
      stack.callback(found.close)
      return found

    yield start
    gate.set()


def check_picture(picture, result, column, tmp_path):
  """Checks that a picture of an answer is the file that the command writes."""
  image, text = pixels(picture)
  assert np.abs(image.astype(int) - result.images[0, column]).max() <= 1
  (path,) = [path for path in result.save(tmp_path) if path.stem.endswith(f'_{column}')]
  with http_client.Image.open(path) as file:
    file.load()
    assert text == file.text


def test_the_pictures_are_those_of_the_command(running, served_model, tmp_path):
  server = running()
  settings = {'guidance_scale': 3.0, 'temperature': 0.8, 'top_k': 9, 'top_p': 0.9}
  status, content = server.draw(prompt='red apple', n=3, seed=7, user='me', **settings)
  assert status == 200
  result = served_model.generate('red apple', 3, seed=7, **settings)
  assert [picture['image_index'] for picture in content['data']] == [0, 1, 2]
  for column, picture in enumerate(content['data']):
    check_picture(picture, result, column, tmp_path)
  assert (content['seed'], content['size'], content['model']) == (7, '16x16', 'tiny')
  assert 'warnings' not in content
  # Without a seed, the answer tells the one that was drawn.
  _, content = server.draw(prompt='red apple')
  drawn = served_model.generate('red apple', 1, seed=content['seed'])
  check_picture(content['data'][0], drawn, 0, tmp_path)


def test_many_clients_at_once_get_their_own_pictures(running, served_model, tmp_path):
  server = running()
  prompts = ['red apple', 'green apple', 'blue ball', 'waving hand']
  ask = lambda seed: server.draw(prompt=prompts[seed % 4], seed=seed, n=1 + seed % 2)
  with concurrent.futures.ThreadPoolExecutor(20) as threads:
    answers = list(threads.map(ask, range(20)))
  for seed, (status, content) in enumerate(answers):
    assert status == 200
    result = served_model.generate(prompts[seed % 4], 1 + seed % 2, seed=seed, batch_size=2)
    for column, picture in enumerate(content['data']):
      check_picture(picture, result, column, tmp_path)
  wait_until(lambda: server.service.pending == 0)


def test_a_stream_shows_rows_as_they_come(running):
  server = running()
  events = server.events(prompt='red apple', seed=3, n=2)
  names = [name for name, _ in events]
  assert names == ['image_generation.partial_image'] * 6 + ['image_generation.completed'] * 2
  assert [name for name, _ in events] == [content['type'] for _, content in events]
  _, whole = server.draw(prompt='red apple', seed=3, n=2)
  for index in range(2):
    shown = [content for _, content in events[:6] if content['image_index'] == index]
    assert [content['rows'] for content in shown] == [1, 2, 3]
    assert [content['partial_image_index'] for content in shown] == [0, 1, 2]
    for content in shown:
      image, _ = pixels(content)
      assert (image[4 * content['rows'] :] == slots.BLANK).all()
      assert (image[: 4 * content['rows']] != slots.BLANK).any()
    assert events[6 + index][1]['b64_json'] == whole['data'][index]['b64_json']
    assert events[6 + index][1]['seed'] == 3
  events = server.events(prompt='red apple', seed=3, partial_images=1)
  assert [content.get('rows') for _, content in events] == [2, None]
  assert [name for name, _ in server.events(prompt='a', partial_images=0)] == names[-1:]


def test_pictures_are_ranked_and_enlarged(running, served_model):
  server = running()
  status, content = server.draw(prompt='red apple', seed=5, n=4, rank=True, size='32x32')
  assert status == 200 and content['size'] == '32x32'
  result = served_model.generate('red apple', 4, seed=5, rank=True, upscale=True)
  assert [picture['image_index'] for picture in content['data']] == result.image_index[0].tolist()
  for column, picture in enumerate(content['data']):
    image, text = pixels(picture)
    assert image.shape == (32, 32, 3)
    assert np.abs(image.astype(int) - result.upscaled[0, column]).max() <= 1
    assert text == result.metadata(0, column) | {'software': text['software']}
    assert picture['score'] == pytest.approx(result.scores[0, column], abs=1e-5)


def test_what_a_prompt_is_too_long_for_is_said(running):
  _, content = running().draw(prompt='red apple ' * 10, rank=True)
  of_model, of_ranker = content['warnings']
  assert 'longer than the 24 text tokens of the model; left out:' in of_model
  assert "the ranker's text" in of_ranker


def test_a_negative_prompt_is_that_of_the_command(running, served_model, tmp_path):
  server = running()
  status, content = server.draw(
    prompt='red apple', negative_prompt='blue ball', seed=2, n=2, guidance_scale=4
  )
  assert status == 200
  result = served_model.generate('red apple', 2, seed=2, negative='blue ball', guidance_scale=4.0)
  for column, picture in enumerate(content['data']):
    check_picture(picture, result, column, tmp_path)
  status, content = server.draw(prompt='red apple', negative_prompt='a', guidance_scale=1)
  assert status == 400 and 'other side of guidance' in content['error']['message']


def png_of(pixels):
  content = io.BytesIO()
  http_client.Image.fromarray(pixels).save(content, 'PNG')
  return content.getvalue()


@pytest.mark.parametrize('how', ['mask', 'keep', 'vary'])
def test_edits_are_those_of_the_command(running, served_model, tmp_path, how):
  server = running()
  picture = served_model.generate('blue ball', 1, seed=1).images[0, 0]
  files, fields, arguments = {'image': png_of(picture)}, {}, {}
  if how == 'mask':
    mask = np.zeros([16, 16], np.uint8)
    mask[4:12, 4:8] = 255
    files['mask'], arguments['mask'] = png_of(mask), mask
  else:
    fields[how] = arguments[how] = {'keep': 'left:0.5', 'vary': 0.5}[how]
  status, content = server.edit(files, prompt='red apple', n=3, seed=5, **fields)
  assert status == 200
  result = served_model.generate('red apple', 3, seed=5, image=picture, **arguments)
  assert result.kept.any() and not result.kept.all()
  for column, drawn in enumerate(content['data']):
    check_picture(drawn, result, column, tmp_path)


def test_edits_that_are_refused(running):
  server = running(files=20_000)
  picture = png_of(np.zeros([16, 16, 3], np.uint8))
  for files, fields, status, message in (
    ({'image': picture}, {'prompt': 'a'}, 400, 'image needs one of mask'),
    ({}, {'prompt': 'a', 'keep': 'top:0.5'}, 400, 'image is missing'),
    ({'image': picture, 'mask': b'?'}, {'prompt': 'a'}, 400, 'mask: unknown picture format'),
    ({'image': picture, 'other': picture}, {'prompt': 'a'}, 400, 'not a file of an edit'),
    ({'image': picture, 'mask': picture, 'c': picture}, {'prompt': 'a'}, 400, 'form'),
    ({'image': b'x' * 20_000}, {'prompt': 'a'}, 413, 'longer than 20,000 bytes'),
    ({'image': picture}, {f'a{n}': 1 for n in range(70)}, 400, 'form'),
  ):
    found, content = server.edit(files, **fields)
    assert found == status and message in content['error']['message'], content
  for kind, body in (('multipart/form-data', b'x'), ('multipart/form-data; boundary=a', b'x')):
    status, _, answer = server.request('POST', http_client.EDITS, body, {'Content-Type': kind})
    assert status == 400 and len(json.loads(answer)['error']['message'].splitlines()) == 1
  status, _, _ = server.request(
    'POST', http_client.EDITS, '{}', {'Content-Type': 'application/json'}
  )
  assert status == 415
  assert server.draw(prompt='red apple')[0] == 200


def test_the_model_and_its_health_are_told(running, gate):
  server = running()
  status, models = server.get('/v1/models')
  assert status == 200
  (model,) = models['data']
  assert model['id'] == 'tiny' and model['sizes'] == ['16x16', '32x32'] and model['rank'] is True
  assert server.get('/v1/models/tiny') == (200, model)
  assert server.get('/v1/models/a/../b')[0] == 404
  assert server.get('/health') == (
    200,
    {'status': 'ok', 'model': 'tiny', 'slots': 4, 'running': 0, 'waiting': 0, 'pending': 0},
  )
  gate.clear()
  with concurrent.futures.ThreadPoolExecutor() as threads:
    answer = threads.submit(server.draw, prompt='red apple', n=3)
    wait_until(lambda: server.get('/health')[1]['pending'] == 3)
    gate.set()
    assert answer.result()[0] == 200
  # Whoever has an answer no longer counts.
  assert server.get('/health')[1]['pending'] == 0


@pytest.mark.parametrize('stream', [False, True])
def test_a_client_that_goes_away_frees_its_places(running, gate, stream):
  server = running(queue=4)
  gate.clear()
  body = json.dumps({'prompt': 'red apple', 'n': 4, 'stream': stream}).encode()
  with server.connect() as gone, server.connect() as also_gone:
    for connection in (gone, also_gone):
      connection.sendall(head(len(body)) + body)
    wait_until(lambda: server.service.pending == 8)
    status, content = server.draw(prompt='red apple')
    assert status == 429 and content['error']['code'] == 'queue_full'
    assert '8 pictures are being drawn or wait, of at most 8' in content['error']['message']
  wait_until(lambda: server.service.pending == 0)
  gate.set()
  assert server.draw(prompt='red apple', n=4)[0] == 200
  sampler = server.service.sampler
  wait_until(lambda: (sampler.running, sampler.waiting) == (0, 0))


def test_refused_requests_say_when_to_come_again(running, gate):
  server = running(queue=4)
  gate.clear()
  with concurrent.futures.ThreadPoolExecutor() as threads:
    answers = [threads.submit(server.draw, prompt='red apple', n=4) for _ in range(2)]
    wait_until(lambda: server.service.pending == 8)
    status, headers, _ = server.request(
      'POST', http_client.PATH, '{"prompt": "a"}', {'Content-Type': 'application/json'}
    )
    assert status == 429 and int(headers['retry-after']) > 0
    gate.set()
    assert [answer.result()[0] for answer in answers] == [200, 200]


def test_told_to_stop_it_finishes_what_it_accepted_and_refuses_the_rest(running, gate):
  server = running()
  gate.clear()
  body = b'{"prompt": "red apple", "stream": true, "seed": 1}'
  with concurrent.futures.ThreadPoolExecutor() as threads, server.connect() as streaming:
    answer = threads.submit(server.draw, prompt='red apple', n=3, seed=1)
    streaming.sendall(head(len(body)) + body)
    wait_until(lambda: server.service.pending == 4)
    server.service.stop_accepting()
    status, content = server.draw(prompt='red apple')
    assert status == 503 and content['error']['message'] == 'the server is stopping'
    assert server.get('/health')[0] == 503
    server.signal()

    def refused():
      try:
        server.get('/health')
      except OSError:
        return True
      return False

    wait_until(refused)
    assert server.thread.is_alive()
    gate.set()
    assert answer.result()[0] == 200
    received = b''
    while part := streaming.recv(1 << 16):
      received += part
    assert b'image_generation.completed' in received
  server.thread.join(60)
  assert not server.thread.is_alive()


def test_told_to_stop_it_does_not_wait_for_ever(running, gate):
  server = running(stop_seconds=1.0)
  gate.clear()
  with server.connect() as connection:
    connection.sendall(head(23) + b'{"prompt": "red apple"}')
    wait_until(lambda: server.service.pending == 1)
    server.signal()
    server.thread.join(60)
    assert not server.thread.is_alive() and server.service.pending == 0


def test_pictures_that_take_too_long_are_given_up(running, gate):
  server = running(seconds=0.3)
  gate.clear()
  status, content = server.draw(prompt='red apple', n=2)
  assert status == 503 and 'took longer than 0.3 seconds' in content['error']['message']
  assert content['error']['code'] == 'timeout'
  wait_until(lambda: server.service.pending == 0)


def test_an_error_of_the_server_is_one_line_and_the_next_request_works(
  running, monkeypatch, capsys
):
  server = running()
  server.draw(prompt='red apple')

  def fail(*unused_args, **unused_kwargs):
    raise RuntimeError('secret of the machine')

  with monkeypatch.context() as patch:
    patch.setattr(slots, 'encode', fail)
    status, content = server.draw(prompt='red apple')
    assert status == 500 and 'secret' not in json.dumps(content)
    assert content['error']['code'] == 'internal_error'
    patch.setattr(type(server.service), 'submit', fail)
    status, content = server.draw(prompt='red apple')
    assert status == 500 and 'secret' not in json.dumps(content)
  assert 'secret of the machine' in capsys.readouterr().err
  assert server.draw(prompt='red apple')[0] == 200
  assert server.service.pending == 0


def test_an_error_in_a_stream_is_an_event(running, monkeypatch):
  server = running()

  def fail(*unused_args, **unused_kwargs):
    raise RuntimeError('secret of the machine')

  monkeypatch.setattr(slots, 'detokenize', fail)
  *previews, (name, content) = server.events(prompt='red apple')
  assert len(previews) == 2
  assert name == 'error' and content['error']['type'] == 'server_error'
  assert 'secret' not in json.dumps(content)


@pytest.mark.parametrize(
  'method, path, body, headers, status',
  [
    ('GET', '/', None, {}, 404),
    ('GET', '/etc/passwd', None, {}, 404),
    ('GET', '/static/../../../../etc/passwd', None, {}, 404),
    ('GET', '/%2e%2e/%2e%2e/etc/passwd', None, {}, 404),
    ('GET', '//etc/passwd', None, {}, 404),
    ('GET', '/v1/models/..%2f..%2f..%2fetc%2fpasswd', None, {}, 404),
    ('GET', '/health/', None, {}, 404),
    ('GET', '/v1/images/generations', None, {}, 405),
    ('DELETE', '/v1/models', None, {}, 405),
    ('POST', '/v1/images/generations', '{"prompt": "a"}', {}, 415),
    ('POST', '/v1/images/generations', '{"prompt": "a"}', {'Content-Type': 'text/plain'}, 415),
    ('POST', '/v1/images/generations', b'\xff', {'Content-Type': 'application/json'}, 400),
    ('POST', '/v1/images/generations', '{}', {'Content-Type': 'application/json'}, 400),
    ('POST', '/v1/images/generations', b' ' * 70_000, {'Content-Type': 'application/json'}, 413),
  ],
)
def test_requests_for_what_is_not_there(running, method, path, body, headers, status):
  found, _, answer = running().request(method, path, body, headers)
  assert found == status
  message = json.loads(answer)['error']['message']
  assert len(message.splitlines()) == 1 and message and b'root:' not in answer


def test_bytes_that_are_no_request(running):
  """None of them harms the server; those that never end are closed."""
  server = running(body_seconds=0.5, body=1000)
  chunk = b'%x\r\n' % 600 + b' ' * 600 + b'\r\n'
  attacks = {
    'garbage': b'\x00\x01\x02\xff' * 300,
    'tls': b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03' + b'\x11' * 300,
    'traversal': b'GET /../../../../etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    'absolute': b'GET file:///etc/passwd HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    'long head': b'GET / HTTP/1.1\r\nHost: x\r\nA: ' + b'a' * 200_000 + b'\r\n\r\n',
    'two lengths': head(1, **{'Transfer-Encoding': 'chunked'}) + b'0\r\n\r\n',
    'negative length': head(-1),
    'huge length': head(10**12) + b'{"prompt": "a"}',
    'long chunks': (
      b'POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n'
      b'Transfer-Encoding: chunked\r\n\r\n' + 3 * chunk
    ),
    'no body': head(100) + b'{"prompt": ',
    'half a head': b'POST /v1/images/generations HTTP/1.1\r\nHos',
    'silence': b'',
    'bad host': b'GET /nothing HTTP/1.1\r\nHost: [::\r\nConnection: close\r\n\r\n',
    'null in path': b'GET /%00 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    'splitting': b'GET /a%0d%0aSet-Cookie:%20x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n',
    'upgrade': (
      b'GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n'
      b'Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n'
    ),
  }
  with concurrent.futures.ThreadPoolExecutor(len(attacks)) as threads:
    answers = dict(zip(attacks, threads.map(server.raw, attacks.values())))
  for name, answer in answers.items():
    status = answer.partition(b'\r\n')[0]
    assert answer == b'' or status.startswith(b'HTTP/1.1 4'), (name, answer[:200])
    assert b'root:' not in answer and b'Set-Cookie' not in answer.partition(b'\r\n\r\n')[0], name
  assert answers['no body'].startswith(b'HTTP/1.1 408')
  assert answers['long chunks'].startswith(b'HTTP/1.1 413')
  assert answers['huge length'].startswith(b'HTTP/1.1 413')
  assert answers['silence'] == answers['half a head'] == b''
  assert server.draw(prompt='red apple')[0] == 200
  wait_until(lambda: not server.server.server_state.connections)


def test_connections_beyond_the_limit_are_refused(running):
  server = running(connections=3)
  with server.connect(), server.connect(), server.connect():
    time.sleep(0.1)
    assert server.request('GET', '/health')[0] == 503
  wait_until(lambda: server.request('GET', '/health')[0] == 200)


def test_an_address_that_is_taken_is_named():
  with addresses.listen('127.0.0.1', 0) as taken:
    taken.listen()
    port = taken.getsockname()[1]
    with pytest.raises(UserError, match=f'--port={port}: cannot listen there'):
      addresses.listen('127.0.0.1', port)
  with pytest.raises(UserError, match='--host=no.such.host.invalid'):
    addresses.listen('no.such.host.invalid', 0)


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--port=70000'], '--port=70000 must be a whole number from 0 to 65535'),
    (['--batch_size=0'], '--batch_size=0'),
    (['--queue=2'], '--queue=2 is less than --max_images=16'),
    (['--timeout=0'], '--timeout=0 leaves no time'),
    (['--max_prompt=0'], '--max_prompt=0'),
    (['--temperature=-1'], 'temperature=-1'),
    (['--host=256.256.256.256'], '--host=256.256.256.256'),
    (['--port=0', '--model=nowhere'], 'nowhere'),
  ],
)
def test_bad_flags_of_the_command(flags, message, capsys):
  assert main.main(['serve', *flags]) == 2
  error = capsys.readouterr().err
  assert message in error and len(error.splitlines()) == 1


def test_without_the_extra_the_command_names_it(monkeypatch, capsys):
  for name in [*sys.modules]:
    if name.partition('.')[0] == 'uvicorn' or name == 'parti_jax.serving.http_server':
      monkeypatch.delitem(sys.modules, name)

  class Missing:
    def find_spec(self, name, path=None, target=None):
      if name == 'uvicorn':
        raise ModuleNotFoundError(f'No module named {name!r}', name=name)

  monkeypatch.setattr(sys, 'meta_path', [Missing(), *sys.meta_path])
  monkeypatch.delattr('parti_jax.serving.http_server')
  assert main.main(['serve']) == 2
  error = capsys.readouterr().err
  assert 'pip install "parti_jax[serve]"' in error and len(error.splitlines()) == 1


@pytest.mark.process
def test_the_command_serves_until_sigterm(served_folder, served_model, tmp_path):
  command = [sys.executable, '-P', '-m', 'parti_jax.cli.main', 'serve', '--port=0']
  process = subprocess.Popen(
    [*command, f'--model={served_folder}', '--batch_size=2'],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    cwd=tmp_path,
  )
  try:
    line = process.stdout.readline()
    assert line.startswith('tiny draws at http://127.0.0.1:'), process.stderr.read()
    client = http_client.Client(int(line.split(':')[-1].split('/')[0]))
    status, content = client.draw(prompt='red apple', seed=7)
    assert status == 200
    check_picture(content['data'][0], served_model.generate('red apple', 1, seed=7), 0, tmp_path)
    with client.connect() as idle:
      # One that is accepted just before the signal is answered.
      body = b'{"prompt": "red apple", "n": 4, "stream": true}'
      idle.sendall(head(len(body)) + body)
      assert idle.recv(100).startswith(b'HTTP/1.1 200')
      process.send_signal(signal.SIGTERM)
      received = b''
      while part := idle.recv(1 << 16):
        received += part
      assert received.count(b'event: image_generation.completed') == 4
    assert process.wait(60) == 0
    assert process.stderr.read() == ''
  finally:
    process.kill()
    process.communicate()
  with pytest.raises(OSError):
    socket.create_connection(('127.0.0.1', client.port), 5)


@pytest.mark.slow
def test_two_hundred_clients_of_all_kinds(running, served_model):
  """Each gets what it asked for; those that go away, or ask for nonsense, harm nobody."""
  server = running(queue=400, images=4)
  prompts = ['red apple', 'green apple', 'blue ball', 'waving hand']
  wanted = served_model.generate(prompts, 4, seed=9).images

  def client(number):
    prompt, kind = prompts[number % 4], number % 5
    if kind == 0:  # Goes away at some time.
      body = json.dumps({'prompt': prompt, 'n': 4, 'stream': number % 2 == 0}).encode()
      with server.connect() as connection:
        connection.sendall(head(len(body)) + body)
        time.sleep(0.01 * (number % 40))
      return True
    if kind == 1:
      return server.draw(prompt=prompt, n=number)[0] == 400
    if kind == 2:
      events = server.events(prompt=prompt, seed=9, n=2)
      pictures = [content for name, content in events if name.endswith('completed')]
      assert len(events) > len(pictures) == 2
    else:
      status, content = server.draw(prompt=prompt, seed=9, n=3)
      assert status == 200
      pictures = content['data']
    return all(
      np.abs(pixels(picture)[0].astype(int) - wanted[number % 4, column]).max() <= 1
      for column, picture in enumerate(pictures)
    )

  with concurrent.futures.ThreadPoolExecutor(200) as threads:
    assert all(threads.map(client, range(5, 205)))
  wait_until(lambda: server.service.pending == 0)
  sampler = server.service.sampler
  wait_until(lambda: (sampler.running, sampler.waiting) == (0, 0))
  wait_until(lambda: not server.server.server_state.connections)

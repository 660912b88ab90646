"""Asks a server on this machine, also in ways that no library would."""

import base64
import contextlib
import http.client
import io
import json
import socket
import time

import numpy as np
from PIL import Image

PATH = '/v1/images/generations'
EDITS = '/v1/images/edits'


class Client:
  """Asks the server at a port."""

  def __init__(self, port):
    self.port = port

  def request(self, method, path, body=None, headers=None):
    """Returns the status, the headers and the body of an answer."""
    with contextlib.closing(http.client.HTTPConnection('127.0.0.1', self.port, 60)) as connection:
      connection.request(method, path, body, headers or {})
      answer = connection.getresponse()
      return answer.status, dict(answer.getheaders()), answer.read()

  def get(self, path):
    status, _, body = self.request('GET', path)
    return status, json.loads(body)

  def draw(self, **fields):
    """Returns the status and the content of an answer that isn't a stream."""
    status, headers, body = self.request(
      'POST', PATH, json.dumps(fields), {'Content-Type': 'application/json'}
    )
    assert headers['content-type'] == 'application/json'
    return status, json.loads(body)

  def edit(self, files, **fields):
    """Returns the status and the content of an answer to a form with files."""
    mark = 'a-mark-that-no-file-has'
    parts = [
      (f'Content-Disposition: form-data; name="{name}"', str(value).encode())
      for name, value in fields.items()
    ] + [
      (f'Content-Disposition: form-data; name="{name}"; filename="../../{name}.png"', data)
      for name, data in files.items()
    ]
    body = b''.join(
      f'--{mark}\r\n{header}\r\n\r\n'.encode() + data + b'\r\n' for header, data in parts
    )
    status, _, answer = self.request(
      'POST',
      EDITS,
      body + f'--{mark}--\r\n'.encode(),
      {'Content-Type': f'multipart/form-data; boundary={mark}'},
    )
    return status, json.loads(answer)

  def events(self, **fields):
    """Returns the events of a stream, which are (name, content)."""
    status, headers, body = self.request(
      'POST', PATH, json.dumps(fields | {'stream': True}), {'Content-Type': 'application/json'}
    )
    assert status == 200 and headers['content-type'].startswith('text/event-stream')
    found = []
    for part in body.decode().split('\n\n'):
      if part and not part.startswith(':'):
        name, data = part.split('\n')
        found.append((name.removeprefix('event: '), json.loads(data.removeprefix('data: '))))
    return found

  def connect(self):
    """Returns a socket, closed by its context."""
    return contextlib.closing(socket.create_connection(('127.0.0.1', self.port), 60))

  def raw(self, content):
    """Returns what the server answers to bytes until it closes the connection."""
    with self.connect() as connection:
      found = b''
      with contextlib.suppress(ConnectionError):
        connection.sendall(content)
        while part := connection.recv(1 << 16):
          found += part
      return found


def head(length, path=PATH, **more):
  """Returns the head of a request whose body has this length."""
  lines = [f'POST {path} HTTP/1.1', 'Host: here', 'Content-Type: application/json']
  lines += [f'Content-Length: {length}'] + [f'{name}: {value}' for name, value in more.items()]
  return '\r\n'.join(lines).encode() + b'\r\n\r\n'


def pixels(picture):
  """Returns the pixels and the metadata of a picture of an answer."""
  with Image.open(io.BytesIO(base64.b64decode(picture['b64_json']))) as image:
    image.load()
    return np.asarray(image), image.text


def wait_until(condition, seconds=60):
  """Waits until a condition holds."""
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'nothing happened'
    time.sleep(0.01)

"""Addresses to listen on."""

from __future__ import annotations

import socket

from parti_jax.core.errors import UserError


def listen(host: str, port: int) -> socket.socket:
  """Takes a port, on which nobody is answered yet.

  Args:
    host: address or name to listen on.
    port: the port; 0 chooses a free one.

  Raises:
    UserError: if the port is taken or the address is not this machine's.
  """
  try:
    family, kind, protocol, _, address = socket.getaddrinfo(
      host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    found = socket.socket(family, kind, protocol)
    try:
      found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
      found.bind(address)
    except BaseException:
      found.close()
      raise
  except (OSError, UnicodeError) as error:
    reason = getattr(error, 'strerror', None) or error
    raise UserError(
      f'--host={host} --port={port}: cannot listen there ({reason}); choose another port or address'
    ) from error
  return found


def url(listening: socket.socket) -> str:
  """Returns the URL of a result of `listen`."""
  host, port = listening.getsockname()[:2]
  return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'

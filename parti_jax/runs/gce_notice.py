"""Watches for Google Compute Engine's notice that it is about to preempt this virtual machine.

The metadata server reports it, to TPU VMs too, as soon as the 30 seconds of warning begin. SIGTERM
comes later, when the system's shutdown reaches the process.
"""

from __future__ import annotations

import http.client
import os
import pathlib
import threading
import time
from collections.abc import Callable

_PATH = '/computeMetadata/v1/instance/preempted'
_PRODUCT = pathlib.Path('/sys/class/dmi/id/product_name')
_WAIT_SECONDS = 300


def watch(notify: Callable[[str], None]) -> None:
  """Starts a thread that calls `notify` with the notice's source; does nothing outside of GCE.

  GCE_METADATA_HOST, which Google's libraries read too, replaces metadata.google.internal.
  """
  host = os.environ.get('GCE_METADATA_HOST')
  if host is None and not _on_gce():
    return
  threading.Thread(
    target=_watch, args=(host or 'metadata.google.internal', notify), daemon=True, name='gce_notice'
  ).start()


def _on_gce() -> bool:
  try:
    return _PRODUCT.read_text(encoding='utf-8').strip() in ('Google', 'Google Compute Engine')
  except OSError:
    return False


def _watch(host: str, notify: Callable[[str], None]) -> None:
  wait = ''
  while True:
    try:
      status, etag, text = _get(host, _PATH + wait)
    except (OSError, http.client.HTTPException):
      status, etag, text = 0, '', ''
    if status == 200 and text == 'TRUE':
      notify('the notice of Google Compute Engine')
      return
    if status == 404:
      return
    if status == 200:
      # From now on the server answers when the value changes.
      wait = f'?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}'
    else:
      time.sleep(5)


def _get(host: str, path: str) -> tuple[int, str, str]:
  """Returns status, ETag and text of a response; the metadata server is never behind a proxy."""
  connection = http.client.HTTPConnection(host, timeout=_WAIT_SECONDS + 30)
  try:
    connection.request('GET', path, headers={'Metadata-Flavor': 'Google'})
    answer = connection.getresponse()
    text = answer.read(100).decode(errors='replace').strip().upper()
    return answer.status, answer.getheader('ETag', '0'), text
  finally:
    connection.close()

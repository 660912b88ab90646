"""Generations and exact uploads for gcp-storage-emulator.

It numbers objects but leaves the numbers out of downloads, and reads uploads as mail, which costs
content that ends with a carriage return this last byte.

Google Cloud Storage gives the generation of an object with its content, and answers 304 or 412 where
a condition on it does not hold. TensorStore relies on both: it commits a checkpoint's arrays to a
manifest, which it reads and replaces on these conditions.
"""

import email.parser
from http import HTTPStatus

from gcp_storage_emulator import exceptions
from gcp_storage_emulator import server


def install() -> None:
  """Has servers of the emulator that are made from now on heed and give generations."""
  server.HANDLERS = tuple(
    (
      path,
      {
        method: getattr(handler, 'with_generations', None) or _with_generations(handler)
        for method, handler in handlers.items()
      },
    )
    for path, handlers in server.HANDLERS
  )
  server.BytesParser = _ExactParser


class _ExactParser(email.parser.BytesParser):
  """Reads the body of an upload, and takes its content as it is."""

  def parsebytes(self, text, headersonly=False):
    message = super().parsebytes(text, headersonly)
    if message.get_content_subtype() == 'related':
      boundary = b'--' + message.get_boundary().encode()
      second = text.index(boundary, text.index(boundary) + len(boundary))
      line_end = b'\r\n' if text[second + len(boundary) :].startswith(b'\r\n') else b'\n'
      begin = text.index(line_end * 2, second) + 2 * len(line_end)
      content = text[begin : text.rindex(line_end + boundary + b'--')]
      message.get_payload()[1].get_payload = lambda decode: content
    return message


def _with_generations(handler):
  """A handler of requests that checks conditions first; the emulator handles one at a time."""

  def handle(request, response, storage, **kwargs):
    # A resumable upload gives its condition where it begins.
    conditional = 'upload_id' not in request.query
    found = _generation(request, storage)
    status = _refusal(request, found) if conditional else None
    if status is not None:
      response.status = status
      return
    handler(request, response, storage, **kwargs)
    if found and request.method == 'GET':
      response['x-goog-generation'] = str(found)

  handle.with_generations = handle
  return handle


def _generation(request, storage) -> int:
  """Generation of the object that a request is about; 0 without one."""
  params = request.params
  name = params.get('dest_object_id') or params.get('object_id') or _uploaded_name(request)
  try:
    return int(storage.get_file_obj(params.get('bucket_name'), name)['generation'])
  except exceptions.NotFound:
    return 0


def _uploaded_name(request) -> str:
  """The name that an upload gives its object: in the query, or among the metadata in the body."""
  if 'name' in request.query or request.method != 'POST':
    return request.query.get('name', [''])[0]
  data = request.data if isinstance(request.data, dict) else {}
  return data.get('meta', data).get('name', '')


def _refusal(request, found: int) -> HTTPStatus | None:
  """The status of an answer to a request whose conditions don't hold; None where they do."""
  wanted = {
    name: int(request.query[name][0])
    for name in ('generation', 'ifGenerationMatch', 'ifGenerationNotMatch')
    if name in request.query
  }
  if wanted.get('generation', found) != found:
    return HTTPStatus.NOT_FOUND
  if wanted.get('ifGenerationMatch', found) != found:
    return HTTPStatus.PRECONDITION_FAILED
  if found and wanted.get('ifGenerationNotMatch') == found:
    return HTTPStatus.NOT_MODIFIED if request.method == 'GET' else HTTPStatus.PRECONDITION_FAILED
  return None

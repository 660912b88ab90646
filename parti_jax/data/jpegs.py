"""Decodes JPEGs: rejects damaged files, but accepts merely unusual ones.

Pillow ignores libjpeg's warnings and fills missing or unreadable areas with gray. simplejpeg raises
the first warning of a file. Some warnings concern files whose pixels are complete: padding before a
marker, or a header field that decoders ignore. Such a fault is removed from the bytes and the file
is decoded again, so that no later warning is missed.
"""

import contextlib
import dataclasses
import io
import re
import struct
from collections.abc import Mapping
from collections.abc import Sequence

import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import Image
from PIL import ImageChops

from parti_jax.data.undecodable import UndecodablePicture

# Each scan of a progressive JPEG covers all pixels; encoders write about ten.
_MAX_SCANS = 100
# Limits on decoding one file repeatedly, each time with another fault removed: total pixels, and
# bounds on the number of decodings.
_DECODED_PIXELS, _LEAST_DECODINGS, _MOST_DECODINGS = 2**29, 8, 100
# Limits on the markers of a file: those that are recorded, and restarts within scans, of which
# there is at most one per block of pixels.
_MAX_MARKERS, _MAX_RESTARTS = 2**16, 2**20
# Candidate positions for the padding of one warning.
_MOST_GUESSES = 8
# Zeros at the end of a scan are data, padding or a hole. A hole is rarely short, and in a JPEG that
# isn't progressive, so few of its zeros rarely decode to all missing pixels.
_SHORT, _KEPT = 64, 11

_MARKER = re.compile(rb'\xff[^\x00\xff]')
_EOI, _SOS, _JFIF, _ADOBE = 0xD9, 0xDA, 0xE0, 0xEE
_SEQUENTIAL = (0xC0, 0xC1, 0xC9)
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_RESTARTS = frozenset(range(0xD0, 0xD8))
_WITHOUT_CONTENT = _RESTARTS | {0x01, 0xD8, _EOI}

_EXTRANEOUS = re.compile(r'Corrupt JPEG data: (\d+) extraneous bytes before marker 0x(..)')


@dataclasses.dataclass(frozen=True)
class _Marker:
  """A marker of a JPEG.

  Attributes:
    kind: its second byte.
    start: offset of the marker, including fill bytes.
    content: offset of its content, after the content's length.
    end: offset of the end of its content.
    zeros: number of zeros directly before it, if they end coded pixels or fill the whole gap to
      the previous marker.
    in_scan: whether coded pixels of a scan precede it.
  """

  kind: int
  start: int
  content: int
  end: int
  zeros: int
  in_scan: bool


def decode(data: bytes, mode: str, least: int) -> Image.Image:
  """Decodes a JPEG, at a fraction of its size if that is enough, which is several times faster.

  Args:
    data: the file. Data after the end of its first picture is ignored.
    mode: 'CMYK' or 'RGB', also for gray pictures.
    least: sufficient height and width in pixels; 0 for the full size.

  Returns:
    The picture; in CMYK 255 is full ink.

  Raises:
    UndecodablePicture: the file has too many scans.
    ValueError: the file is damaged.
  """
  # This also counts bytes that only look like a scan, in a thumbnail or after the end.
  if data.count(b'\xff\xda') > _MAX_SCANS:
    markers = _markers(data)
    if sum(marker.kind == _SOS for marker in markers) > _MAX_SCANS:
      raise UndecodablePicture('picture of too many scans')
    data = data[: markers[-1].end]
  arguments = {'colorspace': mode, 'min_height': least, 'min_width': least}
  try:
    pixels = simplejpeg.decode_jpeg(data, **arguments)
  except ValueError as error:
    if 'Could not determine subsampling' in str(error):
      return _decode_unusual_sampling(data, least)
    pixels = _repaired_pixels(data, str(error), arguments)
  if mode == 'CMYK':
    # Adobe's programs, which write nearly all of these, invert the inks.
    pixels = 255 - pixels
  return Image.frombytes(mode, pixels.shape[1::-1], np.ascontiguousarray(pixels))


def _repaired_pixels(
  data: bytes, warning: str, arguments: Mapping
) -> UInt8[np.ndarray, 'height width channels']:
  """Decodes with simplejpeg after removing faults that don't affect the pixels.

  Args:
    data: the file.
    warning: simplejpeg's warning for this file.
    arguments: arguments of `simplejpeg.decode_jpeg`.

  Raises:
    ValueError: the file has other faults, or too many.
  """
  markers = _markers(data)
  frame = next(marker for marker in markers if marker.kind in _FRAMES)
  height, width = struct.unpack_from('>HH', data, frame.content + 1)
  most = min(max(_DECODED_PIXELS // max(1, height * width), _LEAST_DECODINGS), _MOST_DECODINGS)
  # Start of a marker -> zeros to remove before it; candidates to try, the best last.
  cuts: Mapping[int, int] = {}
  waiting: list[Mapping[int, int]] = []
  for _ in range(most):
    if found := _EXTRANEOUS.match(warning):
      waiting += reversed(_guesses(markers, cuts, int(found[1]), int(found[2], 16)))
    elif (repaired := _with_usual_headers(data, markers, frame, warning)) != data:
      data = repaired
      waiting.append(cuts)
    if not waiting:
      break
    cuts = waiting.pop()
    try:
      return simplejpeg.decode_jpeg(_cut(data, cuts), **arguments)
    except ValueError as error:
      warning = str(error)
  # libjpeg sometimes reports a position after that of the padding.
  for kept in range(4 if cuts else 0):
    cuts = {marker.start: max(0, marker.zeros - kept * marker.in_scan) for marker in markers}
    with contextlib.suppress(ValueError):
      return simplejpeg.decode_jpeg(_cut(data, cuts), **arguments)
  raise ValueError(warning)


def _decode_unusual_sampling(data: bytes, least: int) -> Image.Image:
  """Decodes with Pillow what simplejpeg doesn't support, such as chroma finer than luma.

  To detect scans that are too short, it appends bytes to each scan, which then change the picture.
  """
  pieces, position = [], 0
  for marker in _markers(data):
    if marker.in_scan and marker.kind not in _RESTARTS:
      pieces += [data[position : marker.start], b'\x5a\xa5' * 32]
      position = marker.start
  image, other = (
    _decode_with_pillow(variant, least) for variant in (data, b''.join([*pieces, data[position:]]))
  )
  if ImageChops.difference(image, other).getbbox() is not None:
    raise ValueError('a scan breaks off')
  return image


def _decode_with_pillow(data: bytes, least: int) -> Image.Image:
  with Image.open(io.BytesIO(data), formats=('JPEG', 'MPO')) as image:
    if least:
      image.draft(None, (least, least))
    return image.copy() if image.mode == 'CMYK' else image.convert('RGB')


def _with_usual_headers(
  data: bytes, markers: Sequence[_Marker], frame: _Marker, warning: str
) -> bytes:
  """Returns the file with the header field that a warning names set to its default."""
  repaired = bytearray(data)
  for marker in markers:
    content = data[marker.content : marker.end]
    if warning.startswith('Invalid SOS parameters') and marker.kind == _SOS:
      # The spectrum's start and end and the bits, which are fixed in a sequential JPEG.
      if frame.kind in _SEQUENTIAL:
        repaired[marker.end - 3 : marker.end] = b'\x00\x3f\x00'
    elif warning.startswith('Unknown Adobe color transform code') and marker.kind == _ADOBE:
      # Decoders assume YCbCr, or YCCK for four components.
      if content.startswith(b'Adobe') and len(content) >= 12:
        repaired[marker.content + 11] = 2 if data[frame.content + 5] == 4 else 1
    elif warning.startswith('Warning: unknown JFIF revision') and marker.kind == _JFIF:
      if content.startswith(b'JFIF\0') and len(content) >= 7:
        repaired[marker.content + 5] = 1
  return bytes(repaired)


def _guesses(
  markers: Sequence[_Marker], cuts: Mapping[int, int], count: int, kind: int
) -> list[Mapping[int, int]]:
  """Guesses the position of the padding that a warning reports.

  Args:
    markers: the file's markers.
    cuts: zeros already removed when the warning was raised.
    count: the bytes of padding that libjpeg has found at one position.
    kind: kind of the marker after the padding, or of one that follows it.

  Returns:
    What to remove, the best guess first. Zeros between segments are padding. If they are already
    removed, each guess removes `count` more zeros before some markers within or after scans.
  """
  sequential = any(marker.kind in _SEQUENTIAL for marker in markers)
  certain = {
    marker.start: marker.zeros
    for marker in markers
    if marker.zeros and (not marker.in_scan or marker.zeros > _SHORT and not sequential)
  }
  if certain.items() - cuts.items():
    return [{**cuts, **certain}]
  zeros = {marker: marker.zeros - cuts.get(marker.start, 0) for marker in markers}
  padded = [
    marker
    for marker in markers
    if zeros[marker] >= count and (zeros[marker] <= _SHORT or zeros[marker] - count <= _KEPT)
  ]
  padded.sort(key=lambda marker: (marker.kind == kind, zeros[marker]), reverse=True)
  guesses = [padded, *([marker] for marker in padded[:_MOST_GUESSES])] if padded else []
  return [
    {**cuts, **{marker.start: marker.zeros - zeros[marker] + count for marker in guess}}
    for guess in guesses
  ]


def _cut(data: bytes, cuts: Mapping[int, int]) -> bytes:
  """Returns data without the given numbers of bytes before some positions."""
  pieces, position = [], 0
  for end in sorted(cuts):
    pieces.append(data[position : end - cuts[end]])
    position = end
  return b''.join([*pieces, data[position:]])


def _markers(data: bytes) -> list[_Marker]:
  """Returns the markers of a file in order, up to the end of the picture.

  Omits restart markers within scans that have no zeros before them.

  Raises:
    ValueError: the file has too many markers.
  """
  found: list[_Marker] = []
  position, in_scan, restarts = 2, False, 0
  while marker := _MARKER.search(data, position):
    kind, end = data[marker.end() - 1], marker.end()
    before = data[position : marker.start()].rstrip(b'\xff')
    start = position + len(before)
    zeros = len(before) - len(before.rstrip(b'\0'))
    if not in_scan and (zeros < len(before) or kind == _EOI or _is_short(found)):
      zeros = 0
    content = end
    if kind not in _WITHOUT_CONTENT:
      end += max(2, int.from_bytes(data[end : end + 2]))
      content += 2
    if zeros or kind not in _RESTARTS:
      found.append(_Marker(kind, start, content, end, zeros, in_scan))
    else:
      restarts += 1
    if len(found) > _MAX_MARKERS or restarts > _MAX_RESTARTS:
      raise ValueError('too many markers')
    if kind == _EOI:
      break
    in_scan = kind == _SOS or in_scan and kind in _RESTARTS
    position = end
  return found


def _is_short(markers: list[_Marker]) -> bool:
  """Returns whether zeros after the last marker may be the end of Adobe's color segment."""
  return bool(markers) and markers[-1].kind == _ADOBE and markers[-1].end - markers[-1].content < 12

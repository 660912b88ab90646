"""Streams the content of files packed with gzip, zlib, bzip2, xz or zstd.

The decoders' buffers bound the memory, regardless of the sizes that a file declares.
"""

import bz2
import functools
import io
import lzma
import re
import zlib
from collections.abc import Callable
from typing import IO

from parti_jax.core import optional_packages
from parti_jax.core.errors import UserError

# Usual extensions of packed files.
ENDINGS = ('.gz', '.tgz', '.bz2', '.tbz2', '.xz', '.txz', '.zst', '.tzst')
_CHUNK = 2**16
# Memory limit of an xz decoder; `xz -9` needs 65 MiB. zstd's own limit is 128 MiB.
_MAX_XZ = 2**28
_ZSTD = re.compile(rb'\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18')


class DamagedPacking(OSError):
  """A packed file is damaged or truncated."""


def unpacked(file: IO[bytes], path: str = '') -> io.BufferedReader:
  """Returns a stream of a file's content, packed or not.

  Args:
    file: a file open at its beginning; it is rewound once, after its first bytes.
    path: its name. A file with one of the `ENDINGS` must be packed.

  Returns:
    The stream. Reading it raises OSError if the file is damaged.

  Raises:
    UserError: a package for unpacking is missing.
  """
  head = file.read(16)
  file.seek(0)
  if _ZSTD.match(head):
    return io.BufferedReader(_Zstd(file), _CHUNK)
  if decoder := _decoder(head):
    return io.BufferedReader(_Unpacked(file, decoder), _CHUNK)
  if path.lower().endswith(ENDINGS):
    raise DamagedPacking(f'{path} is not packed')
  if isinstance(file, io.BufferedReader):
    return file
  return io.BufferedReader(file)  # type: ignore[arg-type]  # typeshed's IO lacks readinto.


def unpacked_zlib(file: IO[bytes]) -> io.BufferedReader:
  """Returns a stream of the content of a file packed with bare zlib."""
  return io.BufferedReader(_Unpacked(file, functools.partial(_Zlib, zlib.MAX_WBITS)), _CHUNK)


def _decoder(head: bytes) -> Callable | None:
  """Returns a factory of decoders for a file with this head; None if it isn't packed."""
  if head.startswith(b'\x1f\x8b\x08'):
    return functools.partial(_Zlib, zlib.MAX_WBITS | 16)
  # A tar begins with a name, which may look like bzip2's magic; its first block or its end follow.
  if re.match(rb'BZh[1-9](1AY&SY|\x17rE8P\x90)', head):
    return bz2.BZ2Decompressor
  if head.startswith(b'\xfd7zXZ\0'):
    return functools.partial(lzma.LZMADecompressor, memlimit=_MAX_XZ)
  return None


class _Zlib:
  """A decoder of zlib or gzip with the interface of the bzip2 and xz decoders."""

  def __init__(self, window: int):
    self._decoder = zlib.decompressobj(window)
    self.needs_input = True

  @property
  def eof(self) -> bool:
    """Whether the end of the stream has been reached."""
    return self._decoder.eof

  @property
  def unused_data(self) -> bytes:
    """Data after the end of the stream."""
    return self._decoder.unused_data

  def decompress(self, data: bytes, max_length: int) -> bytes:
    """Returns at most `max_length` bytes of the content."""
    content = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
    self.needs_input = not self._decoder.unconsumed_tail and len(content) < max_length
    return content


class _Unpacked(io.RawIOBase):
  """The content of concatenated packed streams, optionally with zeros between them."""

  def __init__(self, file: IO[bytes], new_decoder: Callable):
    self._file, self._new_decoder = file, new_decoder
    self._decoder, self._input = new_decoder(), b''

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    content = b''
    try:
      while not content:
        if self._decoder.eof and not self._begin_next():
          return 0
        if self._decoder.needs_input and not self._input:
          self._input = self._file.read(_CHUNK)
          if not self._input:
            raise DamagedPacking('a packed file breaks off')
        content = self._decoder.decompress(self._input, len(buffer))
        self._input = b''
    except (zlib.error, lzma.LZMAError, EOFError, ValueError) as error:
      raise DamagedPacking('a packed file is damaged') from error
    buffer[: len(content)] = content
    return len(content)

  def _begin_next(self) -> bool:
    """Moves past the end of a stream, and returns whether another one follows."""
    rest = self._decoder.unused_data.lstrip(b'\0')
    while not rest:
      chunk = self._file.read(_CHUNK)
      if not chunk:
        return False
      rest = chunk.lstrip(b'\0')
    self._decoder, self._input = self._new_decoder(), rest
    return True


class _Zstd(io.RawIOBase):
  """The content of a file packed with zstd."""

  def __init__(self, file: IO[bytes]):
    try:
      import pyarrow
    except ImportError as error:
      raise UserError(optional_packages.missing_extra(error) or str(error)) from error
    self._stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, 'r'), 'zstd')

  def readable(self) -> bool:
    return True

  def readinto(self, buffer) -> int:
    content = self._stream.read(len(buffer))
    buffer[: len(content)] = content
    return len(content)

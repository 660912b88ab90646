"""Reads the files in a tar as a stream, in bounded memory, on over what is damaged.

`tarfile` ends without a word at a damaged header as at the end of the archive, and takes as much
memory as the header of a long name or a member says. Nothing is ever written to a disk here, so
that names such as `../x` or `/x` lead nowhere.
"""

import dataclasses
import tarfile
from collections.abc import Collection
from collections.abc import Iterator
from typing import IO

from parti_jax.data.damage import Damaged
from parti_jax.data.readers import packed

_BLOCK = tarfile.BLOCKSIZE
# Long names and attributes; writers need a few hundred bytes.
_MAX_HEADER = 2**16
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

# What follows can't be read, and a file may have been cut.
REST = Damaged('rest of a damaged tar shard')
_PART = Damaged('part of a damaged tar shard')
_SPECIAL = Damaged('link, device or sparse file in a tar shard')


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in a tar.

  Attributes:
    name: its name as it stands there.
    content: its bytes; None for a file that is not wanted.
  """

  name: str
  content: bytes | None


def members(
  file: IO[bytes], endings: Collection[str], max_bytes: int
) -> Iterator[Member | Damaged]:
  """Yields the files in a tar, plain or packed as `packed` knows it.

  Args:
    file: open to read from its beginning; it is sought in at the beginning alone.
    endings: of the names that are wanted, as `split` has them. The content of others is gone over.
    max_bytes: the most that a wanted file may have.

  Yields:
    Each file, or what is in its place; links, devices and sparse files are `Damaged` too. Behind a
    damaged header the next block that is a header is gone on with.
  """
  try:
    yield from _members(packed.unpacked(file), endings, max_bytes)
  except (OSError, EOFError):
    yield REST


def split(name: str) -> tuple[str, str]:
  """Splits a name at the last dot of its last part.

  Returns:
    What lies before the dot, and the ending behind it, in lower case and without blanks.
  """
  folder, slash, last = name.rpartition('/')
  stem, dot, behind = last.rpartition('.')
  if not dot:
    return name, ''
  return f'{folder}{slash}{stem}', behind.strip().lower()


def _members(file, endings, max_bytes) -> Iterator[Member | Damaged]:
  ended = searching = False
  # What headers before that of a member say of it.
  special: dict[str, str] | None = {}
  while True:
    try:
      header = tarfile.TarInfo.frombuf(file.read(_BLOCK), 'utf-8', 'surrogateescape')
      size = _size(header, special or {})
    except tarfile.EOFHeaderError:
      # Zeros are an end, but another archive may have been appended.
      ended = True
      continue
    except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
      if not ended:
        yield REST
      return
    except (tarfile.HeaderError, ValueError):
      if not searching:
        yield _PART
      ended, searching, special = False, True, {}
      continue
    ended = searching = False
    if header.type in _LONG_NAMES + _PAX_HEADERS:
      if size > _MAX_HEADER:
        yield _PART
        special = None  # Nobody knows how the next member is called.
        _skip(file, _padded(size))
      elif special is not None:
        special |= _said_by(header.type, _content(file, size))
      else:
        _skip(file, _padded(size))
      continue
    found, size = _member(file, header, size, special, endings, max_bytes)
    if found:
      yield found
    _skip(file, size)
    special = {}


def _member(file, header, size, special, endings, max_bytes) -> tuple[Member | Damaged | None, int]:
  """Returns what a header stands for, and the bytes to go over until the next one."""
  # Only these have content, whatever the header says.
  follows = _padded(size) if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES else 0
  if special is None or header.isdir():
    return None, follows
  if header.type not in _FILES or any(key.startswith('GNU.sparse') for key in special):
    return _SPECIAL, follows
  name = special.get('path', header.name)
  if split(name)[1] not in endings:
    return Member(name, None), follows
  if size > max_bytes:
    return Damaged('file of too many bytes in a tar shard'), follows
  return Member(name, _content(file, size)), 0


def _size(header: tarfile.TarInfo, special: dict[str, str]) -> int:
  size = int(special.get('size', header.size))
  if size < 0:
    raise ValueError('a negative size')
  return size


def _said_by(kind: bytes, content: bytes) -> dict[str, str]:
  """Returns what a special header says of the member that follows it."""
  if kind == tarfile.GNUTYPE_LONGNAME:
    return {'path': content.split(b'\0')[0].decode('utf-8', 'surrogateescape')}
  if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
    return {}
  said = {}
  while content:
    # '27 path=beach/000000012.jpg\n', where 27 counts its own digits too.
    digits, _, _ = content[:10].partition(b' ')
    length = int(digits) if digits.isdigit() else 0
    key, equals, value = content[len(digits) + 1 : length - 1].partition(b'=')
    if not equals or length <= len(digits):
      break
    said[key.decode('utf-8', 'replace')] = value.decode('utf-8', 'surrogateescape')
    content = content[length:]
  return said


def _padded(size: int) -> int:
  return -(-size // _BLOCK) * _BLOCK


def _content(file, size: int) -> bytes:
  """Reads a file's content and what fills its last block."""
  content = file.read(size)
  if len(content) < size:
    raise EOFError
  file.read(_padded(size) - size)
  return content


def _skip(file, count: int) -> None:
  """Reads on, in pieces, since a stream that is packed can't be sought in."""
  while count:
    piece = len(file.read(min(count, 2**20)))
    if not piece:
      raise EOFError
    count -= piece

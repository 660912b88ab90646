"""Streams the files in a tar in bounded memory, and continues after damage.

`tarfile` treats a damaged header as the end of the archive, and takes as much memory as the header
of a long name or a member declares. Nothing is written to disk here, so names such as `../x` or
`/x` are harmless.
"""

import dataclasses
import tarfile
from collections.abc import Collection
from collections.abc import Iterator
from collections.abc import Mapping
from typing import IO

from parti_jax.data.damage import Damaged
from parti_jax.data.readers import packed

_BLOCK = tarfile.BLOCKSIZE
# Limit for long names and attributes; writers need a few hundred bytes.
_MAX_HEADER = 2**16
_LONG_NAMES = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)

# Nothing after this can be read, and the preceding sample may be incomplete.
REST = Damaged('rest of a damaged tar shard')
_PART = Damaged('part of a damaged tar shard')
_SPECIAL = Damaged('link, device or sparse file in a tar shard')


@dataclasses.dataclass(frozen=True)
class Member:
  """A file in a tar.

  Attributes:
    name: its name in the archive.
    content: its bytes; None for a file that isn't wanted.
  """

  name: str
  content: bytes | None


def members(
  file: IO[bytes], endings: Collection[str], max_bytes: int
) -> Iterator[Member | Damaged]:
  """Yields the files in a tar, plain or packed in a format of `packed`.

  Args:
    file: a file open at its beginning; it is rewound once, after its first bytes.
    endings: wanted name endings, as returned by `split`. The content of other files is skipped.
    max_bytes: maximum size of a wanted file.

  Yields:
    Each file, or `Damaged` in its place, also for links, devices and sparse files. After a damaged
    header, reading continues at the next valid one.
  """
  try:
    yield from _members(packed.unpacked(file), endings, max_bytes)
  except (OSError, EOFError):
    yield REST


def split(name: str) -> tuple[str, str]:
  """Splits a name at the last dot of its last part.

  Returns:
    The part before the dot, and the ending after it, in lower case without whitespace.
  """
  folder, slash, last = name.rpartition('/')
  stem, dot, behind = last.rpartition('.')
  if not dot:
    return name, ''
  return f'{folder}{slash}{stem}', behind.strip().lower()


def _members(
  file: IO[bytes], endings: Collection[str], max_bytes: int
) -> Iterator[Member | Damaged]:
  ended = searching = False
  # Attributes that special headers set for the next member.
  special: dict[str, str] | None = {}
  while True:
    try:
      header = tarfile.TarInfo.frombuf(file.read(_BLOCK), 'utf-8', 'surrogateescape')
      size = _size(header, special or {})
    except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # Not in typeshed.
      # Zeros are an end, but another archive may have been appended.
      ended = True
      continue
    except (
      tarfile.EmptyHeaderError,  # type: ignore[attr-defined]
      tarfile.TruncatedHeaderError,  # type: ignore[attr-defined]
    ):
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
        special = None  # The next member's name is unknown.
        _skip(file, _padded(size))
      elif special is not None:
        special |= _attributes_from(header.type, _content(file, size))
      else:
        _skip(file, _padded(size))
      continue
    found, size = _member(file, header, size, special, endings, max_bytes)
    if found:
      yield found
    _skip(file, size)
    special = {}


def _member(
  file: IO[bytes],
  header: tarfile.TarInfo,
  size: int,
  special: Mapping[str, str] | None,
  endings: Collection[str],
  max_bytes: int,
) -> tuple[Member | Damaged | None, int]:
  """Returns the file of a header, and the bytes to skip until the next header."""
  # Only these types have content, regardless of the size in the header.
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


def _size(header: tarfile.TarInfo, special: Mapping[str, str]) -> int:
  size = int(special.get('size', header.size))
  if size < 0:
    raise ValueError('a negative size')
  return size


def _attributes_from(kind: bytes, content: bytes) -> dict[str, str]:
  """Returns the attributes that a special header sets for the next member."""
  if kind == tarfile.GNUTYPE_LONGNAME:
    return {'path': content.split(b'\0')[0].decode('utf-8', 'surrogateescape')}
  if kind in (tarfile.GNUTYPE_LONGLINK, tarfile.XGLTYPE):
    return {}
  said = {}
  while content:
    # '27 path=beach/000000012.jpg\n', where 27 includes its own digits.
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


def _content(file: IO[bytes], size: int) -> bytes:
  """Reads a file's content and the padding of its last block."""
  content = file.read(size)
  if len(content) < size:
    raise EOFError
  file.read(_padded(size) - size)
  return content


def _skip(file: IO[bytes], count: int) -> None:
  """Skips bytes by reading, since packed streams aren't seekable."""
  while count:
    piece = len(file.read(min(count, 2**20)))
    if not piece:
      raise EOFError
    count -= piece

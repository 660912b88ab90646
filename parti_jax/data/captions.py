"""Cleans captions from files and rejects unusable ones."""

import codecs
import re
import unicodedata
from collections.abc import Sequence

from parti_jax.core import storage
from parti_jax.data import damage

# Far more than any text encoder reads; text beyond this is never tokenized.
MAX_BYTES = 2**16

# Tab, newline and carriage return are whitespace to all vocabularies.
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')
# Spaces, control characters, direction marks and zero-width marks.
_INVISIBLE = {'Zs', 'Zl', 'Zp', 'Cc', 'Cf'}
# Placeholders for captions that a source could not read, and the reasons that `clean` reports. No
# usable caption looks like them.
NOT_TEXT, SEVERAL, NUMBERS, NO_COLUMN, AMBIGUOUS = (b'\0\0%d' % i for i in range(5))
_REASONS = {
  NOT_TEXT: 'caption that is not a text',
  SEVERAL: 'record with more than one caption',
  NUMBERS: 'record with numbers in place of a caption',
  NO_COLUMN: 'no caption under webdataset.caption_key',
  AMBIGUOUS: 'caption of one of several samples of the same key',
}

# Begins and separates several captions of one picture. No usable caption begins like this.
_SEVERAL_START, _SEVERAL_BREAK = b'\0\0\x1e', b'\x1e'


class UnusableCaption(damage.Unusable):
  """A caption can't be used; the message is a short reason."""


def clean(data: bytes) -> tuple[str, list[str]]:
  """Decodes and cleans a caption.

  Direction marks and zero-width marks stay, since some scripts and emoji need them and the
  vocabulary handles them.

  Args:
    data: the raw caption in UTF-8, or in UTF-16 or UTF-32 with a byte order mark. Of `several`, the
      first is used.

  Returns:
    The text without surrounding whitespace, and a short note for each change: control characters
    replaced by spaces, other captions left out, and text cut after `MAX_BYTES`.

  Raises:
    UnusableCaption: the caption is missing, empty, has only invisible characters, isn't UTF-8 (a
      lone surrogate in JSON isn't), or has more than a fifth control characters.
  """
  data, *others = alternatives(data)
  if data in _REASONS:
    raise UnusableCaption(_REASONS[data])
  encoding = storage.encoding_of(data)
  if encoding == 'utf-8-sig':
    data = data.removeprefix(codecs.BOM_UTF8).strip()
  cut = len(data) > MAX_BYTES
  try:
    # The cut may split a character.
    text = codecs.getincrementaldecoder(encoding)().decode(data[:MAX_BYTES], final=not cut)
  except UnicodeDecodeError as error:
    raise UnusableCaption(
      f'caption not {"UTF-8" if encoding == "utf-8-sig" else encoding.upper()}'
    ) from error
  text, controls = _CONTROL.subn(' ', text)
  if 5 * controls > len(text):
    raise UnusableCaption('caption of control characters')
  if all(unicodedata.category(character) in _INVISIBLE for character in text):
    raise UnusableCaption('no caption')
  changes = ['control characters taken out of the caption'] if controls else []
  changes += ['all captions but the first left out'] if others else []
  return text.strip(), changes + ([f'caption cut to {MAX_BYTES:,} bytes'] if cut else [])


def several(texts: Sequence[str]) -> bytes:
  """Returns several captions of one picture as a source's 'caption'; `choose` returns one of them.

  Args:
    texts: the captions, without control characters.
  """
  return _SEVERAL_START + _SEVERAL_BREAK.join(text.encode() for text in texts)


def alternatives(data: bytes) -> list[bytes]:
  """Returns the captions of a picture: those of `several`, or else `data` itself."""
  if not data.startswith(_SEVERAL_START):
    return [data]
  return data.removeprefix(_SEVERAL_START).split(_SEVERAL_BREAK)


def choose(data: bytes, draw: float) -> bytes:
  """Returns one of the captions of a picture.

  Args:
    data: a caption, or the result of `several`.
    draw: uniform in [0, 1). Its last digits choose, since the first ones decide about other things.
  """
  found = alternatives(data)
  return found[choice(len(found), draw)]


def choice(count: int, draw: float) -> int:
  """Returns the index of the caption that `choose` returns, of `count` captions."""
  return int(draw * 2**53) % count


def from_json(value: object) -> bytes:
  """Returns a caption from JSON in the form that `clean` expects."""
  if value is None:
    return b''
  # JSON can hold half a surrogate pair, which encodes to bytes that aren't UTF-8.
  return value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else NOT_TEXT

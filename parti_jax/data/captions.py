"""Captions as they come from files: which can be used, and what is taken out of the others."""

import codecs
import re
import unicodedata

from parti_jax.core import storage
from parti_jax.data import damage

# Far more than any text encoder reads; what lies beyond is never turned into tokens.
MAX_BYTES = 2**16

# Tab, newline and carriage return are blanks to every vocabulary.
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')
# Blanks, control characters, marks of direction and of zero width.
_INVISIBLE = {'Zs', 'Zl', 'Zp', 'Cc', 'Cf'}
# Stand-ins for captions that a source could not read, and the reasons that `clean` gives. No caption
# that can be used looks like them.
NOT_TEXT, SEVERAL, NUMBERS, NO_COLUMN, AMBIGUOUS = (b'\0\0%d' % i for i in range(5))
_REASONS = {
  NOT_TEXT: 'caption that is not a text',
  SEVERAL: 'record with more than one caption',
  NUMBERS: 'record with numbers in place of a caption',
  NO_COLUMN: 'no caption under webdataset.caption_key',
  AMBIGUOUS: 'caption of one of several samples of the same key',
}


class UnusableCaption(damage.Unusable):
  """The bytes are no caption that can be used; the message is the reason in a few words."""


def clean(data: bytes) -> tuple[str, list[str]]:
  """Reads a caption.

  Marks of direction and of zero width stay where they are, since some scripts and emoji need them;
  the vocabulary knows what to do with them.

  Args:
    data: the caption as it was found, in UTF-8 or, where it begins with their byte order mark, in
      UTF-16 or UTF-32.

  Returns:
    The text without blanks around it, and in a few words each thing that was taken out of it:
    control characters, which become blanks, and what lies beyond `MAX_BYTES`.

  Raises:
    UnusableCaption: it is missing, empty, of invisible characters alone, not UTF-8 (as a lone
      surrogate of JSON isn't), or more than a fifth of it are control characters.
  """
  if data in _REASONS:
    raise UnusableCaption(_REASONS[data])
  encoding = storage.encoding_of(data)
  if encoding == 'utf-8-sig':
    data = data.removeprefix(codecs.BOM_UTF8).strip()
  cut = len(data) > MAX_BYTES
  try:
    # What is cut may end in a part of a character.
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
  return text.strip(), changes + ([f'caption cut to {MAX_BYTES:,} bytes'] if cut else [])


def from_json(value: object) -> bytes:
  """Returns a caption that was found in JSON as `clean` takes it."""
  if value is None:
    return b''
  # JSON can hold half of a pair of surrogates, which becomes bytes that are not UTF-8.
  return value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else NOT_TEXT

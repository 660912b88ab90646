"""Captions as they come from files: which can be used, and what is taken out of the others."""

import codecs
import re
import unicodedata

# Far more than any text encoder reads; what lies beyond is never turned into tokens.
MAX_BYTES = 2**16

# Tab, newline and carriage return are blanks to every vocabulary.
_CONTROL = re.compile('[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]')
# Blanks, control characters, marks of direction and of zero width.
_INVISIBLE = {'Zs', 'Zl', 'Zp', 'Cc', 'Cf'}


class UnusableCaption(Exception):
  """The bytes are no caption that can be used; the message is the reason in a few words."""


def clean(data: bytes) -> tuple[str, list[str]]:
  """Reads a caption.

  Marks of direction and of zero width stay where they are, since some scripts and emoji need them;
  the vocabulary knows what to do with them.

  Args:
    data: the caption as it was found.

  Returns:
    The text without blanks around it, and in a few words each thing that was taken out of it:
    control characters, which become blanks, and what lies beyond `MAX_BYTES`.

  Raises:
    UnusableCaption: it is empty, of invisible characters alone, not UTF-8 (as a lone surrogate of
      JSON isn't), or more than a fifth of it are control characters.
  """
  data = data.removeprefix(codecs.BOM_UTF8).strip()
  cut = len(data) > MAX_BYTES
  try:
    # What is cut may end in a part of a character.
    text = codecs.getincrementaldecoder('utf-8')().decode(data[:MAX_BYTES], final=not cut)
  except UnicodeDecodeError as error:
    raise UnusableCaption('caption not UTF-8') from error
  text, controls = _CONTROL.subn(' ', text)
  if 5 * controls > len(text):
    raise UnusableCaption('caption of control characters')
  if all(unicodedata.category(character) in _INVISIBLE for character in text):
    raise UnusableCaption('no caption')
  changes = ['control characters taken out of the caption'] if controls else []
  return text.strip(), changes + ([f'caption cut to {MAX_BYTES:,} bytes'] if cut else [])


def from_json(value: object) -> bytes:
  """Returns a caption that was found in JSON as `clean` takes it; b'' where there is no text."""
  # JSON can hold half of a pair of surrogates, which becomes bytes that are not UTF-8.
  return value.encode('utf-8', 'surrogatepass') if isinstance(value, str) else b''

"""Expands file patterns: `*`, `?`, `[ab]` and `**` as in a shell, and braces.

`{000..127}.tar` stands for 128 files, all of which must exist, and `{a,b}/*.tar` for the files in
two folders. Braces may be nested; `{0..10..5}` has a step.
"""

import glob
import os
import re
from collections.abc import Sequence

from parti_jax.core import storage
from parti_jax.core.errors import UserError

# Maximum number of patterns that a pattern with braces may expand to.
_MOST = 1_000_000
# Missing files listed in a message.
_NAMED = 3
_NUMBERS = re.compile(r'(-?\d{1,18})\.\.(-?\d{1,18})(?:\.\.(-?\d{1,18}))?')
_LETTERS = re.compile(r'([a-zA-Z])\.\.([a-zA-Z])(?:\.\.(-?\d{1,18}))?')


def join(folder: str | os.PathLike[str], pattern: str) -> str:
  """Returns a pattern within a folder; an existing folder's name isn't treated as a pattern."""
  folder = os.fspath(folder)
  if (glob.has_magic(folder) or '{' in folder) and storage.is_folder(folder):
    folder = re.sub(r'([*?[{}])', r'[\1]', folder)
  return storage.join(folder, pattern)


def files(pattern: str) -> list[str]:
  """Returns the paths or URLs of the files that match a pattern, sorted.

  Raises:
    UserError: part of an expansion matches nothing, or braces expand to too many patterns.
  """
  patterns = expanded(pattern)
  if len(patterns) == 1:
    return storage.glob(patterns[0])
  found, missing, listed = set(), [], {}
  for one in patterns:
    folder = one.rpartition('/')[0]
    if glob.has_magic(one) or not folder:
      fitting = storage.glob(one)
    else:
      # Listing a folder of a store is faster than looking up each file.
      if folder not in listed:
        listed[folder] = frozenset(storage.names(folder))
      fitting = [one] if storage.name(one) in listed[folder] else []
    found.update(fitting)
    if not fitting:
      missing.append(one)
  if missing:
    more = f' and {len(missing) - _NAMED:,} more' if len(missing) > _NAMED else ''
    raise UserError(
      f'of the {len(patterns):,} files or patterns of {pattern!r} {len(missing):,} '
      f'match nothing: {", ".join(missing[:_NAMED])}{more}'
    )
  return sorted(found)


def expanded(pattern: str) -> list[str]:
  """Expands the braces of a pattern and returns the resulting patterns, in order.

  Raises:
    UserError: there are too many.
  """
  for start, character in enumerate(pattern):
    if character != '{' or pattern[start - 1 : start + 2] == '[{]':
      continue
    parts, end = _parts(pattern, start)
    choices = (
      [choice for part in parts for choice in expanded(part)]
      if len(parts) > 1
      else (_range(pattern[start + 1 : end]))
    )
    if not choices:
      continue
    rests = expanded(pattern[end + 1 :])
    if len(choices) * len(rests) > _MOST:
      raise _too_many(pattern)
    return [pattern[:start] + choice + rest for choice in choices for rest in rests]
  return [pattern]


def _parts(pattern: str, start: int) -> tuple[Sequence[str], int]:
  """Returns the parts of a brace between commas, and its closing position; () if unclosed."""
  parts, depth, begin = [], 0, start + 1
  for position in range(start, len(pattern)):
    character = pattern[position]
    if pattern[position - 1 : position + 2] in ('[{]', '[}]'):
      continue
    if character == '{':
      depth += 1
    elif depth == 1 and character in ',}':
      parts.append(pattern[begin:position])
      begin = position + 1
    if character == '}':
      depth -= 1
      if not depth:
        return parts, position
  return (), start


def _range(text: str) -> list[str]:
  """Expands a range such as `1..3` within braces; returns [] for any other text."""
  if found := _NUMBERS.fullmatch(text):
    first, last = int(found[1]), int(found[2])
    padded = any(
      number.lstrip('-').startswith('0') and len(number.lstrip('-')) > 1
      for number in found.group(1, 2)
    )
    width = max(map(len, found.group(1, 2))) if padded else 0
    write = lambda number: f'{number:0{width}d}'
  elif found := _LETTERS.fullmatch(text):
    first, last, write = ord(found[1]), ord(found[2]), chr
  else:
    return []
  step = abs(int(found[3] or 1)) or 1
  if abs(last - first) // step >= _MOST:
    raise _too_many(f'{{{text}}}')
  numbers = range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
  return [write(number) for number in numbers]


def _too_many(pattern: str) -> UserError:
  return UserError(f'{pattern!r} stands for more than {_MOST:,} files')

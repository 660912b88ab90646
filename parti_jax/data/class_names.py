"""Names of classes, such as ImageNet's, in the order of their ids.

| file | a line, or the whole | class |
|---|---|---|
| LOC_synset_mapping.txt, synset_words.txt | `n01440764 tench, Tinca tinca` | key n01440764, name tench |
| imagenet_class_index.json | `{"0": ["n01440764", "tench"], ...}` | the same |
| any text | `tench` | key and name are the same |
| any text with tabs | `KEY<tab>tench, Tinca tinca` | key KEY, name tench |

Keys are the names of the classes' folders or tars. ImageNet's ids are the order of its WordNet ids, which
published models and results use; files in another order, such as that of the challenge's devkit, are
refused.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files

LABELS = ('name', 'id')

_WORDNET_ID = re.compile(r'n\d{8}')
_EXPECTED = (
  'a line for each class in the order of their ids, such as "n01440764 tench, Tinca tinca" of '
  'LOC_synset_mapping.txt, or the file imagenet_class_index.json'
)


@dataclasses.dataclass(frozen=True)
class Classes:
  """Classes in the order of their ids.

  Attributes:
    keys: what folders, tars and labels call each class.
    names: a text for each class; the same as `keys` if nothing else is known.
  """

  keys: Sequence[str]
  names: Sequence[str]

  def __len__(self) -> int:
    return len(self.keys)

  @property
  def named(self) -> bool:
    """Whether the names say more than ImageNet's keys."""
    return not all(map(is_wordnet_id, self.names))

  def texts(self, label: str, template: str = '{}') -> list[str]:
    """Returns the text of each class.

    Args:
      label: 'name', or 'id' for the number of the class in decimal digits, from 0.
      template: the text around a name, with {} in its place, such as 'a photo of a {}'.

    Raises:
      UserError: the label is unknown, the template has no {} or belongs to an id, or two classes would
        have the same text, so that a generator couldn't tell them apart.
    """
    if label not in LABELS:
      raise UserError(f'label={label!r} is unknown; choose from {", ".join(LABELS)}')
    if template.count('{}') != 1:
      raise UserError(f'template={template!r} must have {{}} once, in the place of the name')
    if label == 'id':
      if template != '{}':
        raise UserError(f'template={template!r} does not apply to label=id')
      return [str(number) for number in range(len(self))]
    if not self.named:
      raise UserError(
        f'the classes have only the names of their folders, such as {self.names[0]}; give a file of '
        f'names with {_EXPECTED}'
      )
    return [template.replace('{}', name) for name in self.names]

  def ids(self) -> dict[str, int]:
    """Returns {key: id}."""
    return {key: number for number, key in enumerate(self.keys)}


def is_wordnet_id(key: str) -> bool:
  """Returns whether a key is one of ImageNet's, such as n01440764."""
  return _WORDNET_ID.fullmatch(key) is not None


def of_keys(keys: Sequence[str]) -> Classes:
  """Returns classes whose names are their keys, with spaces for underscores."""
  return Classes(list(keys), [key.replace('_', ' ') for key in keys])


def read(path: str) -> Classes:
  """Reads a file of names.

  Args:
    path: a path or URL.

  Returns:
    The classes. Of several synonyms, separated by commas, the first is the name; a name that several
    classes share, such as ImageNet's two cranes, is followed by the next synonym in parentheses, or else
    by the key.

  Raises:
    UserError: it can't be read or has another form, or ImageNet's classes are in another order.
  """
  text = text_files.read(path, f'the file of class names {path}')
  if storage.name(path).endswith('.json'):
    rows = _of_json(text, path)
  else:
    lines = [line.strip() for line in text_files.lines(text) if line.strip()]
    rows = [_of_line(line) for line in lines]
  if not rows:
    raise UserError(f'{path} has no class; expected {_EXPECTED}')
  keys = [key for key, _ in rows]
  if len(set(keys)) < len(keys):
    twice = next(key for key in keys if keys.count(key) > 1)
    raise UserError(f'{path} has the class {twice!r} twice')
  if all(map(is_wordnet_id, keys)) and keys != sorted(keys):
    raise UserError(
      f'{path}: its classes are not in the order of their WordNet ids, which is that of the class ids '
      'of published models; sort its lines'
    )
  return Classes(keys, _distinct(rows))


def _of_line(line: str) -> tuple[str, list[str]]:
  """Returns the key and the synonyms in a line."""
  separator = '\t' if '\t' in line else None if is_wordnet_id(line.split()[0]) else ''
  if separator == '':
    return line, [line]
  key, *rest = line.split(separator, 1)
  synonyms = [name.strip() for name in ' '.join(rest).split(',') if name.strip()]
  return key.strip(), synonyms or [key.strip()]


def _of_json(text: str, path: str) -> list[tuple[str, list[str]]]:
  """Returns the keys and names of imagenet_class_index.json."""
  try:
    found = json.loads(text)
    rows = [found[str(number)] for number in range(len(found))]
    if not all(isinstance(word, str) and word for row in rows for word in (row[0], row[1])):
      raise ValueError
    return [(row[0], [row[1].replace('_', ' ')]) for row in rows]
  except (ValueError, LookupError, TypeError, RecursionError) as error:
    raise UserError(f'{path}: not of the expected form; expected {_EXPECTED}') from error


def _distinct(rows: Sequence[tuple[str, list[str]]]) -> list[str]:
  """Returns a name for each class; all differ."""
  first = [names[0] for _, names in rows]
  names = []
  for key, synonyms in rows:
    name = synonyms[0]
    if first.count(name) > 1:
      other = next(iter(synonyms[1:]), key)
      name = f'{name} ({other})'
    names.append(name)
  return [
    name if names.count(name) == 1 else f'{name} ({key})' for name, (key, _) in zip(names, rows)
  ]

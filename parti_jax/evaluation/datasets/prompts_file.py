"""Prompts in the format of PartiPrompts, the benchmark published with Parti.

A tab-separated file with a header and the columns Prompt, Category, Challenge and Note;
PartiPrompts itself has 1,632 prompts in 12 categories and 11 challenges.
"""

from __future__ import annotations

import dataclasses

from parti_jax.core.errors import UserError
from parti_jax.data.readers import text_files

COLUMNS = ('Prompt', 'Category', 'Challenge', 'Note')


@dataclasses.dataclass(frozen=True)
class Prompt:
  """A prompt and its annotations.

  Attributes:
    number: its number in the file, from 1.
    text: the prompt.
    category: its subject.
    challenge: the difficulty that it tests.
    note: any text; may be empty.
  """

  number: int
  text: str
  category: str
  challenge: str
  note: str


def read(path: str) -> list[Prompt]:
  """Reads a file of prompts.

  Args:
    path: path of the file. Quotes are part of a text; blank lines are skipped.

  Returns:
    The prompts, in the order of the file.

  Raises:
    UserError: the file can't be read or has another form; the message names the line.
  """
  lines = text_files.lines(text_files.read(path, path))
  expected = ', '.join(COLUMNS)
  if tuple(_cells(lines[0])) != COLUMNS:
    raise UserError(
      f'{path}, line 1: expected the columns {expected}, separated by tabs, '
      f'got {lines[0][:80] or "nothing"!r}'
    )
  prompts: list[Prompt] = []
  for number, line in enumerate(lines[1:], 2):
    if not line.strip():
      continue
    cells = _cells(line)
    # An empty note may have lost its tab.
    cells += [''] * (len(cells) == len(COLUMNS) - 1)
    if len(cells) != len(COLUMNS):
      raise UserError(
        f'{path}, line {number}: {len(cells)} cells, expected {expected}, separated by tabs'
      )
    for name, cell in zip(COLUMNS[:3], cells):
      if not cell:
        raise UserError(f'{path}, line {number}: its {name} is empty')
    prompts.append(Prompt(len(prompts) + 1, *cells))
  if not prompts:
    raise UserError(f'{path} has no prompts')
  return prompts


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.split('\t')]

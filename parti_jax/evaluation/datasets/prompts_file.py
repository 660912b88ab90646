"""Prompts in the form of PartiPrompts, the benchmark that was published with Parti.

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
  """A prompt and what its file says of it.

  Attributes:
    number: from 1, its place in the file.
    text: the prompt.
    category: what it is about.
    challenge: what makes it hard.
    note: anything; may be empty.
  """

  number: int
  text: str
  category: str
  challenge: str
  note: str


def read(path: str) -> list[Prompt]:
  """Reads a file of prompts.

  Args:
    path: of the file. Quotes are part of a text; blank lines are left out.

  Returns:
    The prompts, in the order of the file.

  Raises:
    UserError: the file can't be read or has another form; the message names the line.
  """
  lines = text_files.lines(text_files.read(path, path))
  expected = ', '.join(COLUMNS)
  if tuple(_cells(lines[0])) != COLUMNS:
    raise UserError(
      f'{path}, line 1: the columns {expected}, separated by tabs, are needed; '
      f'there is {lines[0][:80] or "nothing"!r}'
    )
  prompts = []
  for number, line in enumerate(lines[1:], 2):
    if not line.strip():
      continue
    cells = _cells(line)
    # A note that is empty may have lost its tab.
    cells += [''] * (len(cells) == len(COLUMNS) - 1)
    if len(cells) != len(COLUMNS):
      raise UserError(
        f'{path}, line {number}: {len(cells)} cells, where {expected} are needed, separated by tabs'
      )
    for name, cell in zip(COLUMNS[:3], cells):
      if not cell:
        raise UserError(f'{path}, line {number}: its {name} is empty')
    prompts.append(Prompt(len(prompts) + 1, *cells))
  if not prompts:
    raise UserError(f'{path} has no prompt in it')
  return prompts


def _cells(line: str) -> list[str]:
  return [cell.strip() for cell in line.split('\t')]

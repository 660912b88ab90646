"""Renders distributions as tables for a terminal and in Markdown."""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any

from parti_jax.evaluation import measurement
from parti_jax.evaluation import tables
from parti_jax.evaluation.metrics import distribution

# What is said of a column's values below the tables.
_NOTES = {
  'frechet_distance': 'Fréchet distance: lower is better; it grows as the number of pictures falls, so '
  'only rows with the same numbers of pictures and the same features are comparable.',
  'precision': 'Precision, recall (k = 3): shares of generated pictures on the manifold of the real ones, '
  'and the reverse, in %; they too depend on the numbers of pictures.',
  'inception_score': 'Inception score: higher is better; the mean over ten parts of the pictures, ± the '
  'deviation between them; it grows with the number of pictures.',
  'alignment': "Alignment: mean cosine of the ranker's features of text and picture.",
}

_SCORES_NOTE = (
  "CLIPScore: 2.5 · max(cosine, 0) with the text 'A photo depicts ...'; published values are mostly of "
  "OpenAI's ViT-B/32, and those of other networks differ. HPSv2: 100 · cosine."
)

# Name of a column, its value in a row, and how to show one.
_Column = tuple[str, Callable[[distribution.Row], Any], Callable[[Any], str]]
FRECHET_DISTANCE = 'Fréchet distance'
_COLUMNS: list[_Column] = [
  (FRECHET_DISTANCE, operator.attrgetter('frechet_distance'), '{:.4g}'.format),
  ('precision', operator.attrgetter('precision'), lambda share: f'{100 * share:.1f}'),
  ('recall', operator.attrgetter('recall'), lambda share: f'{100 * share:.1f}'),
  ('inception score', operator.attrgetter('inception_score'), lambda score: score.text(2)),
  ('alignment', operator.attrgetter('alignment'), lambda cosine: cosine.text(3)),
]


def notes(distributions: Iterable[distribution.Distribution]) -> list[str]:
  """Returns explanations of the values in tables; none if there are none."""
  rows = [row for table in distributions for row in table.rows.values()]
  shown = [
    note for name, note in _NOTES.items() if any(getattr(row, name) is not None for row in rows)
  ]
  scored = any(row.scores for row in rows)
  return [*([' '.join(shown)] if shown else []), *([_SCORES_NOTE] if scored else [])]


def title(table: distribution.Distribution) -> str:
  """Returns a title that names the table's features."""
  return f'Over {table.dim} features: {table.features}'


def value_cells(
  rows: Sequence[distribution.Row], scores: bool = False
) -> tuple[list[str], list[list[str]]]:
  """Returns the names of the columns in which any row has a value, and each row's cells.

  Args:
    rows: the rows.
    scores: whether to add a column for each published score.
  """
  columns = list(_COLUMNS)
  if scores:
    for score in dict.fromkeys(name for row in rows for name in row.scores):
      columns.append((score, functools.partial(_score_of, score), _score_text))
  shown = [column for column in columns if any(column[1](row) is not None for row in rows)]
  lines = [
    ['-' if (value := value_of(row)) is None else render(value) for _, value_of, render in shown]
    for row in rows
  ]
  return [name for name, _, _ in shown], lines


def cells(table: distribution.Distribution) -> list[list[str]]:
  """Returns a header and a line for each row, without columns that have no values."""
  keys = [key for key in distribution.ROWS if key in table.rows]
  rows = [table.rows[key] for key in keys]
  names, values = value_cells(rows, scores=True)
  lines = [['', 'pictures', 'against', *names]]
  for key, row, shown in zip(keys, rows, values):
    real = '-' if row.real is None else f'{row.real:,}'
    lines.append([distribution.ROWS[key], f'{row.pictures:,}', real, *shown])
  return lines


def _score_of(name: str, row: distribution.Row) -> distribution.Estimate | None:
  return row.scores.get(name)


def _score_text(score: distribution.Estimate) -> str:
  return score.text(3)


def text(table: distribution.Distribution) -> str:
  """Renders a table and its remarks for a terminal."""
  return '\n'.join([title(table), tables.text(cells(table)), *table.remarks])


def markdown(table: distribution.Distribution) -> str:
  """Renders a table and its remarks in Markdown."""
  return '\n\n'.join([title(table), tables.markdown(cells(table)), *table.remarks])


@dataclasses.dataclass(frozen=True)
class Compared(abc.ABC):
  """Several sets of generated pictures that were compared with the same ones over the same features.

  Attributes:
    pictures: name of what they were compared with.
    features: description of the features.
    dim: number of features; None against a reference.
    reported: other remarks, such as those of the measurements against a reference.
  """

  pictures: str
  features: str
  dim: int | None
  reported: Sequence[str] = dataclasses.field(default=(), kw_only=True)

  @property
  @abc.abstractmethod
  def rows(self) -> list[distribution.Row]:
    """The row of each set."""

  @abc.abstractmethod
  def cells(self) -> list[list[str]]:
    """Returns a header, and a line for each set."""

  @property
  def title(self) -> str:
    return f'{self.pictures}, over features: {self.features}'

  def remarks(self) -> list[str]:
    """Returns what was left out, and why distances are unreliable, if they are."""
    unreliable = [] if self.dim is None else distribution.row_remarks(self.rows[0], self.dim)
    return [*self.reported, *unreliable]

  def text(self) -> str:
    """Renders the table and its remarks for a terminal."""
    return '\n'.join([self.title, tables.text(self.cells()), *self.remarks()])

  def markdown(self) -> str:
    """Renders the table and its remarks in Markdown, below a heading."""
    return '\n\n'.join([f'## {self.title}', tables.markdown(self.cells()), *self.remarks()])


def against_reference(
  name: str, measured: Sequence[measurement.Measurement]
) -> tuple[tuple[str, str, None], list[str]]:
  """Returns what sets that were compared with a reference have in common.

  Args:
    name: what the pictures are.
    measured: the measurement of each set.

  Returns:
    The arguments of `Compared`: (pictures, features, dim), and `reported`.
  """
  subject = measured[0].subject
  remarks = dict.fromkeys(remark for one in measured for remark in one.remarks)
  return (f'{name} against {subject["reference"]}', subject['network'], None), list(remarks)

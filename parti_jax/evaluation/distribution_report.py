"""Renders distributions as tables for a terminal and in Markdown."""

from __future__ import annotations

from parti_jax.evaluation import tables
from parti_jax.evaluation.metrics import distribution

NOTE = (
  'Fréchet distance: lower is better; it grows as the number of pictures falls, so only rows with '
  'the same numbers of pictures and the same features are comparable. Precision, recall '
  '(k = 3): shares of generated pictures on the manifold of the real ones, and the reverse, '
  'in %; they too depend on the numbers of pictures. Inception score: higher is better; the mean '
  'over ten parts of the pictures, ± the deviation between them; it grows with the number of '
  'pictures. '
  "Alignment: mean cosine of the ranker's features of text and picture."
)

_COLUMNS = {
  'frechet_distance': ('Fréchet distance', '{:.4g}'.format),
  'precision': ('precision', lambda share: f'{100 * share:.1f}'),
  'recall': ('recall', lambda share: f'{100 * share:.1f}'),
  'inception_score': ('inception score', lambda score: score.text(2)),
  'alignment': ('alignment', lambda cosine: cosine.text(3)),
}


def title(table: distribution.Distribution) -> str:
  """Returns a title that names the table's features."""
  return f'Over {table.dim} features: {table.features}'


def cells(table: distribution.Distribution) -> list[list[str]]:
  """Returns a header and a line for each row, without columns that have no values."""
  shown = {
    key: column
    for key, column in _COLUMNS.items()
    if any(getattr(row, key) is not None for row in table.rows.values())
  }
  lines = [['', 'pictures', 'against', *(name for name, _ in shown.values())]]
  for key, label in distribution.ROWS.items():
    if key in table.rows:
      row = table.rows[key]
      values = [(getattr(row, column), render) for column, (_, render) in shown.items()]
      lines.append(
        [
          label,
          f'{row.pictures:,}',
          '-' if row.real is None else f'{row.real:,}',
          *('-' if value is None else render(value) for value, render in values),
        ]
      )
  return lines


def text(table: distribution.Distribution) -> str:
  """Renders a table and its remarks for a terminal."""
  return '\n'.join([title(table), tables.text(cells(table)), *table.remarks])


def markdown(table: distribution.Distribution) -> str:
  """Renders a table and its remarks in Markdown."""
  return '\n\n'.join([title(table), tables.markdown(cells(table)), *table.remarks])

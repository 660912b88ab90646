"""Renders tables of cells as plain text and as Markdown. The first line is the header."""

from collections.abc import Sequence


def text(lines: Sequence[Sequence[str]]) -> str:
  """Renders a table for a terminal; left-aligns the first column and right-aligns the others."""
  widths = [max(map(len, column)) for column in zip(*lines)]
  return '\n'.join(
    '  '.join(
      [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
    )
    for line in lines
  )


def markdown(lines: Sequence[Sequence[str]]) -> str:
  """Renders a table in Markdown."""
  header, *rest = lines
  rows = [header, ['---', *['---:'] * (len(header) - 1)], *rest]
  return '\n'.join('| ' + ' | '.join(row) + ' |' for row in rows)

"""The results of several benchmarks' judges as one table, and as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from parti_jax.core.errors import UserError
from parti_jax.evaluation import tables
from parti_jax.evaluation.benchmarks import base
from parti_jax.evaluation.benchmarks import registry

_NOTE = '± is the standard error over prompts, as far as the results of a judge tell it.'


@dataclasses.dataclass(frozen=True)
class Table:
  """Scores of benchmarks.

  Attributes:
    scores: of each benchmark.
    files: the results that they are from, by the benchmark's name on the command line.
  """

  scores: Sequence[base.Scores]
  files: Sequence[tuple[str, str]]

  def cells(self) -> list[list[str]]:
    """Returns a header, and a line for each score."""
    lines = [['benchmark', 'score', 'unit', 'value', 'prompts', 'pictures']]
    for scores in self.scores:
      for score in scores.scores:
        # Scores from 0 to 1 are published with four digits, others with two.
        digits = 4 if scores.unit == '0 to 1' else 2
        error = '' if score.error is None else f' ± {score.error:.{digits}f}'
        counts = [
          '-' if count is None else f'{count:,}' for count in (score.prompts, score.pictures)
        ]
        value = f'{score.value:.{digits}f}{error}'
        lines.append([scores.benchmark, score.name, scores.unit, value, *counts])
    return lines

  def notes(self) -> list[str]:
    """Returns explanations and remarks."""
    return [_NOTE, *(remark for scores in self.scores for remark in scores.remarks)]

  def text(self) -> str:
    """Renders the table for a terminal."""
    return '\n'.join([tables.text(self.cells()), '', *self.notes()]) + '\n'

  def markdown(self) -> str:
    """Renders the table in Markdown."""
    return '\n\n'.join(['# Benchmarks', tables.markdown(self.cells()), *self.notes()]) + '\n'

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    content = [
      {'format': name, 'file': file, **dataclasses.asdict(scores)}
      for (name, file), scores in zip(self.files, self.scores)
    ]
    return json.dumps({'benchmarks': content}, indent=2, ensure_ascii=False, allow_nan=False) + '\n'


def read(given: Sequence[str]) -> Table:
  """Reads results.

  Args:
    given: FORMAT=PATH of each, where FORMAT is a name in `registry.BENCHMARKS`.

  Returns:
    The table, in this order.

  Raises:
    UserError: a format is unknown or repeated, or results can't be read.
  """
  files: dict[str, str] = {}
  for entry in given:
    name, equals, path = entry.partition('=')
    if not equals or name not in registry.BENCHMARKS or not path:
      raise UserError(
        f'--results {entry}: expected FORMAT=PATH with a format of {", ".join(registry.BENCHMARKS)}'
      )
    if name in files:
      raise UserError(f'--results {entry}: {name} is given twice')
    files[name] = path
  scores = [registry.BENCHMARKS[name].results(path) for name, path in files.items()]
  return Table(scores, list(files.items()))

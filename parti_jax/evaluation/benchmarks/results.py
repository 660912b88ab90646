"""The results of several benchmarks' judges as one table, and as measurements."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement
from parti_jax.evaluation import tables
from parti_jax.evaluation.benchmarks import base
from parti_jax.evaluation.benchmarks import drawing
from parti_jax.evaluation.benchmarks import registry

# Folders around results in which the run's protocol may be.
_LEVELS = 4
_NOTE = '± is the standard error over prompts, where the results of a judge have it.'


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

  def measurements(self) -> dict[str, measurement.Measurement]:
    """Returns {name of a benchmark on the command line: its scores and their protocol}."""
    return {
      name: _measurement(name, path, scores)
      for (name, path), scores in zip(self.files, self.scores)
    }


def _measurement(name: str, path: str, scores: base.Scores) -> measurement.Measurement:
  """Returns scores in the form that `parti-jax compare` reads."""
  run = protocol_of(name, path)
  protocol: dict[str, Any] = {
    'benchmark': scores.benchmark,
    'unit': scores.unit,
    'counts': {
      score.name: {'prompts': score.prompts, 'pictures': score.pictures} for score in scores.scores
    },
    'picture_format': registry.BENCHMARKS[name].picture_format,
  }
  protocol |= {key: run[key] for key in ('prompts', 'prompts_drawn', 'num_images') if key in run}
  of_model = ('model_name', 'model', 'ranker', 'image_size', 'seed', 'sampling', 'prompts_cut')
  return measurement.Measurement(
    'benchmark',
    protocol,
    {'results': path, **{key: run[key] for key in of_model if key in run}},
    {
      score.name: measurement.Value(
        score.value, score.error, '' if score.error is None else 'standard error over prompts'
      )
      for score in scores.scores
    },
    list(scores.remarks),
  )


def protocol_of(name: str, path: str) -> dict[str, Any]:
  """Returns what the run that drew the pictures says about itself.

  Args:
    name: name of the benchmark on the command line.
    path: the judge's results, which are in the run's output folder, or in a folder of it.

  Returns:
    The content of its protocol.json, with the number of cut prompts in place of these; {} without a
    file of this benchmark.
  """
  place = pathlib.Path(path).absolute()
  for folder in (place, *place.parents)[:_LEVELS]:
    try:
      content = json.loads((folder / drawing.PROTOCOL_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError, RecursionError):
      continue
    if isinstance(content, dict) and content.get('format') == name:
      return content | {'prompts_cut': len(content.get('prompts_cut') or [])}
  return {}


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

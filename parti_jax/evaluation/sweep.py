"""Evaluations at several settings as curves: the distance from real pictures against the alignment.

Guidance trades one for the other, so that a model is better than another only if its curve lies below
(Saharia et al. 2022, arXiv 2205.11487, figure 4). There is a curve for each set of real pictures and kind
of features. Its lines connect values of the first setting.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from PIL import Image

from parti_jax.core import checks
from parti_jax.evaluation import captions_evaluation
from parti_jax.evaluation import distribution_report
from parti_jax.evaluation import line_chart
from parti_jax.evaluation import measurement
from parti_jax.evaluation.metrics import distribution

_NOTE = (
  'Generated pictures against all real ones, or the reference, as in the report of each point, in the folder points. '
  'Fréchet distance: lower is better. Alignment: mean cosine of texts and pictures by the ranker, ± the '
  'standard error over texts. Points differ in nothing but the settings: prompts and noise are the same.'
)


@dataclasses.dataclass(frozen=True)
class Point:
  """An evaluation.

  Attributes:
    settings: the settings that vary.
    row: the generated pictures, with the alignment by the ranker even over other features.
  """

  settings: Mapping[str, Any]
  row: distribution.Row

  def text(self, names: Sequence[str]) -> str:
    """Returns some of the settings as a text."""
    return ', '.join(f'{name} {value_text(self.settings[name])}' for name in names)


@dataclasses.dataclass(frozen=True)
class Curve(distribution_report.Compared):
  """The points over one set of real pictures and one kind of features.

  Attributes:
    points: the points, in the order of the sweep.
  """

  points: Sequence[Point]

  @property
  def rows(self) -> list[distribution.Row]:
    return [point.row for point in self.points]

  def cells(self) -> list[list[str]]:
    """Returns a header, and a line for each point; the lowest distance has a star."""
    names = list(self.points[0].settings)
    columns, values = distribution_report.value_cells(self.rows)
    lines = [[*names, 'pictures', *columns]]
    least = self.lowest()
    for point, cells in zip(self.points, values):
      if point is least:
        cells[columns.index(distribution_report.FRECHET_DISTANCE)] += ' *'
      settings = [value_text(point.settings[name]) for name in names]
      lines.append([*settings, f'{point.row.pictures:,}', *cells])
    return lines

  def lowest(self) -> Point | None:
    """Returns the point of the lowest Fréchet distance; None if none has one."""
    found = [point for point in self.points if point.row.frechet_distance is not None]
    return min(found, key=lambda point: point.row.frechet_distance or 0.0, default=None)

  def panel(self) -> line_chart.Panel | None:
    """Returns the chart; None if no point has a distance."""
    points = [point for point in self.points if point.row.frechet_distance is not None]
    if not points:
      return None
    first, *others = points[0].settings
    aligned = all(point.row.alignment is not None for point in points)
    numeric = all(isinstance(point.settings[first], (int, float)) for point in points)
    lines: dict[str, list[line_chart.Point]] = {}
    for number, point in enumerate(points):
      assert point.row.frechet_distance is not None
      x, error = float(number), None
      if aligned:
        assert point.row.alignment is not None
        x, error = point.row.alignment.mean, point.row.alignment.error
      elif numeric:
        x = float(point.settings[first])
      label = value_text(point.settings[first])
      found = line_chart.Point(x, point.row.frechet_distance, label, error)
      lines.setdefault(point.text(others), []).append(found)
    return line_chart.Panel(
      self.title,
      f'alignment; labels are {first}' if aligned else first,
      'Frechet distance',
      {name: line for name, line in lines.items()},
    )


@dataclasses.dataclass(frozen=True)
class Report:
  """A sweep.

  Attributes:
    sweep: setting -> its values.
    run: what all points have in common.
    curves: the curves.
  """

  sweep: Mapping[str, Sequence[Any]]
  run: Mapping[str, Any]
  curves: Sequence[Curve]

  def text(self) -> str:
    """Renders the tables for a terminal."""
    blocks = [curve.text() for curve in self.curves]
    return '\n\n'.join([*blocks, f'* the lowest. {_NOTE}']) + '\n'

  def markdown(self) -> str:
    """Renders the tables in Markdown."""
    blocks = ['# Sweep', *(curve.markdown() for curve in self.curves)]
    return '\n\n'.join([*blocks, f'\\* the lowest. {_NOTE}']) + '\n'

  def json(self) -> str:
    """Renders all numbers, unrounded, as JSON."""
    return (
      json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False, allow_nan=False) + '\n'
    )

  def picture(self) -> Image.Image | None:
    """Draws the curves; None if there are no distances."""
    panels = [panel for panel in (curve.panel() for curve in self.curves) if panel is not None]
    return line_chart.draw(panels) if panels else None


def curves(reports: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> list[Curve]:
  """Returns the curves of evaluations.

  Args:
    reports: the settings of each point, and the content of its report.json.
  """
  if any(measurement.REFERENCE in _measured(report) for _, report in reports):
    return [_against_reference(reports)]
  found: dict[tuple[str, str, int], list[Point]] = {}
  # Those of all points are the same, whose protocols are compared.
  skipped = captions_evaluation.skipped_remarks(reports[0][1].get('skipped', {}))
  for settings, report in reports:
    for name, distributions in _sets(report):
      rows = [_row(table['rows']['generated']) for table in distributions]
      alignment = next((row.alignment for row in rows if row.alignment is not None), None)
      for table, row in zip(distributions, rows):
        row = dataclasses.replace(row, alignment=alignment)
        key = name, table['features'], table['dim']
        found.setdefault(key, []).append(Point(settings, row))
  return [Curve(*key, points, reported=skipped) for key, points in found.items()]


def _against_reference(
  reports: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
) -> Curve:
  """Returns the curve of pictures that were compared with a reference."""
  measured = [_measured(report) for _, report in reports]
  points: list[Point] = []
  for (settings, _), found in zip(reports, measured):
    row = measurement.row_of(found[measurement.REFERENCE])
    if aligned := measurement.alignment_of(found):
      row = dataclasses.replace(row, alignment=aligned)
    points.append(Point(settings, row))
  name = reports[0][1].get('dataset', 'samples of classes')
  compared = [found[measurement.REFERENCE] for found in measured]
  common, remarks = distribution_report.against_reference(name, compared)
  return Curve(*common, points, reported=remarks)


def _measured(report: Mapping[str, Any]) -> dict[str, measurement.Measurement]:
  return measurement.of_report('report', report)


def _sets(report: Mapping[str, Any]) -> list[tuple[str, Sequence[Mapping[str, Any]]]]:
  """Returns the name and the tables of each set of pictures in a report."""
  if 'splits' in report:
    return [(split['split'], split['distributions']) for split in report['splits']]
  return [(report['dataset'], report['distributions'])]


def _row(values: Mapping[str, Any]) -> distribution.Row:
  """Returns a row from its JSON."""
  row = distribution.Row(**values)

  def estimate(name: str) -> distribution.Estimate | None:
    return None if values[name] is None else distribution.Estimate(**values[name])

  scores = {name: distribution.Estimate(**value) for name, value in values['scores'].items()}
  return dataclasses.replace(
    row,
    inception_score=estimate('inception_score'),
    alignment=estimate('alignment'),
    scores=scores,
  )


def value_text(value: Any) -> str:
  """Returns a short text for the value of a setting."""
  return value if isinstance(value, str) else checks.number_text(value)

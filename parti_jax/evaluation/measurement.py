"""Numbers with the protocol that they were measured by, in one form that can be compared.

The file of a measurement is JSON:

  {"schema": "parti_jax.measurement.1", "kind": "samples",
   "protocol": {"pictures": 50000, "picture_size": [256, 256], "reference": {"digest": ...}, ...},
   "subject": {"samples": "samples.npz", "seed": 0, "guidance_scale": 1.5, ...},
   "values": {"fid": {"value": 3.1, "error": 0.04, "error_of": "..."}, ...},
   "remarks": [...]}

Two measurements can be compared if their protocols are equal. `subject` is what was measured, such as
the model, its seed and its guidance. It may differ, and `compare` shows where.

The report of an evaluation (report.json, sweep.json, rejection.json) has other keys for its tables, and
under `measurements` its numbers in this form, {name: measurement}, such as one for each split. The
measurements of the same name in two reports are compared, or those that FILE#NAME chooses.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import NamedTuple

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.evaluation import tables
from parti_jax.evaluation.metrics import distribution

SCHEMA = 'parti_jax.measurement.1'
MEASUREMENTS = 'measurements'
# Name of the measurement against a reference, in reports.
REFERENCE = 'reference'
# Between the path of a report and the name of one of its measurements.
_CHOICE = '#'
# Maximum number of entries of a protocol, or of names of measurements, that a message names.
_MOST_NAMED = 12


class Meaning(NamedTuple):
  """What a value means.

  Attributes:
    label: its name in tables.
    unit: its unit, '' without one.
    better: 'lower' or 'higher' is better; '' if neither is.
    digits: digits after the point in tables.
  """

  label: str
  unit: str
  better: str
  digits: int


MEANINGS = {
  'fid': Meaning('FID', '', 'lower', 4),
  'sfid': Meaning('sFID', '', 'lower', 4),
  'frechet_distance': Meaning("Fréchet distance of the ranker's features", '', 'lower', 6),
  'inception_score': Meaning('inception score', '', 'higher', 3),
  'precision': Meaning('precision', '', 'higher', 4),
  'recall': Meaning('recall', '', 'higher', 4),
  'alignment': Meaning('alignment', '', 'higher', 4),
  'CLIPScore': Meaning('CLIPScore', '', 'higher', 4),
  'HPSv2': Meaning('HPSv2', '', 'higher', 3),
  'tone_right': Meaning('tone right', '', 'higher', 4),
  'name_top1': Meaning('name top 1', '', 'higher', 4),
  'name_top5': Meaning('name top 5', '', 'higher', 4),
  'class_top1': Meaning('class top 1', '', 'higher', 4),
  'class_top5': Meaning('class top 5', '', 'higher', 4),
  'rfid': Meaning('rFID', '', 'lower', 4),
  'psnr': Meaning('PSNR', 'dB', 'higher', 3),
  'ssim': Meaning('SSIM', '', 'higher', 4),
  'lpips': Meaning('LPIPS', '', 'lower', 4),
  'codes_used': Meaning('share of codes used', '', '', 4),
  'code_perplexity': Meaning('perplexity of codes', '', '', 2),
}
# Values of scenes: 'task.NAME' and 'aspect.NAME' are shares of right pictures.
_OF_SCENES = ('task.', 'aspect.')


@dataclasses.dataclass(frozen=True)
class Value:
  """A measured number.

  Attributes:
    value: the number.
    error: how much it varies; None if unknown.
    error_of: what `error` is, such as 'standard error over pictures'; '' without an error.
  """

  value: float
  error: float | None = None
  error_of: str = ''

  def text(self, digits: int) -> str:
    error = '' if self.error is None else f' ± {self.error:.{digits}f}'
    return f'{self.value:.{digits}f}{error}'


@dataclasses.dataclass(frozen=True)
class Measurement:
  """Numbers and their protocol; all attributes are JSON.

  Attributes:
    kind: what was measured, such as 'samples' or 'tokenizer'.
    protocol: everything that the numbers depend on besides what was measured. Entries may be nested.
    subject: what was measured.
    values: key of MEANINGS -> number.
    remarks: what is unreliable or left out.
  """

  kind: str
  protocol: Mapping[str, Any]
  subject: Mapping[str, Any]
  values: Mapping[str, Value]
  remarks: Sequence[str] = ()

  def content(self) -> dict[str, Any]:
    """Returns the content of the file."""
    return {'schema': SCHEMA, **dataclasses.asdict(self)}

  def json(self) -> str:
    """Renders the file."""
    return _rendered(self.content())

  def cells(self) -> list[list[str]]:
    """Returns a header and a line for each number."""
    lines = [['', 'value', 'unit', 'better', '± is the']]
    for name, value in self.values.items():
      label, unit, better, digits = _meaning(name)
      lines.append([label, value.text(digits), unit or '-', better or '-', value.error_of or '-'])
    return lines

  def notes(self) -> list[str]:
    """Returns lines with what was measured, the protocol and the remarks."""
    return [
      'Measured: ' + _listed(self.subject),
      'Protocol: ' + _listed(self.protocol),
      *self.remarks,
    ]

  def text(self) -> str:
    """Renders the table for a terminal."""
    return '\n'.join([tables.text(self.cells()), '', *self.notes()])

  def markdown(self) -> str:
    """Renders the table in Markdown."""
    return '\n\n'.join(['# Measurement', tables.markdown(self.cells()), *self.notes()]) + '\n'


def of_row(row: distribution.Row, inception: bool) -> dict[str, Value]:
  """Returns the numbers of a row of `distribution` that are defined.

  Args:
    row: the row.
    inception: whether its features are Inception's, over which the Fréchet distance is the FID.
  """
  shares: dict[str, float | None] = {
    'fid' if inception else 'frechet_distance': row.frechet_distance,
    'precision': row.precision,
    'recall': row.recall,
  }
  found = {name: Value(share) for name, share in shares.items() if share is not None}
  if row.frechet_distance is not None and row.frechet_error is not None:
    found['fid' if inception else 'frechet_distance'] = Value(
      row.frechet_distance, row.frechet_error, 'standard error over captions (delta method)'
    )
  if row.inception_score is not None:
    score = row.inception_score
    found['inception_score'] = Value(score.mean, score.error, 'deviation over parts')
  estimates = {} if row.alignment is None else {'alignment': row.alignment}
  for name, estimate in {**estimates, **row.scores}.items():
    of_what = '' if estimate.error is None else 'standard error over captions'
    found[name] = Value(estimate.mean, estimate.error, of_what)
  return found


def row_of(found: Measurement) -> distribution.Row:
  """Returns the row of samples that were compared with a reference, without alignment."""
  values = found.values
  distance = values['fid'] if 'fid' in values else values['frechet_distance']
  score = values.get('inception_score')
  precision, recall = values.get('precision'), values.get('recall')
  return distribution.Row(
    pictures=found.protocol['pictures'],
    real=found.protocol['reference'].get('pictures'),
    frechet_distance=distance.value,
    frechet_error=distance.error,
    precision=None if precision is None else precision.value,
    recall=None if recall is None else recall.value,
    inception_score=None if score is None else distribution.Estimate(score.value, score.error),
  )


def alignment_of(found: Mapping[str, Measurement]) -> distribution.Estimate | None:
  """Returns the alignment among a report's measurements; None without a ranker."""
  values = [one.values['alignment'] for one in found.values() if 'alignment' in one.values]
  return distribution.Estimate(values[0].value, values[0].error) if values else None


def with_measurements(report: str, found: Mapping[str, Measurement]) -> str:
  """Adds measurements to the JSON of a report.

  Args:
    report: the JSON, an object without the key `measurements`.
    found: {name: measurement}.
  """
  content = json.loads(report)
  return _rendered(content | {MEASUREMENTS: {name: one.content() for name, one in found.items()}})


def _rendered(content: Mapping[str, Any]) -> str:
  return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + '\n'


def read(path: str) -> Measurement:
  """Reads the file of a measurement.

  Raises:
    UserError: it can't be read, or isn't the file of a measurement.
  """
  content = _content(path)
  if not isinstance(content, dict) or content.get('schema') != SCHEMA:
    raise UserError(
      f"{path} isn't a measurement ({SCHEMA}), as `parti-jax evaluate_samples` and "
      '`parti-jax evaluate_tokenizer` write it to measurement.json, nor a report of `parti-jax evaluate`'
    )
  return _parsed(path, content)


def read_all(path: str) -> dict[str, Measurement]:
  """Reads the measurements of a file: {name: measurement}.

  Args:
    path: a measurement, whose name is '', or a report with measurements.

  Raises:
    UserError: it can't be read, or is neither.
  """
  content = _content(path)
  if isinstance(content, dict) and MEASUREMENTS in content:
    return of_report(path, content)
  return {'': read(path)}


def of_report(path: str, report: Mapping[str, Any]) -> dict[str, Measurement]:
  """Returns the measurements of a report's content; none if an older version wrote it.

  Raises:
    UserError: they are damaged; the message names `path`.
  """
  found = report.get(MEASUREMENTS, {})
  if not isinstance(found, dict):
    raise UserError(f'{path} is damaged: {MEASUREMENTS} has no names')
  for name, content in found.items():
    if not isinstance(content, dict) or content.get('schema') != SCHEMA:
      raise UserError(f"{path} is damaged: {name} isn't a measurement ({SCHEMA})")
  return {name: _parsed(f'{path}{_CHOICE}{name}', content) for name, content in found.items()}


def _content(path: str) -> Any:
  try:
    return storage.read_json(path)
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror or error})') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error})') from error


def _parsed(path: str, content: Mapping[str, Any]) -> Measurement:
  for name, kind in (('protocol', dict), ('subject', dict), ('values', dict), ('kind', str)):
    if not isinstance(content.get(name), kind):
      raise UserError(f'{path} is damaged: it lacks {name}')
  remarks = content.get('remarks', [])
  return Measurement(
    content['kind'],
    content['protocol'],
    content['subject'],
    {name: _value(path, name, value) for name, value in content['values'].items()},
    remarks if isinstance(remarks, list) else [],
  )


def _value(path: str, name: str, value: Any) -> Value:
  if isinstance(value, dict):
    error = value.get('error')
    if _is_number(value.get('value')) and (error is None or (_is_number(error) and error >= 0)):
      return Value(value['value'], error, str(value.get('error_of') or ''))
  raise UserError(f'{path} is damaged: the value {name} is not a number')


def _is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, int | float):
    return False
  try:
    return math.isfinite(value)
  except OverflowError:  # A whole number beyond float64.
    return False


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
  """Returns {entry: (value in one, value in the other)} where nested entries differ.

  An entry within another is named 'reference.digest'; one that is missing has the value None.
  """
  flat = dict(_flat(one)), dict(_flat(other))
  names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
  pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
  return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _flat(entries: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  for name, value in entries.items():
    if isinstance(value, Mapping) and value:
      yield from _flat(value, f'{prefix}{name}.')
    else:
      yield prefix + name, value


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Two measurements by the same protocol."""

  names: tuple[str, str]
  measurements: tuple[Measurement, Measurement]

  def cells(self) -> list[list[str]]:
    """Returns a header and a line for each number that both have."""
    one, other = self.measurements
    lines = [['', 'better', *self.names, 'difference', 'standard errors']]
    for name in one.values:
      if name in other.values:
        label, _, better, digits = _meaning(name)
        pair = one.values[name], other.values[name]
        apart = pair[1].value - pair[0].value
        error = _joint_error(*pair)
        lines.append(
          [
            label,
            better or '-',
            *(value.text(digits) for value in pair),
            f'{apart:+.{digits}f}',
            '-' if not error else f'{abs(apart) / error:.1f}',
          ]
        )
    return lines

  def text(self) -> str:
    """Renders the numbers, and in which entries the subjects differ."""
    one, other = self.measurements
    lines = [tables.text(self.cells()), '']
    lines.append(
      'The last column is the difference in its standard errors, as if both measurements were '
      'independent.'
    )
    for name, values, others in (
      (self.names[0], one.values, other.values),
      (self.names[1], other.values, one.values),
    ):
      if alone := [_meaning(value).label for value in values if value not in others]:
        lines.append(f'Only in {name}: {", ".join(alone)}.')
    lines += [
      f'{name}: {_short(pair[0])} in {self.names[0]}, {_short(pair[1])} in {self.names[1]}'
      for name, pair in differences(one.subject, other.subject).items()
    ]
    return '\n'.join([*lines, 'Protocol of both: ' + _listed(one.protocol)])


@dataclasses.dataclass(frozen=True)
class Comparisons:
  """The measurements of the same names in two files.

  Attributes:
    pairs: the comparisons.
    alone: file -> names that only it has.
  """

  pairs: Sequence[Comparison]
  alone: Mapping[str, Sequence[str]]

  def text(self) -> str:
    """Renders all comparisons, and which measurements only one file has."""
    lines = [f'Only in {path}: {_some(names)}.' for path, names in self.alone.items() if names]
    blocks = [pair.text() for pair in self.pairs]
    return '\n\n'.join([*blocks, *(['\n'.join(lines)] if lines else [])])


def compare(paths: tuple[str, str]) -> Comparisons:
  """Compares two measurements, or those of the same names in two reports.

  Args:
    paths: their files; FILE#NAME chooses a measurement of a report.

  Raises:
    UserError: a file can't be read, no names are the same, or protocols differ; the message names the
      entries.
  """
  one, other = (_chosen(path) for path in paths)
  if len(one) == len(other) == 1:
    return Comparisons([_compared(next(iter(one.items())), next(iter(other.items())))], {})
  # Keyed by the names within the files.
  names = [{_name(path): path for path in found} for found in (one, other)]
  common = [name for name in names[0] if name in names[1]]
  if not common:
    raise UserError(
      f'{paths[0]} has the measurements {_some(list(names[0]))}, and {paths[1]} {_some(list(names[1]))}; '
      f'choose one of each as FILE{_CHOICE}NAME'
    )
  places = [(names[0][name], names[1][name]) for name in common]
  return Comparisons(
    [_compared((first, one[first]), (second, other[second])) for first, second in places],
    {path: [name for name in own if name not in common] for path, own in zip(paths, names)},
  )


def _chosen(path: str) -> dict[str, Measurement]:
  """Returns {FILE or FILE#NAME: measurement} for a path that may choose one."""
  file, choice, name = path.partition(_CHOICE)
  if os.path.exists(path) or not choice:
    file, name = path, ''
  found = read_all(file)
  if not found:
    raise UserError(f'{file} has no measurements')
  if name:
    if name not in found:
      raise UserError(f'{file} has no measurement {name!r}, but {_some(list(found))}')
    found = {name: found[name]}
  return {f'{file}{_CHOICE}{name}' if name else file: one for name, one in found.items()}


def _name(place: str) -> str:
  return place.rpartition(_CHOICE)[2]


def _some(names: Sequence[str]) -> str:
  """Lists names, the first ones of many."""
  more = f' and {len(names) - _MOST_NAMED} more' if len(names) > _MOST_NAMED else ''
  return ', '.join(names[:_MOST_NAMED]) + more


def _compared(one: tuple[str, Measurement], other: tuple[str, Measurement]) -> Comparison:
  """Compares two measurements, (place, measurement); raises UserError as `compare`."""
  paths, measurements = (one[0], other[0]), (one[1], other[1])
  different = differences(*({'kind': found.kind, **found.protocol} for found in measurements))
  if different:
    named = [
      f'{name} ({_short(pair[0])} and {_short(pair[1])})'
      for name, pair in list(different.items())[:_MOST_NAMED]
    ]
    more = f', and {len(different) - _MOST_NAMED} more' if len(different) > _MOST_NAMED else ''
    raise UserError(
      f'{paths[0]} and {paths[1]} were not measured by the same protocol, so their numbers cannot be '
      f'compared; they differ in {", ".join(named)}{more}. Measure one of them again like the other'
    )
  if not set(measurements[0].values) & set(measurements[1].values):
    raise UserError(f'{paths[0]} and {paths[1]} have no number in common')
  return Comparison(paths, measurements)


def _joint_error(one: Value, other: Value) -> float | None:
  """Returns the standard error of a difference; None unless both have standard errors."""
  for value in (one, other):
    if value.error is None or not value.error_of.startswith('standard error'):
      return None
  assert one.error is not None and other.error is not None
  return math.hypot(one.error, other.error)


def _meaning(name: str) -> Meaning:
  if name.startswith(_OF_SCENES):
    return Meaning(name.replace('.', ': ', 1), '', 'higher', 4)
  return MEANINGS.get(name) or Meaning(name, '', '', 4)


def _listed(entries: Mapping[str, Any]) -> str:
  return '; '.join(f'{name} {_short(value)}' for name, value in _flat(entries)) or 'nothing'


def _short(value: Any) -> str:
  """Returns a value as a text, in which digests are shortened."""
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  hexadecimal = len(text) == 64 and not set(text) - set('0123456789abcdef')
  return f'{text[:12]}…' if hexadecimal else text

"""Numbers with the protocol that they were measured by, in one form that can be compared.

The file of a measurement is JSON:

  {"schema": "parti_jax.measurement.1", "kind": "samples",
   "protocol": {"pictures": 50000, "picture_size": [256, 256], "reference": {"digest": ...}, ...},
   "subject": {"samples": "samples.npz", "seed": 0, "guidance_scale": 1.5, ...},
   "values": {"fid": {"value": 3.1, "error": 0.04, "error_of": "..."}, ...},
   "remarks": [...]}

Two measurements can be compared if their protocols are equal. `subject` is what was measured, such as
the model, its seed and its guidance. It may differ, and `compare` shows where.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
# Maximum number of entries of a protocol that a message names.
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
  'rfid': Meaning('rFID', '', 'lower', 4),
  'psnr': Meaning('PSNR', 'dB', 'higher', 3),
  'ssim': Meaning('SSIM', '', 'higher', 4),
  'lpips': Meaning('LPIPS', '', 'lower', 4),
  'codes_used': Meaning('share of codes used', '', '', 4),
  'code_perplexity': Meaning('perplexity of codes', '', '', 2),
}


@dataclasses.dataclass(frozen=True)
class Value:
  """A measured number.

  Attributes:
    value: the number.
    error: how much it varies; None if nothing tells that.
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

  def json(self) -> str:
    """Renders the file."""
    content = {'schema': SCHEMA, **dataclasses.asdict(self)}
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + '\n'

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
  if row.inception_score is not None:
    score = row.inception_score
    found['inception_score'] = Value(score.mean, score.error, 'deviation over parts')
  estimates = {} if row.alignment is None else {'alignment': row.alignment}
  for name, estimate in {**estimates, **row.scores}.items():
    of_what = '' if estimate.error is None else 'standard error over captions'
    found[name] = Value(estimate.mean, estimate.error, of_what)
  return found


def read(path: str) -> Measurement:
  """Reads the file of a measurement.

  Raises:
    UserError: it can't be read, or isn't the file of a measurement.
  """
  try:
    content = storage.read_json(path)
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror or error})') from error
  except ValueError as error:
    raise UserError(f'{path} is not JSON ({error})') from error
  if not isinstance(content, dict) or content.get('schema') != SCHEMA:
    raise UserError(
      f"{path} isn't a measurement ({SCHEMA}), as `parti-jax evaluate_samples` and "
      '`parti-jax evaluate_tokenizer` write it to measurement.json'
    )
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


def compare(paths: tuple[str, str]) -> Comparison:
  """Compares two measurements.

  Args:
    paths: their files.

  Raises:
    UserError: a file can't be read, or the protocols differ; the message names the entries.
  """
  one, other = (read(path) for path in paths)
  different = differences(
    {'kind': one.kind, **one.protocol}, {'kind': other.kind, **other.protocol}
  )
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
  if not set(one.values) & set(other.values):
    raise UserError(f'{paths[0]} and {paths[1]} have no number in common')
  return Comparison(paths, (one, other))


def _joint_error(one: Value, other: Value) -> float | None:
  """Returns the standard error of a difference; None unless both have standard errors."""
  for value in (one, other):
    if value.error is None or not value.error_of.startswith('standard error'):
      return None
  assert one.error is not None and other.error is not None
  return math.hypot(one.error, other.error)


def _meaning(name: str) -> Meaning:
  return MEANINGS.get(name) or Meaning(name, '', '', 4)


def _listed(entries: Mapping[str, Any]) -> str:
  return '; '.join(f'{name} {_short(value)}' for name, value in _flat(entries)) or 'nothing'


def _short(value: Any) -> str:
  """Returns a value as a text, in which digests are shortened."""
  text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
  hexadecimal = len(text) == 64 and not set(text) - set('0123456789abcdef')
  return f'{text[:12]}…' if hexadecimal else text

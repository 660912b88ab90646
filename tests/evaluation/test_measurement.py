"""Measurements as files, and which of them may be compared."""

import dataclasses
import json

import pytest

from parti_jax.cli import main
from parti_jax.core.errors import UserError
from parti_jax.evaluation import measurement

ONE = measurement.Measurement(
  'samples',
  {'pictures': 100, 'resize': 'none', 'reference': {'digest': 'ab' * 32, 'pictures': 50}},
  {'samples': 'a.npz', 'drawn_with': {'seed': 0, 'sampling': {'guidance_scale': 1.5}}},
  {
    'fid': measurement.Value(12.5, 0.3, 'standard error over pictures (delta method)'),
    'inception_score': measurement.Value(7.0, 0.2, 'deviation over 10 parts'),
    'precision': measurement.Value(0.5),
  },
  ['A remark.'],
)


def _written(path, found):
  path.write_text(found.json(), encoding='utf-8')
  return str(path)


def _changed(**changes):
  return dataclasses.replace(ONE, **changes)


def test_a_file_is_read_as_it_was_written(tmp_path):
  assert measurement.read(_written(tmp_path / 'a.json', ONE)) == ONE
  text, markdown = ONE.text(), ONE.markdown()
  for expected in ('FID', '12.5000 ± 0.3000', 'lower', 'A remark.', 'reference.pictures 50'):
    assert expected in text and expected in markdown
  assert 'abababababab…' in text and 'ab' * 32 not in text


def test_measurements_by_the_same_protocol_are_compared(tmp_path, capsys):
  other = _changed(
    subject={'samples': 'b.npz', 'drawn_with': {'seed': 0, 'sampling': {'guidance_scale': 2.0}}},
    values={
      'fid': measurement.Value(10.5, 0.4, 'standard error over pictures (delta method)'),
      'inception_score': measurement.Value(8.0, 0.1, 'deviation over 10 parts'),
      'recall': measurement.Value(0.1),
    },
  )
  paths = _written(tmp_path / 'a.json', ONE), _written(tmp_path / 'b.json', other)
  (pair,) = measurement.compare(paths).pairs
  lines = pair.cells()
  assert lines[1:] == [
    ['FID', 'lower', '12.5000 ± 0.3000', '10.5000 ± 0.4000', '-2.0000', '4.0'],
    # Deviations between parts are not standard errors.
    ['inception score', 'higher', '7.000 ± 0.200', '8.000 ± 0.100', '+1.000', '-'],
  ]
  assert main.main(['compare', *paths]) == 0
  printed = capsys.readouterr().out
  assert f'drawn_with.sampling.guidance_scale: 1.5 in {paths[0]}, 2.0 in {paths[1]}' in printed
  assert 'drawn_with.seed' not in printed
  assert f'Only in {paths[0]}: precision.' in printed
  assert f'Only in {paths[1]}: recall.' in printed


def test_other_protocols_are_refused_by_the_entries_that_differ(tmp_path, capsys):
  other = _changed(
    kind='tokenizer',
    protocol={
      'pictures': 100,
      'resize': 'bicubic',
      'reference': {'digest': 'cd' * 32, 'pictures': 50},
      'compression': 'JPEG',
    },
  )
  paths = _written(tmp_path / 'a.json', ONE), _written(tmp_path / 'b.json', other)
  assert main.main(['compare', *paths]) == 2
  error = capsys.readouterr().err
  for expected in (
    'kind (samples and tokenizer)',
    'resize (none and bicubic)',
    'reference.digest (abababababab… and cdcdcdcdcdcd…)',
    'compression (null and JPEG)',
  ):
    assert expected in error
  assert 'reference.pictures' not in error and ' pictures (' not in error


@pytest.mark.parametrize(
  'change, named',
  [
    (lambda content: content | {'schema': 'other'}, "isn't a measurement"),
    (lambda content: [content], "isn't a measurement"),
    (lambda content: content | {'protocol': 3}, 'lacks protocol'),
    (
      lambda content: content | {'values': {'fid': {'value': 'x'}}},
      'the value fid is not a number',
    ),
    (lambda content: content | {'values': {'fid': 3}}, 'the value fid is not a number'),
    (
      lambda content: content | {'values': {'fid': {'value': 10**400}}},
      'the value fid is not a number',
    ),
    (
      lambda content: content | {'values': {'fid': {'value': 1, 'error': -1}}},
      'the value fid is not a number',
    ),
  ],
)
def test_other_files_are_refused(tmp_path, change, named):
  path = tmp_path / 'a.json'
  path.write_text(json.dumps(change(json.loads(ONE.json()))))
  with pytest.raises(UserError, match=named):
    measurement.read(str(path))


def test_nothing_in_common_and_no_file(tmp_path):
  other = _changed(values={'recall': measurement.Value(0.1)})
  paths = _written(tmp_path / 'a.json', ONE), _written(tmp_path / 'b.json', other)
  with pytest.raises(UserError, match='no number in common'):
    measurement.compare(paths)
  with pytest.raises(UserError, match='cannot be read'):
    measurement.read(str(tmp_path / 'nowhere.json'))
  (tmp_path / 'c.json').write_text('{')
  with pytest.raises(UserError, match='is not JSON'):
    measurement.read(str(tmp_path / 'c.json'))


def _report(path, **found):
  path.write_text(measurement.with_measurements('{"splits": []}', found), encoding='utf-8')
  return str(path)


def test_reports_are_compared_by_the_names_of_their_measurements(tmp_path, capsys):
  better = _changed(values={'fid': measurement.Value(10.5)})
  paths = _report(tmp_path / 'a.json', x=ONE, y=better), _report(tmp_path / 'b.json', y=ONE, z=ONE)
  (pair,) = measurement.compare(paths).pairs
  assert pair.names == (f'{paths[0]}#y', f'{paths[1]}#y') and pair.measurements == (better, ONE)
  assert main.main(['compare', *paths]) == 0
  printed = capsys.readouterr().out
  assert f'Only in {paths[0]}: x.' in printed and f'Only in {paths[1]}: z.' in printed
  # One of each, whatever their names, and one of a report with a measurement's own file.
  (pair,) = measurement.compare((f'{paths[0]}#y', f'{paths[1]}#z')).pairs
  assert pair.cells()[1][-2:] == ['+2.0000', '-']
  (pair,) = measurement.compare((f'{paths[0]}#x', _written(tmp_path / 'c.json', better))).pairs
  assert pair.measurements == (ONE, better)
  # A file whose name has the sign.
  (pair,) = measurement.compare((_written(tmp_path / 'a#x.json', ONE), f'{paths[0]}#y')).pairs
  assert pair.measurements == (ONE, better)


def test_reports_that_cannot_be_compared(tmp_path):
  unlike = _changed(protocol={**ONE.protocol, 'resize': 'bicubic'})
  paths = _report(tmp_path / 'a.json', x=ONE, y=ONE), _report(tmp_path / 'b.json', x=ONE, y=unlike)
  with pytest.raises(UserError, match='a.json#y and .*b.json#y were not measured by .* resize'):
    measurement.compare(paths)
  assert len(measurement.compare((paths[0], f'{paths[1]}#x')).pairs) == 1
  with pytest.raises(UserError, match="has no measurement 'w', but x, y"):
    measurement.compare((f'{paths[0]}#w', paths[1]))
  other = _report(tmp_path / 'c.json', v=ONE, w=ONE)
  with pytest.raises(UserError, match='has the measurements x, y, and .* v, w; choose one of each'):
    measurement.compare((paths[0], other))
  with pytest.raises(UserError, match='has no measurements'):
    measurement.compare((_report(tmp_path / 'd.json'), other))
  (tmp_path / 'e.json').write_text('{"measurements": {"x": {"schema": "other"}}}')
  with pytest.raises(UserError, match="e.json is damaged: x isn't a measurement"):
    measurement.compare((str(tmp_path / 'e.json'), other))

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
  lines = measurement.compare(paths).cells()
  assert lines[1:] == [
    ['FID', 'lower', '12.5000 ± 0.3000', '10.5000 ± 0.4000', '-2.0000', '4.0'],
    # Deviations between parts are no standard errors.
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

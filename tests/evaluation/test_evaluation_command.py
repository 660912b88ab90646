"""Tests of `parti-jax evaluate`, with a fake pipeline and artificial emoji."""

import argparse
import json

import evaluation_fakes as fakes
import pytest
from PIL import Image

import parti_jax
from parti_jax.cli import evaluate
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation import measurement
from parti_jax.evaluation import output_folder


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = fakes.FakePipeline(lambda caption, index: fakes.render(caption))
  # Set in its dictionary: setattr would first get the real one, and so import JAX.
  monkeypatch.setitem(
    vars(parti_jax), 'load', lambda path=None, ranker=None, weights='float', cache='float': pipeline
  )
  monkeypatch.setattr(openmoji, 'pictures', fakes.small_set)
  monkeypatch.setattr(openmoji, 'render', fakes.render)
  return pipeline


def run(*arguments):
  parser = argparse.ArgumentParser()
  evaluate.add_arguments(parser)
  return evaluate.run(parser.parse_args(arguments))


def test_prints_the_table_and_writes_reports_and_sheets(pipeline, tmp_path, capsys):
  folder = tmp_path / 'new' / 'folder'
  status = run(
    '--output_dir',
    str(folder),
    '--splits',
    'validation',
    'unseen_combinations',
    '--num_images',
    '2',
    '--guidance_scale',
    '1.5',
    '--batch_size',
    '4',
    '--weights',
    'int8',
    '--cache',
    'int8',
  )
  assert status == 0
  assert sorted(path.name for path in folder.iterdir()) == [
    'report.json',
    'report.md',
    'unseen_combinations.png',
    'validation.png',
  ]
  content = json.loads((folder / 'report.json').read_text())
  assert content['num_images'] == 2 and content['sampling'] == {
    'guidance_scale': 1.5,
    'weights': 'int8',
    'cache': 'int8',
  }
  measured = measurement.read_all(str(folder / 'report.json'))
  assert list(measured) == ['validation/judge', 'unseen_combinations/judge']
  for split, found in zip(content['splits'], measured.values()):
    expected = split['rows']['generated']['name_top1']
    assert found.values['name_top1'].value == expected['mean']
    assert found.values['name_top1'].error == expected['standard_error']
    assert found.protocol['prompts'] == split['prompts']
  assert 'tone_right' not in measured['validation/judge'].values  # Its names have no tones.
  assert (folder / 'report.md').read_text().startswith('# Evaluation on OpenMoji\n')
  assert Image.open(folder / 'validation.png').width > 3 * 128
  printed = capsys.readouterr()
  assert 'unseen_combinations: 4 of 4 prompts' in printed.out
  assert str(folder / 'report.json') in printed.out
  assert 'validation: judging' in printed.err
  assert pipeline.settings['guidance_scale'] == 1.5 and pipeline.settings['batch_size'] == 4


@pytest.mark.parametrize(
  'arguments, message',
  [
    (['--splits', 'tset'], "unknown split 'tset'; choose from train, validation"),
    (['--num_images', '0'], '--num_images must be a positive number, not 0'),
    (['--max_prompts', '-3'], '--max_prompts'),
    (['--train_prompts', '0'], '--train_prompts'),
    (['--batch_size', '0'], '--batch_size'),
    (['--seed', '-1'], '--seed=-1 must not be negative'),
    (['--seed', '4294967296'], '--seed=4294967296 must be a whole number from 0 to 4294967295'),
    (['--image_size', '1000000'], '--image_size=1000000 must be a whole number from 1 to 4096'),
    (['--num_images', '3000000000'], '--num_images=3000000000 must be'),
    (['--top_p', '2'], 'top_p=2'),
  ],
)
def test_bad_flags_leave_no_files(pipeline, tmp_path, arguments, message):
  folder = tmp_path / 'folder'
  with pytest.raises(UserError, match=message):
    run('--output_dir', str(folder), *arguments)
  assert not folder.exists() and not pipeline.generated


def test_an_output_folder_that_is_a_file(pipeline, tmp_path):
  path = tmp_path / 'file'
  path.write_text('mine')
  with pytest.raises(UserError, match='--output_dir .*file: cannot write there'):
    run('--output_dir', str(path))
  assert path.read_text() == 'mine' and not pipeline.generated


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
  path = tmp_path / 'report.md'
  path.write_text('old')

  def fail(*_):
    raise OSError('disk full')

  monkeypatch.setattr(output_folder.os, 'replace', fail)
  with pytest.raises(UserError, match='report.md cannot be written .disk full'):
    output_folder.write(path, b'new')
  assert path.read_text() == 'old' and list(tmp_path.iterdir()) == [path]

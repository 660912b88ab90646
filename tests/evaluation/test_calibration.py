"""Tests calibration of a threshold: its statistical test, its order, and resuming."""

import argparse
import json
import types

import evaluation_fakes as fakes
import numpy as np
import pytest

import parti_jax
from parti_jax.cli import calibrate
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation import calibration
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import adaptive


def _losses(rng, mean, count=120):
  """Returns losses in {-0.5, 0, 0.5}, mostly 0, with an expectation."""
  return rng.choice([-0.5, 0.0, 0.5], count, p=[0.1 - mean, 0.8, 0.1 + mean])


def test_a_loss_at_the_tolerance_seldom_passes_and_a_smaller_one_does():
  rng = np.random.default_rng(0)
  passes = lambda mean: np.mean(
    [calibration.p_value(_losses(rng, mean), 0.08) <= 0.1 for _ in range(400)]
  )
  assert passes(0.08) < 0.1 + 3 * (0.1 * 0.9 / 400) ** 0.5
  assert passes(0.0) > 0.5
  assert calibration.p_value(np.zeros(120), 0.05) < 0.02
  assert calibration.p_value(np.full(120, 0.1), 0.05) > 0.5


def test_p_value_by_hand():
  # For two losses in [0, 1] at the tolerance 0.5, the first bet uses the variance 0.25.
  first = min((2 * np.log(20) / (2 * 0.25)) ** 0.5, 0.75 / 0.5)
  variance = (0.25 + (0.0 - 0.25) ** 2) / 2
  second = min((2 * np.log(20) / (2 * variance)) ** 0.5, 0.75 / 0.5)
  capital = (1 + first * 0.5) * (1 + second * 0.5)
  assert calibration.p_value(np.zeros(2), 0.5, 0.0, 1.0) == pytest.approx(1 / capital)
  with pytest.raises(ValueError, match='not in'):
    calibration.p_value(np.array([1.5]), 0.1)


def test_the_first_failure_ends_the_sequence():
  p_values = {0.9: 0.01, 0.8: 0.04, 0.7: 0.2, 0.6: 0.001}
  measure = lambda threshold: {'threshold': threshold, 'p_value': p_values[threshold]}
  found, rows = calibration.fixed_sequence(p_values, measure, 0.05)
  assert found == 0.8 and [row['threshold'] for row in rows] == [0.9, 0.8, 0.7]
  assert calibration.fixed_sequence([0.7, 0.6], measure, 0.05)[0] is None


class Pipeline(fakes.FakePipeline):
  """A fake that generates other pictures for a share of prompts below the threshold 0.5."""

  sampling = sampling_settings.SamplingSettings(guidance_scale=2.0)
  decoder_layers = 4
  ranker = None

  def generate(self, prompts, exit_threshold=1.0, **others):
    self.draw = lambda caption, index: fakes.render(
      'thing 0' if exit_threshold < 0.5 and len(caption) % 2 else caption
    )
    result = super().generate(prompts, **others)
    shape = result.images.shape[:2] + (64,)
    usage = adaptive.Usage(np.full(shape, 2), np.zeros(shape, bool), np.full(shape + (2,), 3))
    return types.SimpleNamespace(
      images=result.images, usage=None if exit_threshold == 1.0 else usage
    )


@pytest.fixture(name='pipeline')
def fixture_pipeline(monkeypatch):
  pipeline = Pipeline(None)
  monkeypatch.setitem(vars(parti_jax), 'load', lambda path=None: pipeline)
  monkeypatch.setattr(openmoji, 'pictures', fakes.small_set)
  monkeypatch.setattr(openmoji, 'render', fakes.render)
  return pipeline


def run(*arguments):
  parser = argparse.ArgumentParser()
  calibrate.add_arguments(parser)
  return calibrate.run(parser.parse_args(arguments))


def test_the_command_finds_the_threshold_and_resumes(pipeline, tmp_path, capsys):
  output = tmp_path / 'calibration.json'
  arguments = (
    '--split',
    'train',
    '--tolerance',
    '0.3',
    '--num_images',
    '2',
    '--candidates',
    '0.4',
    '0.9',
    '0.6',
    '--output',
    str(output),
  )
  assert run(*arguments) == 0
  content = json.loads(output.read_text())
  assert content['result']['threshold'] == 0.6
  assert [row['threshold'] for row in content['result']['rows']] == [0.9, 0.6, 0.4]
  assert content['result']['rows'][0]['layers'] == 2 and content['measured']['1']['layers'] == 4
  assert len(content['measured']['0.6']['scores']) == len(content['prompts'])
  printed = capsys.readouterr().out
  assert '--exit_threshold=0.6' in printed and printed.count('\n| ') == 4
  # A second run generates nothing, and may use another tolerance.
  pipeline.generated.clear()
  assert run(*arguments[:2], '--tolerance', '0.9', *arguments[4:]) == 0
  assert json.loads(output.read_text())['result']['threshold'] == 0.4
  assert not pipeline.generated
  with pytest.raises(UserError, match='another seed'):
    run(*arguments, '--seed', '1')


def test_too_few_prompts_cause_a_warning_before_sampling(pipeline, tmp_path, capsys):
  output = ('--output', str(tmp_path / 'calibration.json'))
  run('--split', 'train', '--max_prompts', '3', '--candidates', '0.9', '--num_images', '1', *output)
  assert 'warning: 3 prompts are too few for --tolerance=0.05' in capsys.readouterr().err
  pipeline.generated.clear()
  with pytest.raises(UserError, match='tone_right: none of the 2 prompts can be judged'):
    run('--split', 'validation', '--measure', 'tone_right', *output)
  assert not pipeline.generated


def test_thresholds_that_look_alike_are_measured_separately(pipeline, tmp_path):
  output = tmp_path / 'calibration.json'
  run(
    '--split',
    'train',
    '--candidates',
    '0.99999999',
    '0.9000001',
    '0.9',
    '--num_images',
    '1',
    '--tolerance',
    '0.9',
    '--output',
    str(output),
  )
  measured = json.loads(output.read_text())['measured']
  assert measured.keys() == {'1', '0.99999999', '0.9000001', '0.9'}


@pytest.mark.parametrize(
  'arguments, message',
  [
    (('--seed', '4294967296'), '--seed=4294967296'),
    (('--candidates', 'nan'), '--candidates: nan'),
    (('--tolerance', 'nan'), '--tolerance=nan'),
    (('--num_images', '3000000000'), '--num_images='),
    (('--risk', '0'), '--risk=0'),
    (('--candidates', '1'), '--candidates: 1'),
    (('--measure', 'ranker'), 'no ranker'),
    (('--prompts_file', 'x.txt'), '--measure=ranker'),
    (('--split', 'test'), 'unknown split'),
  ],
)
def test_bad_flags_are_named(pipeline, tmp_path, arguments, message):
  with pytest.raises(UserError, match=message):
    run(*arguments, '--output', str(tmp_path / 'calibration.json'))
  assert not list(tmp_path.iterdir())

"""The GPU benchmark with tiny sizes on a CPU: what it reports, resuming, and its table."""

import json
import pathlib
import sys

import pytest

from parti_jax.models import flops
from parti_jax.models import generators
from parti_jax.models import parti
from parti_jax.sampling import text_to_image

sys.path.append(str(pathlib.Path(__file__).parents[2] / 'benchmarks'))

import gpu  # noqa: E402
import gpu_measurements  # noqa: E402


@pytest.fixture(name='settings')
def _settings(tiny_folder):
  return gpu_measurements.Settings(str(tiny_folder), small=True, repeats=3)


def check_timing(value):
  assert value['seconds'] in value['all_seconds'] and len(value['all_seconds']) == 3


@pytest.mark.slow
def test_losses(settings):
  found = gpu.run_section(settings, 'losses')
  assert found['finished']
  values = found['measurements']
  assert list(values) == ['tiny Parti, float32', 'tiny Parti, bfloat16', 'attention, bfloat16']
  for name in list(values)[:2]:
    first, second = values[name]['losses']
    assert first == second and first[0] != first[1]
    assert values[name]['equal']
  assert 0 < values['attention, bfloat16']['difference'] < 0.02
  assert values['attention, bfloat16']['equal']
  assert not any(values['attention, bfloat16']['cudnn'].values())
  assert {len(errors) for errors in values['attention, bfloat16']['errors'].values()} == {4}


def test_training(settings):
  found = gpu.run_section(settings, 'training')
  assert found['finished']
  for name, value in found['measurements'].items():
    system, pattern, *_ = name.split(', ')
    if system == 'PyTorch' and 'skipped' in value:
      continue
    check_timing(value)
    config = gpu_measurements.model_config(settings, attention_patterns=(pattern,))
    assert value['step_flops'] == 3 * value['batch_size'] * parti.forward_flops(config)
  remats = [name for name in found['measurements'] if name.startswith('parti_jax, global')]
  assert len(remats) == 2
  assert f'MFU {found["measurements"][remats[0]]["mfu"]:.3f}' in gpu.table(
    {'sections': {'training': found}}
  )


def test_mfu_and_ratios(settings, monkeypatch):
  """MFU counts the FLOPs of the package's own formula, for PyTorch too."""
  monkeypatch.setattr(generators, 'decoder_flops', lambda config: 900)
  step = {'batch_size': 4, 'seconds': 2.0}
  found = gpu_measurements.with_mfu(
    settings,
    {
      'parti_jax, conv, block_inputs': step | {'peak': 24_000.0},
      'parti_jax, global, block_inputs': step | {'peak': 24_000.0},
      'parti_jax, global, everything': step | {'seconds': 1.0},
      'PyTorch, conv': {'error': 'it failed'},
      'PyTorch, global': step | {'batch_size': 2},
    },
  )
  values = found['measurements']
  encoder = flops.text_encoder_forward(gpu_measurements.model_config(settings))
  of_step = 3 * 4 * (900 + encoder)
  assert values['parti_jax, conv, block_inputs']['step_flops'] == of_step
  assert values['parti_jax, conv, block_inputs']['mfu'] == of_step / 2 / 24_000
  assert found['ratios'] == {'global': pytest.approx(4.0)}


def test_sampling(settings):
  found = gpu.run_section(settings, 'sampling')
  assert found['finished']
  for batch in (1, 2):
    value = found['measurements'][f'parti_jax, batch {batch}']
    check_timing(value)
    assert value['tokens_per_second'] == pytest.approx(batch * 16 / value['seconds'])


@pytest.mark.slow
def test_options_and_demo(settings):
  options, demo = (gpu.run_section(settings, name) for name in ('options', 'demo'))
  for value in options['measurements'].values():
    if 'skipped' not in value:
      check_timing(value['off'])
      assert value['ratio'] == pytest.approx(value['off']['seconds'] / value['on']['seconds'])
  (value,) = demo['measurements'].values()
  check_timing(value)
  assert value['pictures_per_second'] == pytest.approx(2 / value['seconds'])


def test_a_model_with_random_parameters_draws(settings):
  model = text_to_image.TextToImage(gpu_measurements.random_model(settings), 'random')
  found = gpu_measurements.pictures_per_second(model, 1, 3)
  assert found['batch_size'] == 1
  check_timing(found)


def test_the_largest_batch_that_fits():
  def measure(size):
    if size > 16:
      raise MemoryError(size)
    return {'seconds': 1.0}

  is_memory = lambda error: isinstance(error, MemoryError)
  found = gpu_measurements.largest_batch((64, 16, 8), measure, is_memory)
  assert found == {'batch_size': 16, 'seconds': 1.0}
  skipped = gpu_measurements.largest_batch((64, 32), measure, is_memory)
  assert skipped == {'skipped': 'no batch of 64, 32 fits into memory'}
  with pytest.raises(MemoryError):
    gpu_measurements.largest_batch((64, 16), measure, lambda error: False)


def test_finished_sections_are_not_repeated(tmp_path, monkeypatch, capsys):
  run, output = [], tmp_path / 'gpu.json'
  answers = {
    'device': {'device': 'a GPU', 'jax': '1', 'torch': None},
    'parti_jax, batch 1': {'error': 'ended with status 1'},
  }

  def run_in_a_process(settings, section, name, seconds):
    run.append(name)
    batch = int(name.split()[-1]) if 'batch' in name else 0
    usual = {'seconds': 0.5, 'batch_size': batch, 'tokens_per_second': 32.0 * (2 - ('Py' in name))}
    return answers.get(name, usual)

  monkeypatch.setattr(gpu, 'run_in_a_process', run_in_a_process)
  command = ['--small', '--sections', 'sampling', 'demo', '--output', str(output)]
  with pytest.raises(SystemExit, match='some measurements failed'):
    gpu.main(command)
  assert 'demo, batch 2' in run and 'batch 1 | ended with status 1 |' in capsys.readouterr().out
  del run[:], answers['parti_jax, batch 1']
  gpu.main(command)
  assert len(run) == 5 and 'demo, batch 2' not in run
  assert '| sampling | parti_jax over PyTorch, batch 2 | 2.00 |' in capsys.readouterr().out
  del run[:]
  gpu.main(command)
  assert run == ['device']
  saved = json.loads(output.read_text())
  assert saved['sections']['sampling']['about']['device'] == 'a GPU'
  with pytest.raises(SystemExit, match='results of other settings'):
    gpu.main([*command, '--repeats', '9'])

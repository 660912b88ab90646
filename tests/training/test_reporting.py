"""What a run shows: lines or a bar, grids of pictures, peaks of devices, speeds."""

import io
import types

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from parti_jax.training import device_peak
from parti_jax.training import hooks
from parti_jax.training import reporting


class _Terminal(io.StringIO):
  def isatty(self):
    return True


def _shown(monkeypatch, tmp_path, stream):
  monkeypatch.setattr('sys.stderr', stream)
  reporter = reporting.Reporter(tmp_path, 100, 10)
  reporter.say('starting')
  reporter.metrics(20, {'loss': 1.23456, 'psnr': 20.0})
  reporter.advance(20)
  reporter.metrics(20, {'validation/psnr': 21.5})
  reporter.close({'not a picture': 3})
  return stream.getvalue()


def test_plain_lines_without_a_terminal(monkeypatch, tmp_path):
  shown = _shown(monkeypatch, tmp_path, io.StringIO()).splitlines()
  assert shown == [
    'starting',
    'step 20: loss 1.235 psnr 20',
    'step 20: validation/psnr 21.5',
    'examples skipped: 3 not a picture',
  ]


def test_a_progress_bar_on_a_terminal(monkeypatch, tmp_path):
  shown = _shown(monkeypatch, tmp_path, _Terminal())
  assert '20/100' in shown and 'loss 1.235' in shown
  # The training metrics are in the bar, all others and what was skipped in lines beside it.
  assert 'step 20: loss' not in shown
  assert 'step 20: validation/psnr 21.5' in shown
  assert 'examples skipped: 3 not a picture' in shown


def test_nothing_is_said_of_skipped_examples_when_there_are_none(monkeypatch, tmp_path):
  stream = io.StringIO()
  monkeypatch.setattr('sys.stderr', stream)
  reporting.Reporter(tmp_path, 1, 0).close({})
  assert stream.getvalue() == ''


def test_steps_that_are_done_again_are_shown_once(tmp_path):
  before = reporting.Reporter(tmp_path, 4, 0)
  for step in (1, 2, 3):
    before.metrics(step, {'loss': 1.0 * step})
  before.flush()  # The run is killed as it draws, and its last checkpoint is of step 1.
  (tmp_path / 'pictures').mkdir()
  (tmp_path / 'pictures' / '.samples_00000003.png.7.unfinished').write_bytes(b'half')
  # Files are read in the order of their names, which begin with the second of their start.
  for index, file in enumerate(sorted((tmp_path / 'tensorboard').iterdir())):
    file.rename(file.with_name(f'events.out.tfevents.{index}'))
  after = reporting.Reporter(tmp_path, 4, 1)
  assert not list((tmp_path / 'pictures').iterdir())
  for step in (2, 3):
    after.metrics(step, {'loss': 10.0 * step})
  after.close({})
  # The reader of TensorBoard itself.
  events = plugin_event_accumulator.EventAccumulator(str(tmp_path / 'tensorboard')).Reload()
  assert [
    (event.step, float(tensor_util.make_ndarray(event.tensor_proto)))
    for event in events.Tensors('loss')
  ] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_tiles_are_in_reading_order_on_white():
  pictures = np.stack([np.full((2, 4, 3), value, np.uint8) for value in (10, 20, 30, 40, 50)])
  grid = reporting.tile(pictures)
  assert grid.shape == (6, 8, 3)
  corners = grid[::2, ::4, 0]
  np.testing.assert_array_equal(corners, [[10, 20], [30, 40], [50, 255]])
  np.testing.assert_array_equal(grid[:2, :4], pictures[0])


def test_a_grid_is_a_png(tmp_path):
  reporter = reporting.Reporter(tmp_path, 10, 0)
  pictures = np.random.default_rng(0).integers(0, 256, (1, 4, 4, 3)).astype(np.uint8)
  reporter.pictures(7, {'samples': pictures})
  reporter.close({})
  with Image.open(tmp_path / 'pictures' / 'samples_00000007.png') as image:
    np.testing.assert_array_equal(np.asarray(image), pictures[0])


@pytest.mark.parametrize(
  'kind, peak',
  [
    ('TPU v4', 275e12),
    ('TPU v5 lite', 197e12),
    ('TPU v5', 459e12),
    ('TPU v5p', 459e12),
    ('TPU v6 lite', 918e12),
    ('NVIDIA H100 80GB HBM3', 989e12),
    ('NVIDIA H100 PCIe', 756e12),
    ('NVIDIA A100-SXM4-40GB', 312e12),
  ],
)
def test_peaks_of_known_devices(kind, peak):
  assert device_peak.device_peak(types.SimpleNamespace(device_kind=kind)) == peak


def test_the_meter_leaves_out_compilation_and_pauses(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(hooks.time, 'perf_counter', lambda: now[0])
  meter = hooks.Meter(batch_size=8, flops=100, peak=1000.0)
  now[0] = 60.0
  assert meter.read(10) == {}  # Ten steps with their compilation.
  now[0] = 62.0
  assert meter.read(20) == {
    'examples_per_second': 40.0,
    'model_flops_per_second': 500.0,
    'share_of_peak': 0.5,
  }
  now[0] = 63.0
  meter.restart(25)  # Something else took place until now.
  now[0] = 64.0
  assert meter.read(30)['examples_per_second'] == 40.0

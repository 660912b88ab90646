"""Writers of metrics and pictures: TensorBoard's, and others that gin adds."""

import io
import pathlib
import re
import subprocess
import sys
import types

import gin
import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing import plugin_event_accumulator
from tensorboard.util import tensor_util

from parti_jax.core import gin_config
from parti_jax.core import storage
from parti_jax.training import config as config_lib
from parti_jax.training import configurables  # noqa: F401
from parti_jax.training import reporting
from parti_jax.training import writers


def _read(folder):
  return plugin_event_accumulator.EventAccumulator(str(folder)).Reload()


@gin.configurable(denylist=['model_dir', 'step'])
class ListWriter(writers.Writer):
  """Keeps what it is given."""

  made = []

  def __init__(self, model_dir, step, project=gin.REQUIRED):
    self.calls = [('begin', str(model_dir), step, project)]
    self.made.append(self)

  def write_scalars(self, step, values):
    self.calls.append(('scalars', step, dict(values)))

  def write_images(self, step, images):
    self.calls.append(('images', step, {name: grid.shape for name, grid in images.items()}))

  def flush(self):
    self.calls.append(('flush',))

  def close(self):
    self.calls.append(('close',))


def test_tensorboard_shows_scalars_and_pictures(tmp_path):
  writer = writers.TensorBoardWriter(str(tmp_path), 0)
  writer.write_scalars(3, {'loss': 1.5, 'validation/psnr': np.float32(20), 'steps': 3})
  writer.write_scalars(4, {'loss': float('nan')})
  pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)
  writer.write_images(4, {'samples': pixels})
  # A reader needs no flush: what is written is with the system.
  events = _read(tmp_path / 'tensorboard')
  assert events.PluginTagToContent('scalars').keys() == {'loss', 'validation/psnr', 'steps'}
  assert events.PluginTagToContent('images').keys() == {'samples'}
  loss = [
    (event.step, tensor_util.make_ndarray(event.tensor_proto)) for event in events.Tensors('loss')
  ]
  assert [step for step, _ in loss] == [3, 4]
  assert loss[0][1] == 1.5 and loss[0][1].dtype == np.float32 and np.isnan(loss[1][1])
  (event,) = events.Tensors('samples')
  width, height, content = tensor_util.make_ndarray(event.tensor_proto).tolist()
  assert (width, height, event.step) == (b'6', b'4', 4)
  with Image.open(io.BytesIO(content)) as image:
    np.testing.assert_array_equal(np.asarray(image), pixels)
  writer.close()


def test_starts_within_a_second_are_read_in_their_order(tmp_path):
  for start in range(5):
    writer = writers.TensorBoardWriter(str(tmp_path), start)
    for step in range(start + 1, 7):
      writer.write_scalars(step, {'loss': 10.0 * start + step})
    writer.close()
  events = _read(tmp_path / 'tensorboard').Tensors('loss')
  found = {event.step: float(tensor_util.make_ndarray(event.tensor_proto)) for event in events}
  assert len(events) == 6
  assert found == {1: 1.0, 2: 12.0, 3: 23.0, 4: 34.0, 5: 45.0, 6: 46.0}


def test_events_in_a_store_are_uploaded_at_each_flush(s3_bucket):
  writer = writers.TensorBoardWriter(f'{s3_bucket}/writers', 0)
  sizes = []
  for step in (1, 2):
    writer.write_scalars(step, {'loss': 1.0})
    writer.flush()
    sizes.append(storage.sizes(f'{s3_bucket}/writers/tensorboard'))
  writer.close()
  assert len(sizes[1]) == 1 and sum(sizes[0].values()) < sum(sizes[1].values())


@pytest.mark.process
def test_no_tensorflow_is_imported(tmp_path):
  code = f"""
import sys
import numpy as np
from parti_jax.training import writers
writer = writers.TensorBoardWriter({str(tmp_path)!r}, 0)
writer.write_scalars(1, {{'loss': 1.0}})
writer.write_images(1, {{'samples': np.zeros((2, 2, 3), np.uint8)}})
writer.close()
sys.exit(any(name.split('.')[0] in ('tensorflow', 'clu') for name in sys.modules))
"""
  assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_gin_adds_a_writer(tmp_path):
  gin_config.parse(
    ['gin_configs/runs/tiny_tokenizer.gin'],
    ['train.writers = [@TensorBoardWriter, @ListWriter]', "ListWriter.project = 'parti'"],
  )
  config = config_lib.configured()
  reporter = reporting.Reporter(tmp_path, 9, 4, config.writers)
  reporter.metrics(5, {'loss': 2.0})
  reporter.pictures(5, {'samples': np.zeros((1, 4, 4, 3), np.uint8)})
  reporter.flush()
  reporter.close({})
  assert ListWriter.made.pop().calls == [
    ('begin', str(tmp_path), 4, 'parti'),
    ('scalars', 5, {'loss': 2.0}),
    ('images', 5, {'samples': (4, 4, 3)}),
    ('flush',),
    ('close',),
  ]
  assert [event.step for event in _read(tmp_path / 'tensorboard').Tensors('loss')] == [5]
  assert (tmp_path / 'pictures' / 'samples_00000005.png').exists()


def test_the_example_in_the_docs_works(tmp_path, monkeypatch):
  page = (pathlib.Path(__file__).parents[2] / 'docs' / 'runs.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  (code,) = (block for block in blocks if 'class WandbWriter' in block)
  (settings,) = (block for block in blocks if '@WandbWriter' in block)
  calls = []
  run = types.SimpleNamespace(
    log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append('finish')
  )
  wandb = types.ModuleType('wandb')
  wandb.init = lambda **arguments: calls.append(arguments) or run
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'wandb_writer.py').write_text(code)
  (tmp_path / 'mine.gin').write_text(settings)
  gin_config.parse(['gin_configs/runs/tiny_tokenizer.gin', str(tmp_path / 'mine.gin')], [])
  reporter = reporting.Reporter(tmp_path, 9, 0, config_lib.configured().writers)
  reporter.metrics(5, {'loss': 2.0})
  reporter.pictures(5, {'samples': np.zeros((1, 4, 4, 3), np.uint8)})
  reporter.flush()
  reporter.close({})
  started = {'project': 'parti', 'id': 'demo_generator', 'resume': 'allow'}
  assert calls == [started, (5, {'loss': 2.0}), 'finish']


@pytest.mark.parametrize('value', ['@TensorBoardWriter', '[3]', "'tensorboard'"])
def test_what_is_no_list_of_writers_is_refused(value):
  gin_config.parse(['gin_configs/runs/tiny_tokenizer.gin'], [f'train.writers = {value}'])
  with pytest.raises(Exception, match='must be a list of writers, such as'):
    config_lib.configured()

"""What a run shows: a progress bar or plain lines, TensorBoard metrics, picture grids."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import time

import jax
import numpy as np
import tqdm

from parti_jax.core import storage
from parti_jax.core import store_retries


class Reporter:
  """Metrics and pictures of a run, written by the first process alone.

  Args:
    model_dir: the run's folder; events go to `tensorboard/`, pictures to `pictures/`.
    steps: where training ends.
    step: where it begins.
  """

  def __init__(self, model_dir, steps: int, step: int):
    self._leads = jax.process_index() == 0
    self._directory = model_dir
    self._bar = None
    if not self._leads:
      return
    for left in storage.glob(storage.join(model_dir, 'pictures', '.*.unfinished')):
      storage.remove(left)  # A kill came while it was written.
    self._events = _Events(storage.join(model_dir, 'tensorboard'))
    _begin_session(self._events.folder, step)
    self._writer = _tensorboard_writer(self._events.folder)
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True)

  def say(self, line: str, by_all: bool = False):
    """Prints a line beside the progress bar.

    Args:
      line: what to print.
      by_all: whether all processes print it, since each has another, and not the first alone.
    """
    if self._leads:
      tqdm.tqdm.write(line, file=sys.stderr)
    elif by_all:
      print(f'process {jax.process_index()}: {line}', file=sys.stderr)

  def advance(self, step: int):
    """Moves the progress bar to `step`."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def metrics(self, step: int, values: dict[str, float]):
    """Writes scalars and shows them."""
    if not self._leads:
      return
    self._writer.write_scalars(step, values)
    shown = ' '.join(f'{name} {_short(value)}' for name, value in sorted(values.items()))
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {_short(values["loss"])}' if 'loss' in values else '')
      if 'loss' in values:
        return
    self.say(f'step {step}: {shown}')

  def pictures(self, step: int, grids: dict[str, np.ndarray]):
    """Writes pictures, uint8 [count, height, width, 3] each, as a grid to both places."""
    if not self._leads:
      return
    from PIL import Image

    for name, images in grids.items():
      grid = tile(np.asarray(images))
      self._writer.write_images(step, {name: grid[None]})
      content = io.BytesIO()
      Image.fromarray(grid).save(content, 'PNG')
      storage.write(
        storage.join(self._directory, 'pictures', f'{name}_{step:08d}.png'), content.getvalue()
      )

  def flush(self):
    """Waits until all metrics are in files: a checkpoint must not be older than they are.

    The steps before a checkpoint are not done again, so what they showed would be lost for good.
    """
    if self._leads:
      self._writer.flush()
      self._events.upload()

  def close(self, skipped: dict[str, int]):
    """Says what data was skipped and which requests were repeated, and flushes the metrics."""
    if not self._leads:
      return
    if skipped:
      counts = ', '.join(f'{count} {reason}' for reason, count in sorted(skipped.items()))
      self.say(f'examples skipped: {counts}')
    if retries := store_retries.told():
      self.say(f'requests to stores repeated: {retries}')
    if self._bar is not None:
      self._bar.close()
    self._writer.close()
    self._events.upload()


def tile(images: np.ndarray) -> np.ndarray:
  """Pictures [count, height, width, 3] as a nearly square grid [rows·height, columns·width, 3]."""
  count, height, width, channels = images.shape
  columns = int(np.ceil(np.sqrt(count * height / width)))
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, images.dtype)
  filled[:count] = images
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)


class _Events:
  """Where TensorBoard's events are written, which is on a disk in any case.

  Its writers append and know few stores. The files of this start are copied to others, each whole.

  Attributes:
    folder: the local folder to write to.

  Args:
    target: where the events go, a path or URL.
  """

  def __init__(self, target: str):
    self._target, self._temporary = target, None
    self.folder = os.fspath(storage.as_epath(target))
    self._uploaded: dict[str, int] = {}
    if storage.is_url(target):
      self._temporary = tempfile.TemporaryDirectory(prefix='parti_jax_events_')
      self.folder = self._temporary.name

  def upload(self):
    """Copies the files that have grown, if they are not where they belong already."""
    if self._temporary is None:
      return
    for name, size in storage.sizes(self.folder).items():
      if self._uploaded.get(name) != size:
        storage.upload(os.path.join(self.folder, name), storage.join(self._target, name))
        self._uploaded[name] = size


def _tensorboard_writer(folder: str):
  from clu import metric_writers

  return metric_writers.AsyncMultiWriter([metric_writers.SummaryWriter(folder)])


def _begin_session(folder: str, step: int):
  """Tells TensorBoard that what it has of steps after `step` is void, since they are done again.

  A killed run has come further than its last checkpoint. What is done again has the same losses,
  but not the same speeds, and without this curves would go back and forth. TensorBoard takes the
  first session of a run for its beginning, so that a new run has one too.
  """
  from tensorboard.compat.proto import event_pb2
  from tensorboard.summary.writer import event_file_writer

  writer = event_file_writer.EventFileWriter(folder)
  writer.add_event(
    event_pb2.Event(
      wall_time=time.time(),
      step=step + 1,
      session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START),
    )
  )
  writer.close()


def _short(value: float) -> str:
  return f'{value:.4g}'

"""What a run shows: a progress bar or plain lines, metrics, picture grids."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from collections.abc import Sequence

import jax
import numpy as np
import tqdm

from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.training import writers as writers_lib


class Reporter:
  """Metrics and pictures of a run, written by the first process alone.

  Args:
    model_dir: the run's folder; pictures go to `pictures/`.
    steps: where training ends.
    step: where it begins.
    writers: make the writers of metrics and pictures, see `writers.Writer`.
  """

  def __init__(
    self,
    model_dir,
    steps: int,
    step: int,
    writers: Sequence[Callable[[str, int], writers_lib.Writer]] = (writers_lib.TensorBoardWriter,),
  ):
    self._leads = jax.process_index() == 0
    self._directory = model_dir
    self._bar, self._writers = None, []
    if not self._leads:
      return
    for left in storage.glob(storage.join(model_dir, 'pictures', '.*.unfinished')):
      storage.remove(left)  # A kill came while it was written.
    for make in writers:
      self._writers.append(make(model_dir, step))
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
    for writer in self._writers:
      writer.write_scalars(step, values)
    shown = ' '.join(f'{name} {_short(value)}' for name, value in sorted(values.items()))
    if self._bar is not None:
      self._bar.set_postfix_str(f'loss {_short(values["loss"])}' if 'loss' in values else '')
      if 'loss' in values:
        return
    self.say(f'step {step}: {shown}')

  def pictures(self, step: int, grids: dict[str, np.ndarray]):
    """Writes pictures, uint8 [count, height, width, 3] each, as grids."""
    if not self._leads:
      return
    from PIL import Image

    for name, images in grids.items():
      grid = tile(np.asarray(images))
      for writer in self._writers:
        writer.write_images(step, {name: grid})
      content = io.BytesIO()
      Image.fromarray(grid).save(content, 'PNG')
      storage.write(
        storage.join(self._directory, 'pictures', f'{name}_{step:08d}.png'), content.getvalue()
      )

  def flush(self):
    """Waits until all metrics are in files: a checkpoint must not be older than they are.

    The steps before a checkpoint are not done again, so what they showed would be lost for good.
    """
    for writer in self._writers:
      writer.flush()

  def close(self, skipped: dict[str, int]):
    """Says what data was skipped and which requests were repeated, and flushes the metrics."""
    if not self._leads:
      return
    if skipped:
      counts = ', '.join(f'{count} {reason}' for reason, count in sorted(skipped.items()))
      self.say(f'examples skipped: {counts}')
    if retries := store_retries.summary():
      self.say(f'requests to stores repeated: {retries}')
    if self._bar is not None:
      self._bar.close()
    for writer in self._writers:
      writer.close()


def tile(images: np.ndarray) -> np.ndarray:
  """Pictures [count, height, width, 3] as a nearly square grid [rows·height, columns·width, 3]."""
  count, height, width, channels = images.shape
  columns = int(np.ceil(np.sqrt(count * height / width)))
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, images.dtype)
  filled[:count] = images
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)


def _short(value: float) -> str:
  return f'{value:.4g}'

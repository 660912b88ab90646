"""Reports a run's progress: a progress bar or plain lines, metrics, image grids."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from jaxtyping import UInt8

from parti_jax.core import storage
from parti_jax.core import store_retries
from parti_jax.training import writers as writers_lib


class Reporter:
  """Writes and prints a run's metrics and images; only the first process does.

  Args:
    model_dir: the run's folder; images go to its folder `pictures`.
    steps: number of steps of the run.
    step: steps done so far.
    writers: functions that make the writers of metrics and images (`writers.Writer`).
  """

  def __init__(
    self,
    model_dir: str,
    steps: int,
    step: int,
    writers: Sequence[Callable[[str, int], writers_lib.Writer]] = (writers_lib.TensorBoardWriter,),
  ):
    self._leads = jax.process_index() == 0
    self._directory = model_dir
    self._bar: tqdm.tqdm | None = None
    self._writers: list[writers_lib.Writer] = []
    if not self._leads:
      return
    for left in storage.glob(storage.join(model_dir, 'pictures', '.*.unfinished')):
      storage.remove(left)  # The process was killed while it wrote this file.
    for make in writers:
      self._writers.append(make(model_dir, step))
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=steps, initial=step, unit='step', dynamic_ncols=True)

  def say(self, line: str, by_all: bool = False) -> None:
    """Prints a line above the progress bar.

    Args:
      line: the line.
      by_all: whether all processes print their line, rather than only the first process.
    """
    if self._leads:
      tqdm.tqdm.write(line, file=sys.stderr)
    elif by_all:
      print(f'process {jax.process_index()}: {line}', file=sys.stderr)

  def advance(self, step: int) -> None:
    """Moves the progress bar to `step`."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def metrics(self, step: int, values: Mapping[str, float]) -> None:
    """Writes the metrics of a step and prints them."""
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

  def pictures(
    self, step: int, grids: Mapping[str, UInt8[np.ndarray, 'count height width 3']]
  ) -> None:
    """Writes images, {name: the images of a grid}, as one grid per name."""
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

  def flush(self) -> None:
    """Waits until all metrics are in files.

    Call it before each checkpoint. A resumed run doesn't repeat the steps before the checkpoint,
    so metrics lost then would be lost for good.
    """
    for writer in self._writers:
      writer.flush()

  def close(self, skipped: Mapping[str, int]) -> None:
    """Closes the writers; prints how many examples were skipped and requests were repeated.

    Args:
      skipped: {reason: number of examples skipped}.
    """
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


def tile(
  images: UInt8[np.ndarray, 'count height width channels'],
) -> UInt8[np.ndarray, 'grid_height grid_width channels']:
  """Arranges images as a grid that is nearly square; white fills the places left over."""
  count, height, width, channels = images.shape
  columns = int(np.ceil(np.sqrt(count * height / width)))
  rows = -(-count // columns)
  filled = np.full((rows * columns, height, width, channels), 255, images.dtype)
  filled[:count] = images
  grid = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
  return grid.reshape(rows * height, columns * width, channels)


def _short(value: float) -> str:
  return f'{value:.4g}'

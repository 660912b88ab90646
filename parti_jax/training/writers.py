"""Where a run's metrics and pictures go: TensorBoard's event files, and what else gin names."""

from __future__ import annotations

import abc
import io
import os
import socket
import tempfile
import time
from collections.abc import Mapping

import gin
import numpy as np

from parti_jax.core import storage


class Writer(abc.ABC):
  """A service or a file format for metrics and pictures.

  The run's first process makes one of each of `train.writers`, with the run's folder and the step
  that the run starts at as positional arguments. Metrics of later steps may have been written
  already by a start that was killed; those steps are trained again, and a writer should show each
  of them once.
  """

  @abc.abstractmethod
  def write_scalars(self, step: int, values: Mapping[str, float]):
    """Writes the metrics of a step, by name. A step may have several calls, of other names."""

  def write_images(self, step: int, images: Mapping[str, np.ndarray]):
    """Writes pictures of a step, by name: uint8 [height, width, 3]. Ignored by default."""
    del step, images

  def flush(self):  # noqa: B027
    """Returns when all that was written is safe from the end of the process.

    It is called before each checkpoint, since the steps before one are not trained again.
    """

  def close(self):  # noqa: B027
    """Flushes, and releases what the writer holds. Called once, also after an error."""


class LocalFolder:
  """A folder of the run for libraries that write to disks alone.

  In a store, its files are written to a temporary folder and uploaded whole.

  Args:
    target: the folder, a path or URL.

  Attributes:
    path: the local folder to write to.
  """

  def __init__(self, target: str):
    self._target, self._temporary = target, None
    self.path = os.fspath(storage.as_epath(target))
    self._uploaded: dict[str, int] = {}
    if storage.is_url(target):
      self._temporary = tempfile.TemporaryDirectory(prefix='parti_jax_')
      self.path = self._temporary.name
    os.makedirs(self.path, exist_ok=True)

  def upload(self):
    """Copies the files that have grown to the store, if the folder is in one."""
    if self._temporary is None:
      return
    for name, size in storage.sizes(self.path).items():
      if self._uploaded.get(name) != size:
        storage.upload(os.path.join(self.path, name), storage.join(self._target, name))
        self._uploaded[name] = size


@gin.configurable(denylist=['model_dir', 'step'])
class TensorBoardWriter(Writer):
  """Event files for TensorBoard, in the run's `tensorboard/`.

  They are written with TensorBoard's own classes that do not import TensorFlow.

  Args:
    model_dir: the run's folder.
    step: where the run starts. TensorBoard drops what it has of later steps.
  """

  def __init__(self, model_dir: str, step: int):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer import record_writer

    self._event = event_pb2.Event
    self._folder = LocalFolder(storage.join(model_dir, 'tensorboard'))
    # TensorBoard reads the files in the order of their names.
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._records = record_writer.RecordWriter(open(os.path.join(self._folder.path, name), 'xb'))
    self._write(file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=step + 1, session_log=start)
    self._records.flush()

  def write_scalars(self, step: int, values: Mapping[str, float]):
    from tensorboard.plugins.scalar import summary_v2

    for name, value in values.items():
      self._write(step=step, summary=summary_v2.scalar_pb(name, value))
    self._records.flush()

  def write_images(self, step: int, images: Mapping[str, np.ndarray]):
    from PIL import Image
    from tensorboard.compat.proto import summary_pb2
    from tensorboard.plugins.image import metadata
    from tensorboard.util import tensor_util

    for name, pixels in images.items():
      content = io.BytesIO()
      Image.fromarray(pixels).save(content, 'PNG')
      height, width, _ = pixels.shape
      value = summary_pb2.Summary.Value(
        tag=name,
        metadata=metadata.create_summary_metadata(display_name=None, description=None),
        tensor=tensor_util.make_tensor_proto(
          [str(width).encode(), str(height).encode(), content.getvalue()]
        ),
      )
      self._write(step=step, summary=summary_pb2.Summary(value=[value]))
    self._records.flush()

  def flush(self):
    self._records.flush()
    self._folder.upload()

  def close(self):
    self._records.close()
    self._folder.upload()

  def _write(self, **fields):
    self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

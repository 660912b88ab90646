"""Writers of a run's metrics and images: TensorBoard's event files, and others named in gin."""

from __future__ import annotations

import abc
import io
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np
from jaxtyping import UInt8

from parti_jax.core import storage


class Writer(abc.ABC):
  """Writes metrics and images to a service or in a file format.

  The run's first process calls each of `train.writers` with two positional arguments, the run's
  folder and the number of steps done. If the process was killed before, metrics of later steps may
  have been written already. These steps are repeated, and a writer should show each of them once.
  """

  @abc.abstractmethod
  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    """Writes {name: value} of a step. A step may have several calls with different names."""

  def write_images(
    self, step: int, images: Mapping[str, UInt8[np.ndarray, 'height width 3']]
  ) -> None:
    """Writes {name: image} of a step. Ignored by default."""
    del step, images

  def flush(self) -> None:  # noqa: B027
    """Blocks until everything written would survive the end of the process.

    It is called before each checkpoint, since a resumed run doesn't repeat earlier steps.
    """

  def close(self) -> None:  # noqa: B027
    """Flushes and closes the writer. Called once, also after an error."""


class LocalFolder:
  """A folder of the run for libraries that can only write to a local disk.

  If the folder is in a store, files are written to a temporary folder and uploaded.

  Args:
    target: the folder, a path or URL.

  Attributes:
    path: the local folder to write to.
  """

  def __init__(self, target: str):
    self._target = target
    self._temporary: tempfile.TemporaryDirectory | None = None
    self.path = os.fspath(storage.as_epath(target))
    self._uploaded: dict[str, int] = {}
    if storage.is_url(target):
      self._temporary = tempfile.TemporaryDirectory(prefix='parti_jax_')
      self.path = self._temporary.name
    os.makedirs(self.path, exist_ok=True)

  def upload(self) -> None:
    """Uploads new and grown files, if the folder is in a store."""
    if self._temporary is None:
      return
    for name, size in storage.sizes(self.path).items():
      if self._uploaded.get(name) != size:
        storage.upload(os.path.join(self.path, name), storage.join(self._target, name))
        self._uploaded[name] = size


@gin.configurable(denylist=['model_dir', 'step'])
class TensorBoardWriter(Writer):
  """Writes event files for TensorBoard to the run's folder `tensorboard`.

  It uses those of TensorBoard's own classes that don't import TensorFlow.

  Args:
    model_dir: the run's folder.
    step: number of steps done. TensorBoard drops what it has of later steps.
  """

  def __init__(self, model_dir: str, step: int):
    from tensorboard.compat.proto import event_pb2
    from tensorboard.summary.writer import record_writer

    self._event = event_pb2.Event
    self._folder = LocalFolder(storage.join(model_dir, 'tensorboard'))
    # TensorBoard reads files in the order of their names.
    name = f'events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}'
    self._records = record_writer.RecordWriter(open(os.path.join(self._folder.path, name), 'xb'))
    self._write(file_version='brain.Event:2')
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._write(step=step + 1, session_log=start)
    self._records.flush()

  def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
    from tensorboard.plugins.scalar import summary_v2

    for name, value in values.items():
      self._write(step=step, summary=summary_v2.scalar_pb(name, value))
    self._records.flush()

  def write_images(
    self, step: int, images: Mapping[str, UInt8[np.ndarray, 'height width 3']]
  ) -> None:
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

  def flush(self) -> None:
    self._records.flush()
    self._folder.upload()

  def close(self) -> None:
    self._records.close()
    self._folder.upload()

  def _write(self, **fields: Any) -> None:
    self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())

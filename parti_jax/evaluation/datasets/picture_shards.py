"""Generated pictures in tar shards, so that an interrupted run can continue.

A shard has img2dataset's format, 000012.png with 000012.txt for each caption. Common tools can
display it, and gin_configs/tasks/webdataset.gin reads it as a data set.
"""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import tarfile
import warnings
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np
import tqdm
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core.errors import UserError

# Captions in a shard: the most that an interrupted run loses.
SHARD = 64

# The tar header with the number of the shard's captions that were too long for the model.
_CUT = 'PARTI_JAX.captions_cut'


class PictureShards:
  """The pictures of some captions, one for each."""

  def __init__(self, folder: pathlib.Path, captions: Sequence[str]):
    """Uses a folder; creates it if it doesn't exist."""
    self.folder = folder
    self.captions = list(captions)
    folder.mkdir(parents=True, exist_ok=True)
    self._starts = range(0, len(self.captions), SHARD)

  def draw(self, model, num_images: int, progress: bool, **settings):
    """Generates the missing pictures.

    All pictures use one seed, but each caption has its own noise: picture i of caption c is
    generated as picture c · num_images + i.

    Args:
      model: the result of `parti_jax.load`.
      num_images: pictures generated for each caption; the ranker keeps the best.
      progress: whether to show a bar on a terminal.
      **settings: arguments of `model.generate`.
    """
    bar = tqdm.tqdm(
      total=len(self.captions), desc='drawing', unit='caption', disable=None if progress else True
    )
    with bar:
      for start in self._starts:
        captions = self.captions[start : start + SHARD]
        if not self._path(start).exists():
          with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always', UserWarning)
            result = model.generate(
              captions,
              num_images=num_images,
              rank=num_images > 1,
              first_index=[(start + row) * num_images for row in range(len(captions))],
              **settings,
            )
          # A ranker with a shorter text length warns with another message.
          cut = sum(str(warning.message).startswith('prompt ') for warning in caught)
          self._write(start, captions, result.images[:, 0], cut)
        bar.update(len(captions))

  def batches(self) -> Iterator[UInt8[np.ndarray, 'captions height width 3']]:
    """Yields the pictures in order, shard by shard.

    Raises:
      UserError: a shard is damaged.
    """
    for start in self._starts:
      yield self._read(start)

  def captions_cut(self) -> int:
    """Returns the number of captions longer than the model's text length."""
    return sum(self._cut(start) for start in self._starts)

  def _path(self, start: int) -> pathlib.Path:
    return self.folder / f'{start // SHARD:05d}.tar'

  def _write(
    self,
    start: int,
    captions: Sequence[str],
    images: UInt8[np.ndarray, 'captions height width 3'],
    cut: int,
  ):
    path = self._path(start)
    temporary = path.with_name(f'.{path.name}.{os.getpid()}')
    try:
      with tarfile.open(
        temporary, 'w', format=tarfile.PAX_FORMAT, pax_headers={_CUT: str(cut)}
      ) as tar:
        for index, (caption, image) in enumerate(zip(captions, images), start):
          png = io.BytesIO()
          Image.fromarray(image).save(png, 'PNG')
          for ending, content in (('png', png.getvalue()), ('txt', caption.encode())):
            member = tarfile.TarInfo(f'{index:06d}.{ending}')
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
      os.replace(temporary, path)
    except OSError as error:
      raise UserError(f'{path} cannot be written ({error.strerror or error})') from error
    finally:
      temporary.unlink(missing_ok=True)

  def _cut(self, start: int) -> int:
    with self._open(start) as tar:
      return int(tar.pax_headers[_CUT])

  def _read(self, start: int) -> UInt8[np.ndarray, 'captions height width 3']:
    count = len(self.captions[start : start + SHARD])
    with self._open(start) as tar:
      images = []
      for index in range(start, start + count):
        with Image.open(tar.extractfile(f'{index:06d}.png')) as image:
          images.append(np.asarray(image.convert('RGB')))
    return np.stack(images)

  @contextlib.contextmanager
  def _open(self, start: int):
    path = self._path(start)
    try:
      with tarfile.open(path) as tar:
        yield tar
    except (OSError, KeyError, ValueError, tarfile.TarError) as error:
      raise UserError(
        f'{path} is damaged; delete it, and the run generates its pictures again'
      ) from error

"""Generated pictures in tar shards, drawn once: a run that was stopped goes on where it was.

A shard holds what img2dataset writes for some captions, 000012.png with 000012.txt, so that it can
be looked at with any tool, and read again as a data set with gin_configs/tasks/webdataset.gin.
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
from PIL import Image

from parti_jax.core.errors import UserError

# Captions in a shard: what a run that is stopped loses at most.
SHARD = 64

# The tar header that keeps how many captions of the shard were too long for the model.
_CUT = 'PARTI_JAX.captions_cut'


class PictureShards:
  """The pictures of some captions, one of each."""

  def __init__(self, folder: pathlib.Path, captions: Sequence[str]):
    """Uses a folder, made if it isn't there."""
    self.folder = folder
    self.captions = list(captions)
    folder.mkdir(parents=True, exist_ok=True)
    self._starts = range(0, len(self.captions), SHARD)

  def draw(self, pipeline, num_images: int, progress: bool, **settings):
    """Draws what is not there yet.

    Every caption has noise of its own, though all are drawn with one seed: picture i of caption c
    is drawn as picture c · num_images + i.

    Args:
      pipeline: as `parti_jax.load` gives it.
      num_images: pictures drawn for each caption; of several the ranker's best is kept.
      progress: show a bar on a terminal.
      **settings: of `pipeline.generate`.
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
            result = pipeline.generate(
              captions,
              num_images=num_images,
              rank=num_images > 1,
              first_index=[(start + row) * num_images for row in range(len(captions))],
              **settings,
            )
          # A ranker that has a shorter text length warns too, in other words.
          cut = sum(str(warning.message).startswith('prompt ') for warning in caught)
          self._write(start, captions, result.images[:, 0], cut)
        bar.update(len(captions))

  def batches(self) -> Iterator[np.ndarray]:
    """Yields the pictures in order, shard by shard: uint8 [captions, height, width, 3].

    Raises:
      UserError: a shard is damaged.
    """
    for start in self._starts:
      yield self._read(start)

  def captions_cut(self) -> int:
    """Returns how many captions were longer than the model's text length."""
    return sum(self._cut(start) for start in self._starts)

  def _path(self, start: int) -> pathlib.Path:
    return self.folder / f'{start // SHARD:05d}.tar'

  def _write(self, start: int, captions: Sequence[str], images: np.ndarray, cut: int):
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

  def _read(self, start: int) -> np.ndarray:
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
        f'{path} is damaged; delete it, and the run draws its pictures again'
      ) from error

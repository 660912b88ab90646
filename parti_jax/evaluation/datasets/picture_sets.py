"""Sets of pictures to measure: an .npz, a folder, tensorflow-datasets, or a source of gin's.

`arr_0` of an .npz is uint8 [pictures, height, width, 3], as ADM's evaluator reads it; `arr_1` may have
classes. Of a folder, all pictures below it are taken in the order of their paths. A set is read in
blocks of `BLOCK` pictures, so that it is never in memory as a whole and an interrupted command resumes
at the next block. A picture that can't be decoded keeps its place and is counted.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int
from jaxtyping import UInt8
from PIL import Image

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.data.damage import Damaged
from parti_jax.data.damage import Unusable
from parti_jax.data.sources import base
from parti_jax.evaluation.metrics import features
from parti_jax.importers import npz_files

# Pictures in a block.
BLOCK = 250
RESIZE_FILTER = 'bicubic with antialiasing, by Pillow'
# Last bytes of a file that tell its content from another of the same size: they have the end of a
# JPEG's pixels, and the checksums of a PNG's.
_TAIL = 64
# Names that tell statistics from pictures in an .npz.
_PICTURES, _CLASSES = 'arr_0', 'arr_1'


@dataclasses.dataclass(frozen=True)
class Block:
  """Consecutive pictures of a set.

  Attributes:
    images: the pictures that could be decoded.
    skipped: reason -> pictures left out.
    formats: formats of the files that the pictures are from, such as 'PNG'.
    resized: number of pictures that had another size.
    digest: SHA-256 of the pixels.
  """

  images: UInt8[np.ndarray, 'pictures height width 3']
  skipped: dict[str, int]
  formats: tuple[str, ...]
  resized: int
  digest: str


class PictureSet(abc.ABC):
  """Pictures in a fixed order.

  Attributes:
    place: where they are, for reports and messages.
  """

  place: str

  @property
  def count(self) -> int | None:
    """Number of pictures, with damaged ones; None if that takes reading all of them."""
    return None

  @property
  def classes(self) -> Int[np.ndarray, 'pictures'] | None:
    """The class of each picture; None if unknown."""
    return None

  def size(self) -> tuple[int, int] | None:
    """Returns height and width of the first picture, in pixels; None if it isn't usable."""
    return None

  @abc.abstractmethod
  def identity(self) -> str:
    """Returns a digest that changes with the pictures, without reading them all."""

  @abc.abstractmethod
  def blocks(self, size: int | None, wanted: Callable[[int], bool]) -> Iterator[Block | None]:
    """Yields the blocks in order.

    Args:
      size: height and width to crop and resize to; None keeps pictures, which then must all have
        the same size.
      wanted: whether to decode the block of an index; for others None comes.

    Raises:
      UserError: the pictures can't be read, or have several sizes although `size` is None.
    """


class NpzSet(PictureSet):
  """Pictures in an .npz."""

  def __init__(self, path: pathlib.Path, arrays: dict[str, npz_files.NpzArray]):
    self.place, self._arrays = str(path), arrays
    found = arrays.get(_PICTURES)
    if found is None:
      raise UserError(
        f'{path} has no array {_PICTURES} of pictures, but {", ".join(sorted(arrays)) or "none"}'
      )
    if found.dtype != np.uint8 or len(found.shape) != 4 or found.shape[3] != 3 or found.by_columns:
      raise UserError(
        f'{path}: {_PICTURES} is {found.dtype} {list(found.shape)}; expected uint8 [pictures, height, '
        'width, 3] with values from 0 to 255'
      )
    if not all(found.shape):
      raise UserError(f'{path}: {_PICTURES} {list(found.shape)} has no pictures')
    self._found = found

  @property
  def count(self) -> int:
    return self._found.shape[0]

  @property
  def classes(self) -> Int[np.ndarray, 'pictures'] | None:
    array = self._arrays.get(_CLASSES)
    if array is None or array.shape != (self.count,) or array.dtype.kind not in 'iu':
      return None
    return array.read()

  def size(self) -> tuple[int, int]:
    return self._found.shape[1], self._found.shape[2]

  def identity(self) -> str:
    return _digest(f'npz {self._found.shape} {self._found.crc}'.encode())

  def blocks(self, size: int | None, wanted: Callable[[int], bool]) -> Iterator[Block | None]:
    for index, start in enumerate(range(0, self.count, BLOCK)):
      if not wanted(index):
        yield None
        continue
      images = self._found.rows(start, min(start + BLOCK, self.count))
      resized = 0
      if size is not None and images.shape[1:3] != (size, size):
        images = np.stack([_square(Image.fromarray(image), size) for image in images])
        resized = len(images)
      yield _block(images, {}, ('uint8 array',), resized)


class _Encoded(PictureSet):
  """Pictures in files of their own or of a source."""

  @abc.abstractmethod
  def items(self) -> Iterator[Any]:
    """Yields what `content` takes, one for each picture."""

  def content(self, item: Any) -> bytes | Damaged:
    """Returns the content of a picture's file."""
    return item

  def blocks(self, size: int | None, wanted: Callable[[int], bool]) -> Iterator[Block | None]:
    expected: tuple[int, ...] | None = None
    found = self.items()
    for index in itertools.count():
      items = list(itertools.islice(found, BLOCK))
      if not items:
        return
      if not wanted(index):
        yield None
        continue
      block = _decoded(self.place, map(self.content, items), size)
      if len(block.images):
        expected = expected or block.images.shape[1:]
        if block.images.shape[1:] != expected:
          raise _sizes(self.place, expected, block.images.shape[1:])
      yield block


class FolderSet(_Encoded):
  """All pictures in a folder and the folders in it, in the order of their paths."""

  def __init__(self, folder: pathlib.Path):
    self.place = str(folder)
    try:
      self._files = sorted(
        path
        for path in folder.rglob('*')
        if path.suffix.lower().lstrip('.') in image_decoding.ENDINGS and path.is_file()
      )
    except OSError as error:
      raise UserError(f'{folder} cannot be read ({error.strerror or error})') from error
    if not self._files:
      raise UserError(
        f'{folder} has no pictures; files ending in {", ".join(image_decoding.ENDINGS)} are read'
      )
    self._folder = folder

  @property
  def count(self) -> int:
    return len(self._files)

  def size(self) -> tuple[int, int] | None:
    content = self.content(self._files[0])
    try:
      return None if isinstance(content, Damaged) else _size(content)
    except Unusable:
      return None

  def identity(self) -> str:
    parts = [b'folder']
    for path in self._files:
      name = os.fsencode(path.relative_to(self._folder))
      parts += [name, *_size_and_tail(path)]
    return _digest(b'\n'.join(parts))

  def items(self) -> Iterator[pathlib.Path]:
    yield from self._files

  def content(self, item: pathlib.Path) -> bytes | Damaged:
    try:
      with item.open('rb') as file:
        # One byte more lets the decoder detect files that are too large.
        return file.read(image_decoding.MAX_BYTES + 1)
    except OSError:
      return Damaged('picture file that is gone or cannot be read', file=str(item))


class SourceSet(_Encoded):
  """The pictures of a split of a source that gin configures."""

  def __init__(self, source: base.Source, split: str):
    self.place = f'{source.place}, split {split}'
    self._source, self._split = source, split
    self._opened = source.open(split)

  @property
  def count(self) -> int | None:
    return None if isinstance(self._opened, base.Shards) else len(self._opened)

  def identity(self) -> str:
    return _digest(f'{self._source.name} {self._split} {self._opened.digest()}'.encode())

  def items(self) -> Iterator[bytes | Damaged]:
    for example in self._source.examples(self._split):
      yield example if isinstance(example, Damaged) else example['picture']


class TfdsSet(_Encoded):
  """The pictures of a split of a data set that tensorflow-datasets has prepared."""

  def __init__(self, name: str, split: str, data_dir: str | None):
    """Opens the data set; downloads nothing.

    Args:
      name: its name, such as 'imagenet2012'.
      split: its split, such as 'validation'.
      data_dir: data folder of tensorflow-datasets; None for its default.

    Raises:
      UserError: the data set is unknown or not prepared, or has no such split or pictures.
    """
    from parti_jax.data.quiet_tensorflow import tfds

    self.place = f'{name} of tensorflow-datasets, split {split}'
    try:
      self._builder = tfds.builder(name, data_dir=data_dir)
      info = self._builder.info
      prepared = bool(info.splits)
      self._count = info.splits[split].num_examples if prepared else 0
    except (ValueError, KeyError) as error:
      reason = str(error).strip().splitlines()
      raise UserError(
        f'--tfds {name}, --split {split}: {reason[0] if reason else error}'
      ) from error
    if not prepared:
      raise UserError(
        f'{name} is not prepared in {self._builder.data_dir}: run `tfds build {name}` (--tfds_dir '
        'names another folder)'
      )
    if 'image' not in info.features:
      raise UserError(f"--tfds {name} has no feature 'image', but {', '.join(info.features)}")
    self._name, self._split = info.full_name, split

  @property
  def count(self) -> int:
    return self._count

  def identity(self) -> str:
    return _digest(f'tfds {self._name} {self._split} {self._count}'.encode())

  def items(self) -> Iterator[bytes]:
    from parti_jax.data import streams
    from parti_jax.data.quiet_tensorflow import tfds

    dataset = self._builder.as_dataset(
      split=self._split,
      shuffle_files=False,
      decoders=tfds.decode.PartialDecoding(
        {'image': self._builder.info.features['image']},
        decoders={'image': tfds.decode.SkipDecoding()},
      ),
    )
    with streams.Stream(dataset) as examples:
      for example in examples:
        yield example['image']


def open_path(path: str, flag: str = '') -> PictureSet:
  """Opens an .npz or a folder of pictures.

  Args:
    path: the path.
    flag: the flag that gives it, for messages, such as '--pictures'.

  Raises:
    UserError: it is neither, or has no pictures.
  """
  storage.check_local(path)
  found = pathlib.Path(path)
  if found.is_dir():
    return FolderSet(found)
  if not found.is_file():
    raise UserError(f'{flag} {path} does not exist; give an .npz or a folder of pictures'.lstrip())
  if found.suffix != '.npz':
    raise UserError(f'{flag} {path} is neither an .npz nor a folder of pictures'.lstrip())
  return NpzSet(found, npz_files.open_npz(found))


def _decoded(place: str, content: Iterable[bytes | Damaged], size: int | None) -> Block:
  """Decodes the pictures of a block."""
  skipped: collections.Counter[str] = collections.Counter()
  images: list[np.ndarray] = []
  formats, resized = set(), 0
  for data in content:
    if isinstance(data, Damaged):
      skipped[data.reason] += 1
      continue
    try:
      header = image_decoding.header(data)
      if size is None:
        # Whole, in its own size.
        image = np.asarray(image_decoding.decode_whole(data)[0])
      else:
        image = image_decoding.decode(data, size)
        resized += {header.width, header.height} != {size}
    except Unusable as error:
      skipped[str(error)] += 1
      continue
    formats.add(header.format)
    if images and image.shape != images[0].shape:
      raise _sizes(place, images[0].shape, image.shape)
    images.append(image)
  stacked = np.stack(images) if images else np.zeros((0, size or 1, size or 1, 3), np.uint8)
  return _block(stacked, dict(skipped), tuple(sorted(formats)), resized)


def _size_and_tail(path: pathlib.Path) -> tuple[bytes, bytes]:
  """Returns the size of a file in digits, and its last bytes in hexadecimal."""
  try:
    with path.open('rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _TAIL))
      return str(size).encode(), file.read().hex().encode()
  except OSError:
    return b'unreadable', b''


def _size(content: bytes) -> tuple[int, int]:
  image, _ = image_decoding.decode_whole(content)
  return image.height, image.width


def block_of(images: UInt8[np.ndarray, 'pictures height width 3'], resized: bool) -> Block:
  """Returns a block of generated pictures, all of which were resized or none."""
  return _block(images, {}, ('uint8 array',), len(images) if resized else 0)


def _block(
  images: UInt8[np.ndarray, 'pictures height width 3'],
  skipped: dict[str, int],
  formats: tuple[str, ...],
  resized: int,
) -> Block:
  return Block(images, skipped, formats, resized, _digest(np.ascontiguousarray(images)))


def _square(image: Image.Image, size: int) -> UInt8[np.ndarray, '{size} {size} 3']:
  """Crops the central square and resizes it, like the decoder of files."""
  side = min(image.size)
  left, top = (image.width - side) // 2, (image.height - side) // 2
  square = np.asarray(image.crop((left, top, left + side, top + side)))
  return features.resized(square[None], size)[0]


def _sizes(place: str, one: tuple[int, ...], other: tuple[int, ...]) -> UserError:
  height, width = one[:2]
  return UserError(
    f'{place} has pictures of {height}×{width} and of {other[0]}×{other[1]} pixels; give '
    '--image_size to crop and resize all of them'
  )


def _digest(content) -> str:
  return hashlib.sha256(content).hexdigest()

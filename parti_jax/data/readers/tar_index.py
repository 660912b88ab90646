"""Finds pictures in uncompressed tars with their classes, so that any of them can be read directly.

| form | class of a picture |
|---|---|
| ILSVRC2012_img_train.tar, a tar of tars such as n01440764.tar | the name of the inner tar |
| shards with 000012.jpg and 000012.cls, as webdataset writes them | the number in the .cls |
| a tar with folders, such as train/n01440764/x.JPEG | the picture's folder |
| a tar for each class, such as n01440764.tar | the name of the tar |
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from typing import IO
from typing import NamedTuple

from parti_jax.core.errors import UserError
from parti_jax.data import image_decoding
from parti_jax.data.readers import tar_members

_CLASS = 'cls'
# Bytes of a .cls file, which has a number.
_MAX_CLASS = 20


class Place(NamedTuple):
  """A picture in a tar.

  Attributes:
    name: its name in the tar.
    offset: where its bytes begin in the file.
    size: its size in bytes.
    label: its class: a key, or its number.
  """

  name: str
  offset: int
  size: int
  label: str | int


def places(path: str) -> Iterator[Place]:
  """Yields the pictures in a tar, in its order, by reading only the headers.

  Args:
    path: path of the tar.

  Raises:
    UserError: it is compressed, damaged or cut off, or a picture has no class.
  """
  try:
    with open(path, 'rb') as file:
      yield from _places(file, path, os.path.basename(path), 0, 0)
  except OSError as error:
    raise UserError(f'{path} cannot be read ({error.strerror or error})') from error


def _places(file: IO[bytes], path: str, name: str, start: int, depth: int) -> Iterator[Place]:
  """Yields the pictures in a tar that begins at `start` of the file at `path`."""
  numbers: dict[str, int] = {}
  pictures: list[tuple[str, int, int]] = []
  try:
    with tarfile.open(fileobj=file, mode='r:') as tar:
      for member in tar:
        if not member.isreg() or member.issparse():
          continue
        stem, ending = tar_members.split(member.name)
        if ending == 'tar' and not depth:
          inner = tar.extractfile(member)
          assert inner is not None
          yield from _places(inner, path, os.path.basename(member.name), member.offset_data, 1)
        elif ending == _CLASS:
          numbers[stem] = _number(tar, member, path)
        elif ending in image_decoding.ENDINGS:
          pictures.append((member.name, start + member.offset_data, member.size))
        tar.members = []  # type: ignore[attr-defined]  # Otherwise it keeps all headers.
      _check_end(file, tar.offset)
  except (tarfile.TarError, EOFError, ValueError) as error:
    raise UserError(
      f'{path} is not a whole, uncompressed tar ({error}); unpack a compressed one, and copy a cut one '
      'again'
    ) from error
  for picture, offset, size in pictures:
    yield Place(picture, offset, size, _label(picture, numbers, name, path))


def _check_end(file: IO[bytes], offset: int) -> None:
  """Raises ValueError unless a tar ends at an offset; `tarfile` takes a damaged header for the end."""
  if file.seek(0, os.SEEK_END) < offset:
    raise ValueError('it is cut off')
  file.seek(offset)
  if any(file.read(tarfile.BLOCKSIZE)):
    raise ValueError('it has a damaged header')


def _number(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> int:
  """Returns the number of a class in a .cls file."""
  content = tar.extractfile(member)
  assert content is not None
  text = content.read(_MAX_CLASS + 1).strip()
  if not text.isdigit() or len(text) > _MAX_CLASS:
    raise UserError(f'{path}: {member.name} is not the number of a class')
  return int(text)


def _label(picture: str, numbers: dict[str, int], tar: str, path: str) -> str | int:
  """Returns the class of a picture."""
  if numbers:
    stem = tar_members.split(picture)[0]
    if stem not in numbers:
      raise UserError(f'{path}: {picture} has no .cls file, unlike others')
    return numbers[stem]
  folder = os.path.basename(os.path.dirname(picture))
  if folder not in ('', '.'):
    return folder
  return tar_members.split(tar)[0]

"""A folder of pictures with a captions file, or with a text file for each picture."""

from __future__ import annotations

import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import gin
import numpy as np
import xxhash
from jaxtyping import Shaped

from parti_jax.core import storage
from parti_jax.data import image_decoding
from parti_jax.data.damage import Damaged
from parti_jax.data.readers import folder_index
from parti_jax.data.sources import base
from parti_jax.data.sources import paths


class FolderSource(base.Source):
  """A folder of pictures; `configured` describes the arguments."""

  def __init__(self, path: str, splits: Mapping[str, str], file_key: str, caption_key: str):
    super().__init__('folder', splits)
    self.place = f'folder {path}'
    self._path, self._captions_files, self._keys = path, dict(splits), (file_key, caption_key)

  def open(self, split: str, pictures: bool = True) -> base.Records:
    return self._open(split, pictures)

  def open_described(self, split: str) -> base.Records:
    return self._open(split, pictures=True, folder=self._path)

  def _open(self, split: str, pictures: bool, folder: str | None = None) -> base.Records:
    self.check_split(split)
    file = self._captions_files[split]
    if file.endswith('.txt'):
      files, captions = folder_index.read_text_files(self._path, file)
    else:
      files, captions = folder_index.read(self._path, file, *self._keys, pictures)
    return _Pictures(files if pictures else None, captions, folder)


class _Pictures(base.Records):
  """Pictures given by paths, and captions, both arrays of bytes objects.

  Args:
    files: the paths; None for captions only.
    captions: captions of the pictures.
    folder: if given, examples get their path within it as a key.
  """

  def __init__(
    self,
    files: Shaped[np.ndarray, 'pictures'] | None,
    captions: Shaped[np.ndarray, 'pictures'],
    folder: str | None = None,
  ):
    self._files, self._captions, self._folder = files, captions, folder

  def __len__(self) -> int:
    return len(self._captions)

  def digest(self) -> str:
    found = xxhash.xxh3_64()
    for values in (self._files if self._files is not None else (), self._captions):
      # Only the name of a path, since hosts may mount the folder at different paths.
      for value in values:
        found.update(
          b'%d ' % len(value) + (value if values is self._captions else os.path.basename(value))
        )
    return found.hexdigest()

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    if self._files is None:
      return [{'caption': self._captions[index]} for index in indices]
    return [self._read(os.fsdecode(self._files[index]), self._captions[index]) for index in indices]

  def _read(self, path: str, caption: bytes) -> base.Example | Damaged:
    try:
      with storage.open_file(path) as file:
        # One byte more lets the decoder detect files that are too large.
        example: dict[str, Any] = {
          'picture': file.read(image_decoding.MAX_BYTES + 1),
          'caption': caption,
        }
    except OSError:
      return Damaged('picture file that is gone or cannot be read', file=path)
    if self._folder is not None:
      example['key'] = path.removeprefix(self._folder).lstrip('/')
    return example


@gin.configurable('folder')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] = {'train': 'captions.jsonl'},
  file_key: str = 'file',
  caption_key: str = 'caption',
) -> FolderSource:
  """Returns a source of a folder of pictures with captions in JSON lines.

  Args:
    path: the folder.
    splits: captions file of each split, relative to the folder. Each line is an object with the
      picture's file, relative to the captions file, and its caption. A pattern of text files such
      as '**/*.txt' means that each holds the caption of the picture with the same name.
    file_key: column of the file.
    caption_key: column of the caption.
  """
  return FolderSource(paths.required('folder', path), splits, file_key, caption_key)

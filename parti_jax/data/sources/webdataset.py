"""Tar shards as written by img2dataset and webdataset."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import gin

from parti_jax.data.readers import tar_shards
from parti_jax.data.sources import base
from parti_jax.data.sources import paths


class WebDatasetSource(paths.FilesSource):
  """Tar shards; `configured` describes the arguments."""

  def __init__(self, path: str, splits: Mapping[str, str], caption_key: str | None):
    super().__init__('webdataset', path, splits)
    self._caption_key = caption_key

  def open(self, split: str, pictures: bool = True) -> base.Shards:
    del pictures  # Tars are always read from their beginning.
    return self._open(split, describe=False)

  def open_described(self, split: str) -> base.Shards:
    return self._open(split, describe=True)

  def _open(self, split: str, describe: bool) -> base.Shards:
    return paths.Files(
      self.files(split),
      functools.partial(tar_shards.samples, caption_key=self._caption_key, describe=describe),
    )


@gin.configurable('webdataset')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] = {'train': '*.tar'},
  caption_key: str | None = None,
) -> WebDatasetSource:
  """Returns a source of tar shards as img2dataset writes them, plain or packed.

  Args:
    path: the folder of the shards.
    splits: file pattern of each split, relative to the folder, in the syntax of `file_patterns`.
    caption_key: key of the caption in a sample's .json file, which takes precedence over a .txt
      file. None for the .txt file or, if a sample has none, the key 'caption'.
  """
  return WebDatasetSource(paths.required('webdataset', path), splits, caption_key)

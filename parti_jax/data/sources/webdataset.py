"""Tar shards as img2dataset and webdataset write them."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import gin

from parti_jax.data.readers import tar_shards
from parti_jax.data.sources import base
from parti_jax.data.sources import paths


class WebDatasetSource(paths.FilesSource):
  """Tar shards; the arguments are those of `configured`."""

  def __init__(self, path: str, splits: Mapping[str, str], caption_key: str | None):
    super().__init__('webdataset', path, splits)
    self._caption_key = caption_key

  def open(self, split: str, pictures: bool = True) -> base.Shards:
    del pictures  # A tar is read from its beginning in any case.
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
  """Tar shards of pictures and captions, as img2dataset writes them, plain or packed.

  Args:
    path: the folder of the shards.
    splits: file pattern of each split, relative to the folder; see `file_patterns`.
    caption_key: the key of the caption in a sample's .json file, whether it has a .txt file or not.
      None for the .txt file or, where a sample has none, the key 'caption'.
  """
  return WebDatasetSource(paths.required('webdataset', path), splits, caption_key)

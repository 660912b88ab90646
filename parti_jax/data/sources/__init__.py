"""Sources of captioned pictures: OpenMoji, the user's folders, classes, TFRecords, tar shards, others.

`configured(name)` returns a source with gin's current configuration:

  data.source = 'folder'
  folder.path = 'photos'
  folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}

A name with a suffix, such as 'folder_b', is configured in gin's scope of this name, so two folders
can have separate settings: b's path is `folder_b/folder.path`. `base` defines the interface.
"""

from __future__ import annotations

import gin

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data.sources import base
from parti_jax.data.sources import classes
from parti_jax.data.sources import folder
from parti_jax.data.sources import hf_datasets
from parti_jax.data.sources import openmoji
from parti_jax.data.sources import openmoji_scenes
from parti_jax.data.sources import parquet
from parti_jax.data.sources import prepared
from parti_jax.data.sources import text
from parti_jax.data.sources import tfrecord
from parti_jax.data.sources import webdataset

# A name belongs to the first kind that it begins with.
_SOURCES = {
  'openmoji_scenes': openmoji_scenes.configured,
  'openmoji': openmoji.configured,
  'folder': folder.configured,
  'classes': classes.configured,
  'tfrecord': tfrecord.configured,
  'webdataset': webdataset.configured,
  'parquet': parquet.configured,
  'hf_datasets': hf_datasets.configured,
  'prepared': prepared.configured,
  'text': text.configured,
}
_RENDERED = {
  'openmoji_scenes': openmoji_scenes.configured,
  'openmoji': openmoji.configured,
}
NAMES = tuple(_SOURCES)


@gin.configurable('data')
def chosen(source: str = 'openmoji') -> str:
  """Returns the name of the source that gin chooses by `data.source`."""
  if kind(source) is None:
    raise UserError(f'data.source = {source!r} is unknown; choose from {", ".join(_SOURCES)}')
  return source


def kind(name: str) -> str | None:
  """Returns the kind of a source name, 'folder' for 'folder_b'; None for other names."""
  return next((known for known in _SOURCES if name == known or name.startswith(f'{known}_')), None)


def configured(name: str, image_size: image_sizes.ImageSize = 64) -> base.Source:
  """Returns the source of this name with gin's current configuration.

  Args:
    name: one of `NAMES`, optionally with a suffix.
    image_size: the size at which OpenMoji and its scenes are rendered unless gin sets one, which it
      must if the size is not square.

  Raises:
    UserError: the source is unknown, its path isn't set, or it can't be rendered at the size.
  """
  found = kind(name)
  if found is None:
    raise UserError(f'unknown source {name!r}; choose from {", ".join(_SOURCES)}')
  with gin.config_scope(None if name == found else name):
    if found in _RENDERED:
      return _RENDERED[found](image_size=image_size)
    return _SOURCES[found]()

"""Where captioned pictures come from: OpenMoji, or one's own folder, TFRecords, tar shards ...

`configured(name)` returns a source as gin configures it:

  data.source = 'folder'
  folder.path = 'photos'
  folder.splits = {'train': 'train.jsonl', 'validation': 'validation.jsonl'}

A name may have an ending, 'folder_b', to be read from gin's scope of this name, so that two folders
have settings of their own: b's path is `folder_b/folder.path`. `base` says what a source is.
"""

from __future__ import annotations

import gin

from parti_jax.core.errors import UserError
from parti_jax.data.sources import base
from parti_jax.data.sources import folder
from parti_jax.data.sources import hf_datasets
from parti_jax.data.sources import openmoji
from parti_jax.data.sources import parquet
from parti_jax.data.sources import prepared
from parti_jax.data.sources import text
from parti_jax.data.sources import tfrecord
from parti_jax.data.sources import webdataset

_SOURCES = {
  'openmoji': openmoji.configured,
  'folder': folder.configured,
  'tfrecord': tfrecord.configured,
  'webdataset': webdataset.configured,
  'parquet': parquet.configured,
  'hf_datasets': hf_datasets.configured,
  'prepared': prepared.configured,
  'text': text.configured,
}
NAMES = tuple(_SOURCES)


@gin.configurable('data')
def chosen(source: str = 'openmoji') -> str:
  """Returns the name of the source that gin chooses by `data.source`."""
  if kind(source) is None:
    raise UserError(f'data.source = {source!r} is unknown; there are {", ".join(_SOURCES)}')
  return source


def kind(name: str) -> str | None:
  """Returns the kind of source that a name is of, 'folder' of 'folder_b'; None for other names."""
  return next((known for known in _SOURCES if name == known or name.startswith(f'{known}_')), None)


def configured(name: str, image_size: int = 64) -> base.Source:
  """Returns the source of this name as gin configures it now.

  Args:
    name: one of `NAMES`, or one with an ending.
    image_size: the size at which OpenMoji draws its pictures unless `openmoji.size` says another.

  Raises:
    UserError: there is no such source, or its path is not set.
  """
  found = kind(name)
  if found is None:
    raise UserError(f'there is no source {name!r}; there are {", ".join(_SOURCES)}')
  with gin.config_scope(None if name == found else name):
    if found == 'openmoji':
      return openmoji.configured(image_size=image_size)
    return _SOURCES[found]()

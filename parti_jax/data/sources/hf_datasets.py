"""Folders written by `save_to_disk` of the Hugging Face library `datasets`.

The library itself reads them: it supports all versions of its format, and looks up rows in the
memory map of its Arrow files. It is an optional extra, since it needs pandas and some ten other
packages.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import gin
import xxhash

from parti_jax.core import storage
from parti_jax.core.errors import UserError
from parti_jax.data.damage import Damaged
from parti_jax.data.sources import base
from parti_jax.data.sources import paths

# Files that `DatasetDict.save_to_disk` and `Dataset.save_to_disk` write.
_DICT, _STATE = 'dataset_dict.json', 'state.json'
_LARGEST = 2**24


class HfDatasetsSource(base.Source):
  """A saved dataset; `configured` describes the arguments."""

  def __init__(
    self,
    path: str,
    splits: Mapping[str, str] | None,
    image_key: str | None,
    caption_key: str | None,
  ):
    storage.check_local(path)
    folders = _splits(path) if splits is None else splits
    super().__init__('hf_datasets', folders)
    self.place = f'hf_datasets {path}'
    self._folders = {split: storage.join(path, folder) for split, folder in folders.items()}
    self._keys = image_key, caption_key

  def open(self, split: str, pictures: bool = True) -> base.Records:
    self.check_split(split)
    return _Rows(self._folders[split], self._keys, pictures)


def is_saved(path: str) -> bool:
  """Returns whether a folder was written by `save_to_disk`."""
  return any(storage.exists(storage.join(path, name)) for name in (_DICT, _STATE))


def _splits(path: str) -> dict[str, str]:
  """Returns {split: its folder} of a saved folder."""
  file = storage.join(path, _DICT)
  if not storage.exists(file):
    if storage.exists(storage.join(path, _STATE)):
      return {'train': ''}
    raise UserError(
      f'hf_datasets: {path} was not written by save_to_disk of the library datasets '
      '(gin: hf_datasets.path); Parquet files are read by '
      "data.source='parquet'"
    )
  try:
    names = storage.read_json(file, _LARGEST)['splits']
    if not names or not all(isinstance(name, str) and '/' not in name for name in names):
      raise ValueError('no names')
    return {name: name for name in names}
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(f'hf_datasets: {file} is damaged; save the dataset again') from error


class _Rows(base.Records):
  """The rows of a saved dataset."""

  def __init__(self, folder: str, keys: tuple[str | None, str | None], pictures: bool):
    self._folder, self._keys, self._pictures = folder, keys, pictures
    _ = self._table  # Opened now to report its errors early.

  @functools.cached_property
  def _table(self):
    """The dataset with rows as Arrow tables, and the columns to read."""
    import datasets
    import pyarrow as pa

    from parti_jax.data.readers import arrow_rows

    try:
      dataset = datasets.load_from_disk(self._folder, keep_in_memory=False)
    except (
      pa.ArrowException,
      OSError,
      ValueError,
      LookupError,
      TypeError,
      AttributeError,
    ) as error:
      reason = ' '.join(str(error).split()) or type(error).__name__
      raise UserError(
        f'hf_datasets: {self._folder} is damaged or not a saved dataset: {reason}; save it again'
      ) from error
    if not isinstance(dataset, datasets.Dataset):
      raise UserError(
        f'hf_datasets: {self._folder} holds the splits {", ".join(dataset)}; set '
        "hf_datasets.splits={'train': 'FOLDER'}, or omit it"
      )
    columns = arrow_rows.find(
      dataset.data.schema, 'hf_datasets', self._folder, *self._keys, self._pictures
    )
    return dataset.select_columns(columns.names).with_format('arrow'), columns

  def __getstate__(self) -> dict[str, Any]:
    return {name: value for name, value in self.__dict__.items() if name != '_table'}

  def __len__(self) -> int:
    return len(self._table[0])

  def digest(self) -> str:
    sizes = json.dumps(sorted(storage.sizes(self._folder).items()))
    state = storage.read(os.path.join(self._folder, _STATE), _LARGEST)
    return xxhash.xxh3_64_hexdigest(sizes.encode() + state)

  def read(self, indices: Sequence[int]) -> list[base.Example | Damaged]:
    import pyarrow as pa

    from parti_jax.data.readers import arrow_rows

    dataset, columns = self._table
    try:
      found: list[base.Example | Damaged] = []
      for batch in dataset[list(map(int, indices))].to_batches():
        rows = arrow_rows.Batch(batch, columns)
        found.extend(rows.example(row) for row in range(len(rows)))
      return found
    except (pa.ArrowException, OSError, ValueError):
      if len(indices) == 1:
        return [Damaged('unreadable row of an Arrow file', file=self._folder)]
      return [self.read([index])[0] for index in indices]


@gin.configurable('hf_datasets')
def configured(
  path: str | None = None,
  splits: Mapping[str, str] | None = None,
  image_key: str | None = None,
  caption_key: str | None = None,
) -> HfDatasetsSource:
  """Returns a source of a folder written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`.

  Args:
    path: the folder, on a local disk.
    splits: folder of each split, relative to it. None for the splits of a DatasetDict, or for
      a single split 'train' of a Dataset.
    image_key: column of the pictures; None for one of `arrow_rows.PICTURE_KEYS`.
    caption_key: column of the captions; None for one of `arrow_rows.CAPTION_KEYS`.
  """
  return HfDatasetsSource(paths.required('hf_datasets', path), splits, image_key, caption_key)

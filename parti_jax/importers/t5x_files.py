"""Lists the arrays in a checkpoint of t5x, without reading their values.

A checkpoint is a folder `checkpoint_<step>`. There are two formats:

- t5x's own: a file `checkpoint`, Flax's msgpack of the tree, and a zarr folder for each array.
  Where an array would be, the tree has the array's TensorStore spec. Early versions of Orbax wrote
  the same file and folders, with the folder's name in the tree instead of a spec.
- Orbax's: a file `_METADATA`, usually in a folder `state`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorstore

from parti_jax.core.errors import UserError
from parti_jax.importers import flax_files
from parti_jax.importers import key_map

_TREE = 'checkpoint'
_ORBAX_TREE = '_METADATA'
# Prefix of the name of an array's folder in the tree of early versions of Orbax.
_PLACEHOLDER = 'PLACEHOLDER://'


def is_checkpoint(folder: pathlib.Path) -> bool:
  """Returns whether a folder is a checkpoint of t5x."""
  return any((_root(folder) / name).is_file() for name in (_TREE, _ORBAX_TREE))


def open_checkpoint(folder: pathlib.Path) -> dict[str, key_map.StoredArray]:
  """Lists the arrays in a checkpoint of t5x.

  Args:
    folder: a folder `checkpoint_<step>` for which `is_checkpoint` is True.

  Returns:
    {name: array}, such as 'target/encoder/encoder_norm/scale'.

  Raises:
    UserError: if the checkpoint is damaged, or has no arrays.
  """
  root = _root(folder)
  arrays = dict(_orbax(root) if (root / _ORBAX_TREE).is_file() else _own_format(root))
  if not arrays:
    raise UserError(f'{folder} holds no arrays')
  return arrays


def _root(folder: pathlib.Path) -> pathlib.Path:
  return folder / 'state' if (folder / 'state').is_dir() else folder


def _damaged(path: pathlib.Path, error: Exception) -> UserError:
  reason = ' '.join(str(error).split())[:300]
  return UserError(f'{path} is damaged or unfinished ({reason}); copy the whole folder again')


@dataclasses.dataclass(frozen=True)
class _ZarrArray:
  folder: pathlib.Path
  store: tensorstore.TensorStore

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.store.shape)

  @property
  def dtype(self) -> np.dtype:
    return self.store.dtype.numpy_dtype

  def read(self) -> np.ndarray:
    try:
      return self.store.read().result()
    except ValueError as error:
      raise _damaged(self.folder, error) from error


def _own_format(root: pathlib.Path) -> Iterator[tuple[str, key_map.StoredArray]]:
  file = root / _TREE
  with open(file, 'rb') as opened:
    if opened.read(23) == b'model_checkpoint_path: ':
      raise UserError(
        f"{root} is a checkpoint of TensorFlow, which isn't read; give the model's t5x checkpoint "
        'or Hugging Face files'
      )
  leaves = flax_files.read_leaves(file)
  for name, leaf in leaves.items():
    found: key_map.StoredArray | None = None
    if name.endswith('/kvstore/driver'):
      name = name.removesuffix('/kvstore/driver')
      found = _zarr(root, name, _folder_of_spec(file, name, leaves))
    elif isinstance(leaf, str) and leaf.startswith(_PLACEHOLDER):
      found = _zarr(root, name, leaf.removeprefix(_PLACEHOLDER))
    elif hasattr(leaf, 'read'):
      found = leaf
    if found is not None:
      yield name.removeprefix('optimizer/'), found


def _folder_of_spec(file: pathlib.Path, name: str, leaves: Mapping[str, Any]) -> Any:
  """Returns the folder in an array's TensorStore spec; older specs have the path at their top."""
  if leaves.get(f'{name}/driver') != 'zarr':
    raise UserError(
      f'{file}: {name} is in a store {leaves.get(f"{name}/driver")!r} instead of zarr'
    )
  return leaves.get(f'{name}/kvstore/path', leaves.get(f'{name}/path'))


def _zarr(root: pathlib.Path, name: str, place: Any) -> _ZarrArray | None:
  """Opens the zarr folder of an array, or its entry in Orbax's database of arrays.

  Returns None if the folder is missing: a copy of a checkpoint may lack arrays that nobody reads,
    such as
  those of the optimizer.
  """
  place = place.rstrip('/') if isinstance(place, str) else ''
  if place == '..' or pathlib.PurePath(place).parts != (place,):
    raise UserError(f'{root / _TREE}: {name} is in the folder {place!r}, which is not in {root}')
  store: dict[str, Any] = {'driver': 'file', 'path': f'{root / place}/'}
  if (root / 'manifest.ocdbt').is_file():
    files = {'driver': 'file', 'path': f'{root}/'}
    store = {'driver': 'ocdbt', 'base': files, 'path': f'{place}/'}
  elif not (root / place).is_dir():
    return None
  # Without the last setting, a missing file would be read as zeros.
  spec = {'driver': 'zarr', 'kvstore': store, 'fill_missing_data_reads': False}
  try:
    array = _ZarrArray(root / place, tensorstore.open(spec, open=True).result())
  except ValueError as error:
    raise _damaged(root / place, error) from error
  if array.dtype == np.uint16:
    raise UserError(
      f'{root / place}: bfloat16 as t5x wrote it before June 2021, which is not read; have t5x '
      'write the checkpoint again'
    )
  return array


@dataclasses.dataclass(frozen=True)
class _OrbaxArray:
  root: pathlib.Path
  keys: tuple[str, ...]
  shape: tuple[int, ...]
  dtype: np.dtype

  def read(self) -> np.ndarray:
    import orbax.checkpoint as ocp

    item: Any = 0
    restore: Any = ocp.RestoreArgs(restore_type=np.ndarray)
    for key in reversed(self.keys):
      item, restore = {key: item}, {key: restore}
    try:
      found = _orbax_handler().restore(
        self.root,
        args=ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True),
      )
    except Exception as error:  # Whatever Orbax and TensorStore raise.
      raise _damaged(self.root, error) from error
    for key in self.keys:
      found = found[key]
    return np.asarray(found)


def _orbax(root: pathlib.Path) -> Iterator[tuple[str, _OrbaxArray]]:
  from etils import epath

  try:
    tree = _orbax_handler().metadata(epath.Path(root)).tree
  except Exception as error:  # Whatever Orbax and TensorStore raise.
    raise _damaged(root, error) from error
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    if hasattr(leaf, 'shape') and getattr(leaf, 'dtype', None) is not None:
      keys = tuple(name.split('/'))
      yield name, _OrbaxArray(root, keys, tuple(leaf.shape), np.dtype(leaf.dtype))


def _orbax_handler():
  """Returns Orbax's reader, without synchronization with other processes."""
  # Imported here: Orbax takes seconds that the readers of other formats need not pay.
  import orbax.checkpoint as ocp

  process = jax.process_index()
  return ocp.PyTreeCheckpointHandler(
    multiprocessing_options=ocp.options.MultiprocessingOptions(
      primary_host=process, active_processes={process}
    )
  )

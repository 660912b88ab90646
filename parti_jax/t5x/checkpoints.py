"""Converts between t5x's checkpoints and ours, which name the same arrays differently.

The names in our TrainState and in t5x's state dict, for the same model and optimizer:

| ours | t5x |
|---|---|
| `step` | `state/step` |
| `params/...` | `target/...` |
| `optimizer_state/...` | `state/param_states/...` |
| `statistics/...` | `flax_mutables/statistics/...`, which also has the step |

The rest of each name is equal: like Orbax, t5x's `OptaxWrapper` joins keys, fields and positions of
the optax state, and omits empty nodes. t5x writes its state dict with Orbax to
`checkpoint_<step>/state` in its MODEL_DIR.

A single host converts a checkpoint, and holds its state in memory once.
"""

from __future__ import annotations

import collections
from collections.abc import Mapping
from typing import Any

import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath

from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import remote_staging
from parti_jax.checkpoints import run_checkpoints
from parti_jax.checkpoints import whole_moments
from parti_jax.core import errors
from parti_jax.core import storage

# Prefixes of our names -> t5x's prefixes.
_NAMES = {
  'step': 'state/step',
  'params': 'target',
  'optimizer_state': 'state/param_states',
  'statistics': 'flax_mutables/statistics',
}
_PARAMETERS = 'target/'
# The item of a checkpoint with the state dict; our checkpoints have the state under the same name.
_ITEM = 'state'
# Maximum size of a chunk of an array, in bytes; the same as in t5x.
CHUNK_BYTES = 64 << 20
# Maximum number of arrays in an error message.
_SHOWN = 5


def state_dict(state) -> dict[str, Any]:
  """Converts our state to t5x's state dict.

  Args:
    state: a TrainState, or a tree with its names, of arrays or abstract arrays.

  Returns:
    A dict with 'target', 'state' and, if there are statistics, 'flax_mutables', with the same
    leaves.
  """
  found = {_t5x_name(path): leaf for path, leaf in run_checkpoints.by_path(state).items()}
  if any(name.startswith('flax_mutables/') for name in found):
    found['flax_mutables/statistics/step'] = found['state/step']
  return flax.traverse_util.unflatten_dict(found, sep='/')


def train_state(tree, like):
  """Converts t5x's state dict to our state.

  Args:
    tree: a state dict with at least the names of `state_dict(like)`.
    like: a TrainState; its leaves are ignored.

  Returns:
    A TrainState with the leaves of `tree`.
  """
  found = run_checkpoints.by_path(tree)
  leaves = [found[_t5x_name(path)] for path in run_checkpoints.by_path(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _t5x_name(path: str) -> str:
  prefix, slash, rest = path.partition('/')
  return _NAMES[prefix] + slash + rest


def host_device(what: str = 'this command converts checkpoints') -> jax.Device:
  """Returns JAX's CPU device.

  Args:
    what: what the device is for, for the message.

  Raises:
    UserError: if JAX has no CPU backend.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    raise errors.UserError(
      f'{what} on the CPU, but JAX_PLATFORMS excludes it; add `,cpu` to JAX_PLATFORMS'
    ) from error


def _in_host() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(host_device())


def in_host_memory(tree):
  """Returns abstract arrays on `host_device` with the shapes and dtypes of a tree's leaves."""
  sharding = _in_host()
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    is_leaf=lambda leaf: hasattr(leaf, 'shape'),
  )


def read_run(path: epath.Path) -> dict[str, Any]:
  """Reads a checkpoint of a run, with any optimizer, as t5x's state dict on `host_device`.

  Second moments of earlier versions are converted, as `whole_moments` describes.

  Args:
    path: the checkpoint's folder, the result of `run_checkpoints.latest_checkpoint`.
  """
  tree = in_host_memory(run_checkpoints.read_metadata(path / _ITEM))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(path / _ITEM, args=_restore_args(tree))
  return with_factored_moments(state_dict(restored), collections.defaultdict(_in_host))


def with_factored_moments(tree, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, Any]:
  """Factors the second moments of a state dict of an earlier version, as `whole_moments` describes.

  Args:
    tree: t5x's state dict of arrays, of this version or an earlier one.
    shardings: shardings of the factored second moments by name.

  Returns:
    The state dict of this version.
  """
  arrays = run_checkpoints.by_path(tree)
  whole = _whole_moments(arrays)
  if not whole:
    return tree
  logging.warning('%s', whole_moments.line(len(whole)))
  return flax.traverse_util.unflatten_dict(whole_moments.factor(arrays, whole, shardings), sep='/')


def saved_form(path, wanted) -> dict[str, Any] | None:
  """Returns the state dict to restore from a checkpoint whose second moments are not factored.

  Args:
    path: folder of any checkpoint.
    wanted: t5x's state dict of abstract arrays, of this version.

  Returns:
    The state dict with the arrays of `whole_moments.as_saved`; None if the checkpoint has no such
    moments.
  """
  saved = run_checkpoints.by_path(run_checkpoints.read_metadata(epath.Path(path) / _ITEM))
  places = run_checkpoints.by_path(wanted)
  whole = _whole_moments(saved, places)
  return (
    flax.traverse_util.unflatten_dict(whole_moments.as_saved(places, whole, _PARAMETERS), sep='/')
    if whole
    else None
  )


def _whole_moments(arrays: dict[str, Any], wanted=None) -> list[str]:
  return whole_moments.names(
    {name: tuple(np.shape(leaf)) for name, leaf in arrays.items()}, _PARAMETERS, wanted
  )


def write(folder, tree) -> epath.Path:
  """Writes a t5x checkpoint atomically.

  Args:
    folder: the parent folder of `checkpoint_<step>`, a path or a gs:// URL; created if it does not
      exist.
    tree: t5x's state dict of JAX or NumPy arrays.

  Returns:
    The checkpoint's folder.

  Raises:
    UserError: if the checkpoint exists already, or the folder can't be written.
  """
  path = target(folder, int(tree['state']['step']))
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  tree_args = ocp.args.PyTreeSave(
    tree, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
  )
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise errors.UserError(
      f'{folder}: cannot be created ({error.strerror}); choose another --output_dir'
    ) from error
  try:
    with (
      disk_errors.reported(folder, size),
      ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer,
    ):
      checkpointer.save(path, args=ocp.args.Composite(**{_ITEM: tree_args}))
  except BaseException:
    for unfinished in path.parent.glob(f'{path.name}{ocp.utils.TMP_DIR_SUFFIX}*'):
      unfinished.rmtree(missing_ok=True)
    raise
  return path


def target(folder, step: int) -> epath.Path:
  """Returns the folder for a new checkpoint.

  Args:
    folder: its parent folder, a path or a gs:// URL.
    step: its step.

  Raises:
    UserError: if it exists already, or t5x doesn't support the store.
  """
  if remote_staging.is_needed(folder):
    raise errors.UserError(
      f'{folder}: t5x reads checkpoints only from local folders and gs:// URLs; give one of these'
    )
  path = storage.as_epath(folder)
  path = (path if storage.is_url(folder) else path.absolute()) / f'checkpoint_{step}'
  if path.exists():
    raise errors.UserError(f'{path} exists already; remove it or choose another --output_dir')
  return path


def read(path, wanted, within: tuple[str, ...] = ('target/', 'state/', 'flax_mutables/')):
  """Reads a t5x checkpoint.

  Args:
    path: its folder, `.../checkpoint_<step>`, a path or a gs:// URL.
    wanted: t5x's state dict, or the parts of it to read, with shapes, dtypes and shardings.
    within: prefixes of the names that must be in `wanted` if they are in the checkpoint.

  Returns:
    The arrays of `wanted`. They equal the saved ones, except where `wanted` has a wider dtype, or
    an earlier version saved second moments that are not factored.

  Raises:
    UserError: if the checkpoint doesn't exist, is damaged, or doesn't match; names the arrays and
      both shapes.
  """
  path = storage.as_epath(path)
  path = path if storage.is_url(path) else path.absolute()
  saved = _saved(path)
  form = saved_form(path, wanted) or wanted
  _check_fits(path, saved, form, within)
  try:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
      found = checkpointer.restore(path / _ITEM, args=_restore_args(form, partial_restore=True))
  except Exception as error:
    # Orbax and TensorStore raise many kinds of errors.
    raise errors.UserError(
      f'{path}: cannot be read ({" ".join(str(error).split())[:200]}); it may be damaged, so '
      'choose another checkpoint'
    ) from error
  return (
    found
    if form is wanted
    else with_factored_moments(
      found, {name: leaf.sharding for name, leaf in run_checkpoints.by_path(wanted).items()}
    )
  )


def _restore_args(tree, **kwargs) -> ocp.args.PyTreeRestore:
  return ocp.args.PyTreeRestore(
    item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), **kwargs
  )


def _saved(path: epath.Path) -> dict[str, Any]:
  """Returns {name: metadata with shape and dtype} for the arrays of a t5x checkpoint."""
  if (path / 'checkpoint').exists():
    raise errors.UserError(
      f"{path}: a checkpoint of t5x's older format; write it with use_orbax=True, the default of "
      't5x.train'
    )
  if not (path / _ITEM).is_dir():
    within = sorted(found.name for found in path.glob('checkpoint_*')) if path.is_dir() else []
    hint = f', such as {path / within[-1]}' if within else ''
    raise errors.UserError(
      f'{path}: not a checkpoint of t5x; give the folder checkpoint_<step> of its MODEL_DIR{hint}'
    )
  metadata = run_checkpoints.read_metadata(path / _ITEM)
  if metadata is None:
    raise errors.UserError(
      f'{path}: its metadata is missing, so it is damaged or unfinished; choose another checkpoint'
    )
  return run_checkpoints.by_path(metadata)


def _check_fits(path, saved: dict[str, Any], wanted, within: tuple[str, ...]):
  """Raises UserError unless a checkpoint has the wanted arrays, and no others in `within`."""
  wanted = run_checkpoints.by_path(wanted)
  problems = []
  for name, leaf in wanted.items():
    if name not in saved:
      problems.append(f'{name} {list(leaf.shape)} is missing')
    elif tuple(saved[name].shape) != tuple(leaf.shape):
      problems.append(f'{name} is {list(saved[name].shape)} instead of {list(leaf.shape)}')
    elif not np.can_cast(saved[name].dtype, leaf.dtype):
      problems.append(f'{name} is {saved[name].dtype} instead of {leaf.dtype}')
  problems += [
    f'{name} {list(saved[name].shape)} is not in the model or the optimizer'
    for name in saved
    if name.startswith(within) and name not in wanted
  ]
  if problems:
    more = f' and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
    remedy = (
      'give the gin files of the model that it was trained with'
      if any(name.startswith('target/') for name in problems)
      else 'set train.optimizer to the optimizer that it was trained with, or give '
      '--parameters_only to reset the optimizer'
    )
    raise errors.UserError(
      f'{path}: does not match the gin files: {"; ".join(problems[:_SHOWN])}{more}; {remedy}'
    )

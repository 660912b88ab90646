"""t5x's checkpoints and those of our runs: the same arrays by other names.

A state of ours and t5x's state dict of the same model and optimiser:

| ours | t5x |
|---|---|
| `step` | `state/step` |
| `params/...` | `target/...` |
| `optimizer_state/...` | `state/param_states/...` |
| `statistics/...` | `flax_mutables/statistics/...`, which has the step as well |

Behind these beginnings the names are the same: t5x's `OptaxWrapper` takes keys, fields and
positions of the optax state as Orbax does, and leaves away what is empty. t5x writes such a state
dict with Orbax to `checkpoint_<step>/state` in its MODEL_DIR.

All of this takes place in the memory of one host, which holds the state once.
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

# How names begin, ours and t5x's.
_NAMES = {
  'step': 'state/step',
  'params': 'target',
  'optimizer_state': 'state/param_states',
  'statistics': 'flax_mutables/statistics',
}
_PARAMETERS = 'target/'
# What of a checkpoint has the state dict; a run's checkpoint has its state by the same name.
_ITEM = 'state'
# The most that who wants a part of an array reads at once; t5x's own number.
CHUNK_BYTES = 64 << 20
# Names of arrays that an error shows.
_SHOWN = 5


def state_dict(state) -> dict[str, Any]:
  """A state of ours as t5x's state dict.

  Args:
    state: a TrainState, or a tree with its names; of arrays or of whatever has a shape.

  Returns:
    'target', 'state' and, if there are statistics, 'flax_mutables', dicts of the same leaves.
  """
  found = {_t5x_name(path): leaf for path, leaf in run_checkpoints.by_path(state).items()}
  if any(name.startswith('flax_mutables/') for name in found):
    found['flax_mutables/statistics/step'] = found['state/step']
  return flax.traverse_util.unflatten_dict(found, sep='/')


def train_state(tree, like):
  """A state of ours from t5x's state dict.

  Args:
    tree: of the shape of `state_dict(like)`; what else it has is left out.
    like: a TrainState, whose leaves don't matter.

  Returns:
    A TrainState of the leaves of `tree`.
  """
  found = run_checkpoints.by_path(tree)
  leaves = [found[_t5x_name(path)] for path in run_checkpoints.by_path(like)]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _t5x_name(path: str) -> str:
  beginning, slash, rest = path.partition('/')
  return _NAMES[beginning] + slash + rest


def host_device(what: str = 'checkpoints are converted') -> jax.Device:
  """The device whose memory is the host's.

  Args:
    what: is done there, for the message.

  Raises:
    UserError: if JAX has no CPU backend.
  """
  try:
    return jax.local_devices(backend='cpu')[0]
  except RuntimeError as error:
    raise errors.UserError(
      f"{what} in the host's memory, but JAX_PLATFORMS leaves the CPU out; add `,cpu` to it"
    ) from error


def _in_host() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(host_device())


def in_host_memory(tree):
  """Shapes and dtypes of a tree's leaves, on `host_device`."""
  sharding = _in_host()
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
    tree,
    is_leaf=lambda leaf: hasattr(leaf, 'shape'),
  )


def read_run(path: epath.Path) -> dict[str, Any]:
  """A checkpoint of a run as t5x's state dict, in the host's memory, whatever its optimiser is.

  Second moments are in today's form, see `whole_moments`.

  Args:
    path: the checkpoint's folder, of `run_checkpoints.latest_checkpoint`.
  """
  tree = in_host_memory(run_checkpoints.read_metadata(path / _ITEM))
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
    restored = checkpointer.restore(path / _ITEM, args=_restore_args(tree))
  return with_factored_moments(state_dict(restored), collections.defaultdict(_in_host))


def with_factored_moments(tree, shardings: Mapping[str, jax.sharding.Sharding]) -> dict[str, Any]:
  """A state dict whose second moments are in today's form, see `whole_moments`.

  Args:
    tree: t5x's state dict of arrays, of this version or an earlier one.
    shardings: of second moments, by name.

  Returns:
    As `tree`.
  """
  arrays = run_checkpoints.by_path(tree)
  whole = _whole_moments(arrays)
  if not whole:
    return tree
  logging.warning('%s', whole_moments.line(len(whole)))
  return flax.traverse_util.unflatten_dict(whole_moments.factor(arrays, whole, shardings), sep='/')


def saved_form(path, wanted) -> dict[str, Any] | None:
  """What to restore of a checkpoint of an earlier version, see `whole_moments.as_saved`.

  Args:
    path: the checkpoint's folder, of this version, an earlier one or another kind.
    wanted: t5x's state dict of abstract arrays.

  Returns:
    As `wanted`; None if the checkpoint has no whole moments.
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
  """Writes a t5x checkpoint, whole or not at all.

  Args:
    folder: where it becomes `checkpoint_<step>`; a path or a gs:// URL. Made if it is not there.
    tree: t5x's state dict, of jax.Arrays or numpy arrays.

  Returns:
    The checkpoint's folder.

  Raises:
    UserError: if it is there already, or the folder can't be written.
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
      f"{folder}: can't be made ({error.strerror}); give another --output_dir"
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
  """The folder of the checkpoint of a step that is to be written.

  Raises:
    UserError: if it is there already, or is in a store that t5x does not know.
  """
  if remote_staging.is_needed(folder):
    raise errors.UserError(
      f"{folder}: t5x's checkpoints are in folders and at gs:// URLs; give one of these"
    )
  path = storage.as_epath(folder)
  path = (path if storage.is_url(folder) else path.absolute()) / f'checkpoint_{step}'
  if path.exists():
    raise errors.UserError(f'{path} is there already; remove it or give another --output_dir')
  return path


def read(path, wanted, within: tuple[str, ...] = ('target/', 'state/', 'flax_mutables/')):
  """Reads a t5x checkpoint.

  Args:
    path: its folder, `.../checkpoint_<step>`; a path or a gs:// URL.
    wanted: t5x's state dict, or the parts of it that are read, of shapes, dtypes and shardings.
    within: of which parts `wanted` must have all that the checkpoint has.

  Returns:
    As `wanted`, of jax.Arrays, bit for bit as they are saved but where a wider dtype is wanted, and
    but for second moments that an earlier version saved whole, see `whole_moments`.

  Raises:
    UserError: if there is no such checkpoint, it is damaged, or it does not fit: names the arrays,
      both shapes, and the way out.
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
    # Whatever Orbax and TensorStore stumble over.
    raise errors.UserError(
      f"{path}: can't be read ({' '.join(str(error).split())[:200]}); is it "
      'damaged? Take another checkpoint'
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
  """{path: shape and dtype} of what a t5x checkpoint has."""
  if (path / 'checkpoint').exists():
    raise errors.UserError(
      f"{path}: of t5x's older format; have t5x write it with "
      'use_orbax=True, the default of t5x.train'
    )
  if not (path / _ITEM).is_dir():
    within = sorted(found.name for found in path.glob('checkpoint_*')) if path.is_dir() else []
    hint = f', such as {path / within[-1]}' if within else ''
    raise errors.UserError(
      f'{path}: no checkpoint of t5x; give the folder checkpoint_<step> of its MODEL_DIR{hint}'
    )
  metadata = run_checkpoints.read_metadata(path / _ITEM)
  if metadata is None:
    raise errors.UserError(
      f'{path}: has no metadata of Orbax, so that it is damaged, or not '
      'written whole; give another checkpoint'
    )
  return run_checkpoints.by_path(metadata)


def _check_fits(path, saved: dict[str, Any], wanted, within: tuple[str, ...]):
  """Raises UserError unless a checkpoint has what is wanted, and nothing else in these parts."""
  wanted = run_checkpoints.by_path(wanted)
  problems = []
  for name, leaf in wanted.items():
    if name not in saved:
      problems.append(f'{name} {list(leaf.shape)} is missing there')
    elif tuple(saved[name].shape) != tuple(leaf.shape):
      problems.append(f'{name} is {list(saved[name].shape)} there and {list(leaf.shape)} here')
    elif not np.can_cast(saved[name].dtype, leaf.dtype):
      problems.append(f'{name} is {saved[name].dtype} there and {leaf.dtype} here')
  problems += [
    f'{name} {list(saved[name].shape)} is only there'
    for name in saved
    if name.startswith(within) and name not in wanted
  ]
  if problems:
    more = f' and {len(problems) - _SHOWN} more' if len(problems) > _SHOWN else ''
    way_out = (
      'give the gin files of the model that it is of'
      if any(name.startswith('target/') for name in problems)
      else 'give the optimiser (train.optimizer) that it is of, or --parameters_only, so that '
      'the optimiser begins anew'
    )
    raise errors.UserError(
      f'{path}: does not fit the gin files: {"; ".join(problems[:_SHOWN])}{more}; {way_out}'
    )

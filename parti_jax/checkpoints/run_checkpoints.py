"""Orbax checkpoints of a run: its state, its place in the data, and what model it is."""

from __future__ import annotations

import dataclasses
import secrets
import sys
from typing import Any

import flax.linen as nn
import jax
import orbax.checkpoint as ocp
from etils import epath

from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import remote_staging
from parti_jax.checkpoints import store_arrays
from parti_jax.checkpoints import verification
from parti_jax.checkpoints import whole_moments
from parti_jax.core import errors
from parti_jax.core import numerics
from parti_jax.core import storage
from parti_jax.exported_model import model_folder
from parti_jax.models import parti_config

# What Orbax reads as JSON of a checkpoint.
_METADATA_FILES = (
  '_CHECKPOINT_METADATA',
  'model/metadata',
  'data/metadata',
  'state/_METADATA',
  'state/_sharding',
  'state/array_metadatas/process_0',
)


class Checkpoints:
  """The checkpoints in `model_dir/checkpoints`, written asynchronously, the last few kept.

  Those that are there are verified first; damaged ones newer than the newest whole one are moved
  aside. All processes of a run make one together.

  Args:
    model_dir: the run's folder.
    keep: how many checkpoints stay; beside one that is being written, a whole one always does.

  Attributes:
    found: the checkpoint to go on from, and which ones were damaged.
    factored: second moments of what was restored that were whole in the checkpoint, see
      `whole_moments`.

  Raises:
    UserError: if there are checkpoints and none is whole.
  """

  def __init__(self, model_dir, keep: int = 2):
    self._staging = _staged(model_dir, keep) if remote_staging.is_needed(model_dir) else None
    self.directory = self._staging.directory if self._staging else folder(model_dir)
    self.found = verification.newest_whole(
      self.directory, together=True, copies=self._staging is not None
    )
    if self._staging and jax.process_index() == 0:
      self._staging.move_aside(self.found.damaged)
    if self._writes_metadata():
      verification.move_aside(self.directory, self.found.damaged)
    self.factored = 0
    self._writing: int | None = None
    self._bytes = 0
    self._failure: BaseException | None = None
    self._barrier = ocp.multihost.get_barrier_sync_fn()
    # Its first barrier keeps the other processes from looking before the damaged are out of sight.
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=verification.KeepWhole(keep, self._fault),
        cleanup_tmp_directories=True,
        multiprocessing_options=_processes(self._staging),
        async_options=ocp.AsyncOptions(
          barrier_sync_fn=self._wait_for_others,
          post_finalization_callback=lambda: manifest.write(self._unfinished()),
        ),
      ),
      item_names=('state', 'data', 'model'),
      item_handlers=_handlers(self._staging),
    )

  def latest_step(self) -> int | None:
    """The step to go on from; None for a new run."""
    return self.found.step

  def newest_step(self) -> int | None:
    """Step of the newest checkpoint that is whole on the disk; None without one."""
    steps = self._staging.steps() if self._staging else ocp.utils.checkpoint_steps(self.directory)
    return max(steps, default=None)

  def steps(self) -> list[int]:
    """Steps of the whole checkpoints, once what was started is written."""
    self.finish()
    if self._staging:
      return self._staging.steps()
    return sorted(self._manager.all_steps())

  def check(self):
    """Raises what went wrong in the background; to be called now and then, such as each step."""
    if self._failure or (self._writing is not None and not self._manager.is_saving_in_progress()):
      self._finish()
    if self._staging:
      self._staging.check()

  def save(self, step: int, state, data: dict, model: dict, chunk_bytes: int | None = None):
    """Starts writing a checkpoint, once the one before is written; it counts when it is whole.

    Args:
      step: steps done.
      state: a TrainState.
      data: the place in the data, of `Batches.state()`.
      model: of `describe`.
      chunk_bytes: the most bytes of a piece that can be read alone; None for what a device has of
        an array, which is small enough where arrays are split over many.

    Raises:
      UserError: if the disk is full or can't be written; `check` and `close` raise it too.
    """
    self.finish()  # What is written next may remove what is being uploaded.
    # Orbax keeps the primary process of the newest handler for all of them, and whoever has read
    # another checkpoint meanwhile may have made one.
    ocp.PyTreeCheckpointHandler(multiprocessing_options=_processes(self._staging))
    self._writing = step
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with disk_errors.told(self.directory.parent, self._bytes):
      self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.StandardSave(
            state, jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), state)
          ),
          data=ocp.args.JsonSave(data),
          model=ocp.args.JsonSave(model),
        ),
        custom_metadata=manifest.CUSTOM_METADATA,
      )

  def restore(self, step: int, abstract, model: dict):
    """Reads a checkpoint onto the mesh of `abstract`.

    Args:
      step: which one.
      abstract: a TrainState of shapes and shardings.
      model: what the checkpoint must be of, as `describe` gives it.

    Returns:
      The state and the place in the data.

    Raises:
      UserError: if the checkpoint is of another configuration; names what differs.
    """
    path = self.directory / str(step)
    check_same_model(path, read_model(path), model)
    wanted, structure = by_path(abstract), jax.tree.structure(abstract)
    whole = whole_moments.names(_saved_shapes(path), 'params/', wanted)
    saved_form = jax.tree.unflatten(
      structure, whole_moments.as_saved(wanted, whole, 'params/').values()
    )
    check_same_shapes(path, saved_form)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(saved_form), data=ocp.args.JsonRestore()
      ),
    )
    self.factored = len(whole)
    arrays = whole_moments.factor(
      by_path(restored['state']), whole, {name: wanted[name].sharding for name in wanted}
    )
    return jax.tree.unflatten(structure, arrays.values()), restored['data']

  def read_place(self, step: int) -> dict:
    """Reads the place in the data of a checkpoint, as the function of this name."""
    return read_place(self.directory / str(step))

  def finish(self):
    """Waits until what was started is written, and where it is to be copied to, copied."""
    self._finish()
    if self._staging:
      self._staging.wait()

  def close(self):
    """Waits until what was started is written."""
    try:
      self._finish()
      self._manager.close()
    finally:
      if self._staging:
        self._staging.close()

  def _finish(self):
    """Waits for the checkpoint that is being written, and raises what went wrong with it."""
    if self._writing is None:
      return
    with disk_errors.told(self.directory.parent, self._bytes):
      if self._failure:
        raise self._failure
      self._manager.wait_until_finished()
      if self._writes_metadata():
        manifest.seal(self.directory / str(self._writing))
    if self._staging:
      self._staging.upload(self._writing)
    self._writing = None

  def _writes_metadata(self) -> bool:
    """Whether this process renames and completes checkpoints in its folder."""
    return jax.process_index() == 0 or self._staging is not None

  def _fault(self, step: int) -> str | None:
    """What became of a checkpoint since it was written."""
    found = verification.fault(
      self.directory / str(step), together=True, copies=self._staging is not None
    )
    if found and jax.process_index() == 0:
      print(
        f'parti-jax: warning: checkpoint {step} has been damaged: {found}; older ones stay',
        file=sys.stderr,
      )
    return found

  def _unfinished(self) -> epath.Path:
    """Folder of the checkpoint that is being written; some storage needs no temporary name."""
    final = self.directory / str(self._writing)
    temporary = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
    return temporary if temporary.exists() else final

  def _wait_for_others(self, *, key: str, timeout_ms: int):
    """Orbax' barrier in the background, which a process that failed does not wait at.

    When a process comes to the one before the commit, what it writes itself is written.
    """
    failure = sys.exc_info()[1]
    if failure is not None:
      # The others are not at this barrier but at the one that this process will never reach.
      self._failure = failure
      raise failure
    if 'async_write_complete' in key:
      manifest.write_part(self._unfinished(), jax.process_index())
    self._barrier(key=key, timeout_ms=timeout_ms)


def _staged(model_dir, keep: int) -> remote_staging.Staging:
  """The checkpoints in a store that Orbax can't reach, for all processes together."""
  (start,) = verification.of_the_first([secrets.randbits(32)])
  return remote_staging.Staging(model_dir, keep, jax.process_index(), jax.process_count(), start)


def _processes(staged: remote_staging.Staging | None) -> ocp.options.MultiprocessingOptions:
  """Orbax' options: process 0 alone completes a checkpoint, or all do in folders of their own."""
  apart = staged and jax.process_count() > 1
  return ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)


def _handlers(staged: remote_staging.Staging | None):
  """What reads and writes the items; None for Orbax' own choice.

  Several processes with folders of their own write each piece of an array as a file: the databases
  that Orbax writes otherwise can be merged only where all of them are in one folder.
  """
  if not staged or jax.process_count() == 1:
    return None
  options = _processes(staged)
  json_handler = lambda: ocp.JsonCheckpointHandler(multiprocessing_options=options)
  return {
    'state': ocp.StandardCheckpointHandler(multiprocessing_options=options, use_ocdbt=False),
    'data': json_handler(),
    'model': json_handler(),
  }


def describe(objective) -> dict:
  """An objective's name and its model's sizes, as they stand in a checkpoint."""
  return {'stage': objective.name, 'config': dataclasses.asdict(objective.model)}


def folder(model_dir) -> epath.Path:
  """Where the checkpoints of a run are: absolute, as Orbax wants it; so is `gs://...` as it is."""
  path = storage.as_epath(model_dir)
  if storage.is_url(model_dir):
    store_arrays.configure()
  return (path if storage.is_url(model_dir) else path.absolute()) / 'checkpoints'


def has_checkpoint(model_dir) -> bool:
  """Whether a run has begun and written a whole checkpoint."""
  if remote_staging.is_needed(model_dir):
    return bool(remote_staging.steps(model_dir))
  directory = folder(model_dir)
  return directory.is_dir() and bool(ocp.utils.checkpoint_steps(directory))


def latest_checkpoint(model_dir) -> epath.Path:
  """Folder of a run's newest whole checkpoint; says so if it is not the newest one.

  Every file is read for it. Nothing is changed, since the run may be going on. From a store that
  Orbax can't read it is copied to a temporary folder that stays until the process ends.

  Raises:
    UserError: if the run's folder is missing or holds no whole checkpoint.
  """
  if remote_staging.is_needed(model_dir):
    there, directory = storage.is_folder(model_dir), remote_staging.Staging(model_dir).directory
  else:
    directory = folder(model_dir)
    there = directory.is_dir()
  if not there:
    raise errors.UserError(
      f'{model_dir}: no training run there (no folder {directory.name}); give the --model_dir '
      'of a run'
    )
  found = verification.newest_whole(directory)
  if found.step is None:
    raise errors.UserError(
      f'{model_dir}: holds no finished checkpoint yet; train until the '
      'first one is written (train.checkpoint_every)'
    )
  for bad in found.damaged:
    print(
      f'parti-jax: warning: {model_dir}: checkpoint {bad.step} is damaged: {bad.fault}; '
      f'taking {found.step}',
      file=sys.stderr,
    )
  return directory / str(found.step)


def checkpoint_of(model_dir, step: int) -> epath.Path:
  """Folder of a run's checkpoint of a step; every file is read for it.

  Raises:
    UserError: if there is none of that step, or it is damaged, or in a store that Orbax can't read.
  """
  if remote_staging.is_needed(model_dir):
    raise errors.UserError(
      f'{model_dir}: only the newest checkpoint there can be read; copy the '
      'folder to a disk for an older one'
    )
  path = folder(model_dir) / str(step)
  if not path.is_dir():
    steps = sorted(ocp.utils.checkpoint_steps(path.parent)) if path.parent.is_dir() else []
    there = f'those there are of {", ".join(map(str, steps))}' if steps else 'there is none at all'
    raise errors.UserError(f'{model_dir}: no checkpoint of step {step}; {there}')
  found = verification.fault(path)
  if found:
    raise errors.UserError(f'{model_dir}: checkpoint {step} is damaged: {found}; take another')
  return path


def read_model(path: epath.Path) -> dict:
  """What model a checkpoint is of: the dict that `describe` gave.

  Raises:
    UserError: if the checkpoint is unfinished, not one of this package, or has metadata larger than
      any.
  """
  for file in _METADATA_FILES:
    if (path / file).exists():
      storage.check_size(path / file, storage.MAX_JSON)
  try:
    with _json_alone() as checkpointer:
      return checkpointer.restore(path / 'model')
  except (FileNotFoundError, ValueError, KeyError) as error:
    raise _unfinished(path) from error


def read_metadata(path: epath.Path):
  """A tree that Orbax has written, of shapes and dtypes; None if that is not told there.

  Args:
    path: folder of the tree, such as `state` in a checkpoint.
  """
  try:
    # Not by a Checkpointer, which warns that a part of a checkpoint has no metadata as a whole.
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=verification.alone())
    return handler.metadata(path).tree
  except (FileNotFoundError, ValueError, KeyError):
    return None


def read_place(path: epath.Path) -> dict:
  """The place in the data at which a checkpoint was written, see `SharedBatches.state`."""
  with _json_alone() as checkpointer:
    return checkpointer.restore(path / 'data')


def _json_alone() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=verification.alone())


def read_config(path: epath.Path, objective: str) -> dict:
  """Sizes of a checkpoint's model, by the names of this version.

  Args:
    path: a checkpoint's folder, of `latest_checkpoint`.
    objective: name of the objective that it must be of.

  Raises:
    UserError: if the checkpoint is unfinished or of another objective.
  """
  model = read_model(path)
  if model['stage'] != objective:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {model["stage"]!r}; give a run of {objective!r}'
    )
  sizes = model['config']
  return parti_config.by_todays_names(sizes) if objective == 'generator' else sizes


@numerics.fixed()
def read_params(path: epath.Path, module, inputs, device: jax.Device | None = None):
  """A checkpoint's parameters of a module, as `read_parts`, on one device.

  Args:
    path: a checkpoint's folder, of `latest_checkpoint`.
    module: the linen module whose parameters they are.
    inputs: arrays that the module takes.
    device: which one; None for the first of this process.
  """
  boxed = jax.eval_shape(module.init, jax.random.key(0), *inputs)['params']
  sharding = jax.sharding.SingleDeviceSharding(device or jax.local_devices()[0])
  return read_parts(
    path,
    jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
      nn.meta.unbox(boxed),
    ),
  )


def read_parts(path: epath.Path, params):
  """Parts of a checkpoint's parameters, without the optimiser's state.

  Where the run kept an average of the parameters, see `state.averaged`, it is the average. What was
  trained beside these parts, such as a discriminator, is left out. Each process reads what is on
  its own devices and waits for no other, so that one alone may read.

  Args:
    path: a checkpoint's folder, of `latest_checkpoint`.
    params: {name of a part: a tree of shapes and shardings}.

  Returns:
    The parameters, with these shardings.

  Raises:
    UserError: if parameters are missing, unknown or of another shape.
  """
  saved = _saved_shapes(path)
  averaged = {
    part for part in params if any(name.startswith(f'statistics/average/{part}/') for name in saved)
  }
  abstract = {
    'params': {part: tree for part, tree in params.items() if part not in averaged},
    'statistics': {'average': {part: params[part] for part in averaged}},
  }
  abstract = {kind: tree for kind, tree in abstract.items() if jax.tree.leaves(tree)}
  check_same_shapes(
    path,
    abstract,
    within=tuple(
      f'statistics/average/{part}/' if part in averaged else f'params/{part}/' for part in params
    ),
  )
  options = verification.alone()
  with ocp.Checkpointer(
    ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
  ) as checkpointer:
    restored = checkpointer.restore(
      path / 'state',
      args=ocp.args.PyTreeRestore(
        item=abstract,
        partial_restore=True,
        restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
      ),
    )
  return restored.get('params', {}) | restored.get('statistics', {}).get('average', {})


def read_model_folder(path, objective, abstract, inputs):
  """The parameters of an exported model, to start a run with.

  Args:
    path: a model folder, as `parti-jax export` writes it.
    objective: what is trained; its model must be of the same sizes.
    abstract: the parameters' shapes and shardings.
    inputs: what the run is trained with, an `Inputs`.

  Returns:
    The parameters, on the mesh.

  Raises:
    UserError: if there is no model folder, or its sizes, its vocabulary or its tokenizer differ;
      names what differs.
  """
  model = model_folder.load(path)
  networks = model.networks
  networks['generator'] = networks['parti']
  if objective.name not in networks:
    raise errors.UserError(
      f'{path}: the model has no {objective.name}, so that none can start from '
      'it; set train.initial_model to None or to another model'
    )
  config, params, made_with = networks[objective.name]
  inputs.check(
    f'train.initial_model={str(path)!r}', made_with, 'or start without train.initial_model'
  )
  check_same_model(
    path, {'stage': objective.name, 'config': dataclasses.asdict(config)}, describe(objective)
  )
  return put_like(params, {name: abstract[name] for name in params})


def put_like(params, abstract):
  """Parameters of any dtype and place with the dtypes and shardings of `abstract`."""
  return jax.tree.map(
    lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), params, abstract
  )


def check_same_model(path, saved: dict, wanted: dict):
  """Raises UserError that names the settings in which two models differ."""
  if saved['stage'] != wanted['stage']:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {saved["stage"]!r}, not of '
      f'{wanted["stage"]!r}; choose another --model_dir'
    )
  free = ('dropout', 'dtype', 'remat', 'unroll', 'commitment')
  there = parti_config.by_todays_names(saved['config'])
  plain = lambda value: list(value) if isinstance(value, (tuple, list)) else value
  differing = [
    f'{key} is {there.get(key)} there and {value} here'
    for key, value in wanted['config'].items()
    if key not in free and plain(there.get(key)) != plain(value)
  ]
  if differing:
    raise errors.UserError(
      f'{path}: of another configuration: {"; ".join(differing)}; train in '
      'another --model_dir, or set the model back'
    )


def check_same_shapes(path, abstract, within: str | tuple[str, ...] = ''):
  """Compares a checkpoint's arrays with those that are wanted.

  Args:
    path: the checkpoint's folder.
    abstract: a tree of shapes.
    within: the part, or parts, of the state that `abstract` is, such as 'params/encoder/'; all of
      it by default.

  Raises:
    UserError: if the checkpoint is unfinished, or if arrays are missing, unknown or of another
      shape; names them.
  """
  saved, wanted = _saved_shapes(path), _shapes(abstract)
  differing = [
    f'{name} {saved.get(name, "missing")} instead of {shape}'
    for name, shape in wanted.items()
    if saved.get(name) != shape
  ]
  differing += [
    f'{name} {shape} is not in this configuration'
    for name, shape in saved.items()
    if name.startswith(within) and name not in wanted
  ]
  if differing:
    more = f' and {len(differing) - 5} more' if len(differing) > 5 else ''
    raise errors.UserError(
      f'{path}: does not fit this configuration: '
      f'{"; ".join(differing[:5])}{more}; train in another --model_dir, or '
      'set the model or the optimiser back'
    )


def by_path(tree) -> dict[str, Any]:
  """{path: array} of a tree of whatever has a shape, by the names that checkpoints have them under.

  These are the names of dict keys, fields and positions with / between; what is empty has none.
  """
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  name = lambda key: str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
  return {'/'.join(name(key) for key in path): leaf for path, leaf in flat}


def _unfinished(path) -> errors.UserError:
  return errors.UserError(
    f'{path}: not a finished checkpoint of this package; remove the folder or choose another one'
  )


def _saved_shapes(path) -> dict[str, tuple[int, ...]]:
  """Shapes of the arrays of a checkpoint's state, by their paths."""
  metadata = read_metadata(path / 'state')
  if metadata is None:
    raise _unfinished(path)
  return _shapes(metadata)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}

"""Reads and writes Orbax checkpoints of a run: its state, its position in the data, its model."""

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

# Files of a checkpoint that Orbax reads as JSON.
_METADATA_FILES = (
  '_CHECKPOINT_METADATA',
  'model/metadata',
  'data/metadata',
  'state/_METADATA',
  'state/_sharding',
  'state/array_metadatas/process_0',
)


class Checkpoints:
  """The checkpoints in `model_dir/checkpoints`, written asynchronously; the last few are kept.

  The constructor verifies existing checkpoints and moves damaged ones aside that are newer than the
  newest whole one. All processes of a run construct it together.

  Args:
    model_dir: the run's folder.
    keep: number of checkpoints to keep; while one is being written, a whole one always stays too.

  Attributes:
    found: the checkpoint to resume from, and the damaged ones.
    factored: number of second moments that were whole in the restored checkpoint and that
      `whole_moments` has factored.

  Raises:
    UserError: if there are checkpoints but none is whole.
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
    # Its first barrier keeps the other processes from looking before damaged ones are moved aside.
    self._manager = ocp.CheckpointManager(
      self.directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=verification.KeepWhole(keep, self._fault),
        cleanup_tmp_directories=True,
        multiprocessing_options=_processes(self._staging),
        async_options=ocp.AsyncOptions(
          # Orbax tells by a key that all processes share that the folders of a checkpoint are made,
          # which says nothing of folders that each process has of its own.
          create_directories_asynchronously=self._staging is None,
          barrier_sync_fn=self._wait_for_others,
          post_finalization_callback=lambda: manifest.write(self._unfinished()),
        ),
      ),
      item_names=('state', 'data', 'model'),
      item_handlers=_handlers(self._staging),
    )

  def latest_step(self) -> int | None:
    """Returns the step to resume from; None for a new run."""
    return self.found.step

  def newest_step(self) -> int | None:
    """Returns the step of the newest whole checkpoint on the disk; None without one."""
    steps = self._staging.steps() if self._staging else ocp.utils.checkpoint_steps(self.directory)
    return max(steps, default=None)

  def steps(self) -> list[int]:
    """Waits for pending writes and returns the steps of the whole checkpoints."""
    self.finish()
    if self._staging:
      return self._staging.steps()
    return sorted(self._manager.all_steps())

  def check(self):
    """Raises errors from the background; call it regularly, for instance at each step."""
    if self._failure or (self._writing is not None and not self._manager.is_saving_in_progress()):
      self._finish()
    if self._staging:
      self._staging.check()

  def save(self, step: int, state, data: dict, model: dict, chunk_bytes: int | None = None):
    """Waits for the previous checkpoint, then starts writing one; it counts once it is whole.

    Args:
      step: steps done.
      state: a TrainState.
      data: the position in the data, the result of `Batches.state()`.
      model: the result of `describe`.
      chunk_bytes: maximum bytes of a chunk that can be read separately; None for a device's part
        of an array, which is small enough if arrays are split over many devices.

    Raises:
      UserError: if the disk is full or can't be written; `check` and `close` raise it too.
    """
    self.finish()  # What is written next may remove what is being uploaded.
    # Orbax keeps the primary process of the newest handler for all of them, and whoever has read
    # another checkpoint meanwhile may have made one.
    ocp.PyTreeCheckpointHandler(multiprocessing_options=_processes(self._staging))
    self._writing = step
    self._bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with disk_errors.reported(self.directory.parent, self._bytes):
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
      step: the checkpoint's step.
      abstract: a TrainState of shapes and shardings.
      model: the model that the checkpoint must match, the result of `describe`.

    Returns:
      The state and the position in the data.

    Raises:
      UserError: if the checkpoint is of another configuration; names the differences.
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
    """Reads the position in the data of the checkpoint of a step."""
    return read_place(self.directory / str(step))

  def finish(self):
    """Waits until pending checkpoints are written and, with a store, uploaded."""
    self._finish()
    if self._staging:
      self._staging.wait()

  def close(self):
    """Waits until pending checkpoints are written."""
    try:
      self._finish()
      self._manager.close()
    finally:
      if self._staging:
        self._staging.close()

  def _finish(self):
    """Waits for the checkpoint that is being written, and raises its error if it failed."""
    if self._writing is None:
      return
    with disk_errors.reported(self.directory.parent, self._bytes):
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
    """Returns the folder of the checkpoint being written; some storage needs no temporary name."""
    final = self.directory / str(self._writing)
    temporary = final.with_name(final.name + ocp.utils.TMP_DIR_SUFFIX)
    return temporary if temporary.exists() else final

  def _wait_for_others(self, *, key: str, timeout_ms: int):
    """Waits at Orbax's barrier in the background, unless this process has failed.

    When a process reaches the barrier before the commit, its own files are written.
    """
    failure = sys.exc_info()[1]
    if failure is not None:
      # The others wait at another barrier, which this process will never reach.
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
  """Returns an objective's name and its model's config, in the form that checkpoints store."""
  return {'stage': objective.name, 'config': dataclasses.asdict(objective.model)}


def folder(model_dir) -> epath.Path:
  """Returns the folder of a run's checkpoints, as the absolute path or URL that Orbax needs."""
  path = storage.as_epath(model_dir)
  if storage.is_url(model_dir):
    store_arrays.configure()
  return (path if storage.is_url(model_dir) else path.absolute()) / 'checkpoints'


def has_checkpoint(model_dir) -> bool:
  """Returns whether a run has written a whole checkpoint."""
  if remote_staging.is_needed(model_dir):
    return bool(remote_staging.steps(model_dir))
  directory = folder(model_dir)
  return directory.is_dir() and bool(ocp.utils.checkpoint_steps(directory))


def latest_checkpoint(model_dir) -> epath.Path:
  """Returns the folder of a run's newest whole checkpoint; warns if newer ones are damaged.

  It reads all files of the checkpoint, and changes nothing, since the run may still be training.
  From a store that Orbax can't read, it copies the checkpoint to a temporary folder that stays
  until the process ends.

  Raises:
    UserError: if the run's folder is missing or holds no whole checkpoint.
  """
  if remote_staging.is_needed(model_dir):
    exists, directory = storage.is_folder(model_dir), remote_staging.Staging(model_dir).directory
  else:
    directory = folder(model_dir)
    exists = directory.is_dir()
  if not exists:
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
  """Returns the folder of a run's checkpoint of a step, after reading all its files.

  Raises:
    UserError: if it doesn't exist, is damaged, or is in a store that Orbax can't read.
  """
  if remote_staging.is_needed(model_dir):
    raise errors.UserError(
      f'{model_dir}: only the newest checkpoint there can be read; copy the '
      'folder to a disk for an older one'
    )
  path = folder(model_dir) / str(step)
  if not path.is_dir():
    steps = sorted(ocp.utils.checkpoint_steps(path.parent)) if path.parent.is_dir() else []
    existing = f'there are {", ".join(map(str, steps))}' if steps else 'there are none'
    raise errors.UserError(f'{model_dir}: no checkpoint of step {step}; {existing}')
  found = verification.fault(path)
  if found:
    raise errors.UserError(f'{model_dir}: checkpoint {step} is damaged: {found}; take another')
  return path


def read_model(path: epath.Path) -> dict:
  """Returns the description of a checkpoint's model: the dict that `describe` returned.

  Raises:
    UserError: if the checkpoint is unfinished, isn't from this package, or has metadata of an
      implausible size.
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
  """Returns shapes and dtypes of a tree that Orbax wrote; None if the metadata is missing.

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
  """Returns a checkpoint's position in the data, a result of `SharedBatches.state`."""
  with _json_alone() as checkpointer:
    return checkpointer.restore(path / 'data')


def _json_alone() -> ocp.Checkpointer:
  return ocp.Checkpointer(ocp.JsonCheckpointHandler(), multiprocessing_options=verification.alone())


def read_config(path: epath.Path, objective: str) -> dict:
  """Returns the config of a checkpoint's model, with the field names of this version.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
    objective: name of the objective that the checkpoint must have.

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
  """Reads a checkpoint's parameters of a module onto one device, like `read_parts`.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
    module: the linen module of the parameters.
    inputs: example inputs of the module, a sequence of arrays.
    device: the device; None for the first one of this process.
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
  """Reads parts of a checkpoint's parameters, without the optimiser's state.

  If the run kept an average of the parameters (`state.averaged`), this returns the average. Other
  parts that were trained, such as a discriminator, are left out. Each process reads the shards of
  its own devices without waiting for the others, so a single process may call it.

  Args:
    path: a checkpoint's folder, the result of `latest_checkpoint`.
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
  """Reads the parameters of an exported model, to start a run from.

  Args:
    path: a model folder written by `parti-jax export`.
    objective: the run's objective; its model must have the same config.
    abstract: the parameters' shapes and shardings.
    inputs: the run's vocabulary and tokenizer, an `Inputs`.

  Returns:
    The parameters, on the mesh.

  Raises:
    UserError: if the model folder doesn't exist, or its config, vocabulary or tokenizer differs;
      names the differences.
  """
  networks = model_folder.load(path).networks
  if objective.name not in networks:
    raise errors.UserError(
      f'{path}: the model has no {objective.name} to start from; set train.initial_model to None '
      'or to another model'
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
  """Returns parameters with the dtypes and shardings of `abstract`."""
  return jax.tree.map(
    lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), params, abstract
  )


def check_same_model(path, saved: dict, wanted: dict):
  """Raises UserError, naming the settings, if two models differ."""
  if saved['stage'] != wanted['stage']:
    raise errors.UserError(
      f'{path}: a checkpoint of the objective {saved["stage"]!r}, not of '
      f'{wanted["stage"]!r}; choose another --model_dir'
    )
  free = ('dropout', 'dtype', 'remat', 'unroll', 'commitment')
  saved_config = parti_config.by_todays_names(saved['config'])
  plain = lambda value: list(value) if isinstance(value, (tuple, list)) else value
  differing = [
    f'{key} is {saved_config.get(key)} there and {value} here'
    for key, value in wanted['config'].items()
    if key not in free and plain(saved_config.get(key)) != plain(value)
  ]
  if differing:
    raise errors.UserError(
      f'{path}: has another configuration: {"; ".join(differing)}; train in '
      'another --model_dir, or restore the model settings'
    )


def check_same_shapes(path, abstract, within: str | tuple[str, ...] = ''):
  """Compares the shapes of a checkpoint's arrays with the expected ones.

  Args:
    path: the checkpoint's folder.
    abstract: a tree of shapes.
    within: prefix, or prefixes, of the part of the state that `abstract` covers, such as
      'params/encoder/'; all of the state by default.

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
      'restore the settings of the model or the optimiser'
    )


def by_path(tree) -> dict[str, Any]:
  """Returns {path: array} of a tree of arrays or abstract arrays, with the paths of checkpoints.

  A path joins the names of dict keys, fields and indices with '/'. Empty nodes have no path.
  """
  flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda leaf: hasattr(leaf, 'shape'))
  name = lambda key: str(getattr(key, 'key', getattr(key, 'name', getattr(key, 'idx', key))))
  return {'/'.join(name(key) for key in path): leaf for path, leaf in flat}


def _unfinished(path) -> errors.UserError:
  return errors.UserError(
    f'{path}: not a finished checkpoint of this package; remove the folder or choose another one'
  )


def _saved_shapes(path) -> dict[str, tuple[int, ...]]:
  """Returns the shapes of the arrays of a checkpoint's state, by their paths."""
  metadata = read_metadata(path / 'state')
  if metadata is None:
    raise _unfinished(path)
  return _shapes(metadata)


def _shapes(tree) -> dict[str, tuple[int, ...]]:
  return {path: tuple(leaf.shape) for path, leaf in by_path(tree).items()}

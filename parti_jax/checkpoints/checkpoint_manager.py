"""Writes the checkpoints of a run with Orbax, and restores the run from them."""

from __future__ import annotations

import secrets
import sys

import jax
import orbax.checkpoint as ocp
from etils import epath

from parti_jax.checkpoints import disk_errors
from parti_jax.checkpoints import manifest
from parti_jax.checkpoints import remote_staging
from parti_jax.checkpoints import run_checkpoints
from parti_jax.checkpoints import verification
from parti_jax.checkpoints import whole_moments


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
    self.directory = self._staging.directory if self._staging else run_checkpoints.folder(model_dir)
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
          # Orbax announces that a checkpoint's folders exist by one key for all processes, which
          # can't describe a separate folder for each process.
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
    self.finish()  # The next checkpoint may remove one that is being uploaded.
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
    run_checkpoints.check_same_model(path, run_checkpoints.read_model(path), model)
    wanted, structure = run_checkpoints.by_path(abstract), jax.tree.structure(abstract)
    whole = whole_moments.names(run_checkpoints.saved_shapes(path), 'params/', wanted)
    saved_form = jax.tree.unflatten(
      structure, whole_moments.as_saved(wanted, whole, 'params/').values()
    )
    run_checkpoints.check_same_shapes(path, saved_form)
    restored = self._manager.restore(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardRestore(saved_form), data=ocp.args.JsonRestore()
      ),
    )
    self.factored = len(whole)
    arrays = whole_moments.factor(
      run_checkpoints.by_path(restored['state']),
      whole,
      {name: wanted[name].sharding for name in wanted},
    )
    return jax.tree.unflatten(structure, arrays.values()), restored['data']

  def read_place(self, step: int) -> dict:
    """Reads the position in the data of the checkpoint of a step."""
    return run_checkpoints.read_place(self.directory / str(step))

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
    """Returns the damage to a checkpoint since it was written."""
    found = verification.fault(
      self.directory / str(step), together=True, copies=self._staging is not None
    )
    if found and jax.process_index() == 0:
      print(
        f'parti-jax: warning: checkpoint {step} has been damaged: {found}; older ones are kept',
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
  """Orbax' options: process 0 completes a checkpoint, or each process does in its own folder."""
  apart = staged and jax.process_count() > 1
  return ocp.options.MultiprocessingOptions(primary_host=None if apart else 0)


def _handlers(staged: remote_staging.Staging | None):
  """Returns the handlers that read and write the items; None for Orbax' defaults.

  Several processes with separate folders write each piece of an array as a file, since the databases
  that Orbax writes by default can only be merged within one folder.
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

"""Finds the whole checkpoints of a run and moves damaged ones aside."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from collections.abc import Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from parti_jax.checkpoints import manifest
from parti_jax.core import errors

# Bytes of arrays to read at once from a checkpoint without a manifest.
_BYTES_AT_ONCE = 1 << 28
# Bytes of a text that processes exchange.
_ROOM = 1 << 14


@dataclasses.dataclass(frozen=True)
class Damaged:
  """A damaged checkpoint: its step, and the fault of its first damaged file."""

  step: int
  fault: str


@dataclasses.dataclass(frozen=True)
class Found:
  """The result of `newest_whole`.

  Attributes:
    step: step of the newest whole checkpoint; None if there is no checkpoint at all.
    damaged: the newer, damaged checkpoints, the newest first.
  """

  step: int | None
  damaged: tuple[Damaged, ...] = ()

  def lines(self) -> list[str]:
    """Returns a line for each damaged checkpoint: the file at fault, and the steps lost."""
    if self.step is None:
      return []
    return [
      f'checkpoint {bad.step}: {bad.fault}; resuming from {self.step}: '
      f'{bad.step - self.step} steps are done again'
      for bad in self.damaged
    ]


def newest_whole(directory: epath.Path, together: bool = False, copies: bool = False) -> Found:
  """Reads a run's checkpoints, from the newest to the first that is whole.

  Args:
    directory: the folder `checkpoints` of the run, which stays unchanged.
    together: whether all processes of this run call it, divide the files and agree.
    copies: whether each process has a separate folder and reads all of it.

  Raises:
    UserError: if there are checkpoints but none is whole; names the files at fault.
  """
  while True:
    steps = _steps(directory, together)
    damaged: list[Damaged] = []
    for step in steps:
      found = fault(directory / str(step), together, copies)
      if found is None:
        return Found(step, tuple(damaged))
      damaged.append(Damaged(step, found))
    # The run may have written newer ones and removed these in the meantime.
    if steps == _steps(directory, together):
      break
  if damaged:
    faults = '; '.join(f'checkpoint {bad.step}: {bad.fault}' for bad in damaged)
    raise errors.UserError(
      f'{directory}: no checkpoint there is whole, and none was changed: {faults}; put a copy of '
      'a whole one there, or start again in another --model_dir'
    )
  return Found(None)


def fault(path: epath.Path, together: bool = False, copies: bool = False) -> str | None:
  """Returns the first fault of a checkpoint; None if it is whole.

  Args:
    path: folder of the checkpoint.
    together: whether all processes of this run call it, divide the files and agree.
    copies: whether each process has a separate folder and reads all of it.
  """
  divided = together and not copies
  share, shares = (jax.process_index(), jax.process_count()) if divided else (0, 1)
  try:
    found = manifest.fault(path, share, shares)
  except FileNotFoundError:
    found = _unreadable(path, share, shares)
  return of_any(found) if together else found


def move_aside(directory: epath.Path, damaged: Sequence[Damaged]) -> None:
  """Renames damaged checkpoints to `STEP.damaged`, so that they neither count nor block the name.

  Args:
    directory: the folder `checkpoints` of the run; only this process may write to it.
    damaged: `Found.damaged` of `newest_whole`.

  Raises:
    UserError: if a checkpoint can't be renamed.
  """
  for bad in damaged:
    target = directory / free_name(bad.step, lambda name: (directory / name).exists())
    try:
      (directory / str(bad.step)).rename(target)
    except OSError as error:
      raise errors.UserError(
        f"{directory / str(bad.step)}: damaged ({bad.fault}), and it can't be renamed: "
        f'{error.strerror or error}; move it away'
      ) from error


def free_name(step: int, taken: Callable[[str], bool]) -> str:
  """Returns a name for a damaged checkpoint of a step that isn't `taken`."""
  name, number = f'{step}.damaged', 1
  while taken(name):
    number += 1
    name = f'{step}.damaged-{number}'
  return name


def alone() -> ocp.options.MultiprocessingOptions:
  """Returns Orbax's options for reading in this process without waiting for the others."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


class KeepWhole:
  """A preservation policy for Orbax: keeps the last few checkpoints, and always a whole one.

  The checkpoint that is being written isn't known to be whole, so the newest whole one stays too.

  Args:
    keep: number of checkpoints to keep; damaged ones don't count.
    fault_of: returns the fault of the written checkpoint of a step, or None.
  """

  def __init__(self, keep: int, fault_of: Callable[[int], str | None]):
    self._keep, self._fault_of = keep, fault_of

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Returns whether to keep each checkpoint; the last one is being written."""
    del context
    stay, counted, whole = {checkpoints[-1].step}, 1, False
    for step in [checkpoint.step for checkpoint in checkpoints[-2::-1]]:
      if whole and counted >= self._keep:
        break
      # Once a whole one is found, older ones need no check.
      if whole or self._fault_of(step) is None:
        stay.add(step)
        counted, whole = counted + 1, True
    if not whole:
      return [True] * len(checkpoints)
    return [checkpoint.step in stay for checkpoint in checkpoints]


def _steps(directory: epath.Path, together: bool) -> list[int]:
  """Returns the steps of the committed checkpoints, the newest first."""
  steps = sorted(ocp.utils.checkpoint_steps(directory), reverse=True) if directory.is_dir() else []
  return of_the_first(steps) if together else steps


def of_the_first(steps: list[int]) -> list[int]:
  """The steps that the first process gives; all of them call it."""
  if jax.process_count() == 1:
    return steps
  return json.loads(_as_text(multihost_utils.broadcast_one_to_all(_as_bytes(json.dumps(steps)))))


def of_any(found: str | None) -> str | None:
  """The fault that the first process with one has found; all of them call it."""
  if jax.process_count() == 1:
    return found
  everyone = multihost_utils.process_allgather(_as_bytes(found or ''))
  return next((text for text in map(_as_text, everyone) if text), None)


def _as_bytes(text: str) -> np.ndarray:
  return np.frombuffer(text.encode()[:_ROOM].ljust(_ROOM, b'\0'), np.uint8)


def _as_text(room) -> str:
  return np.asarray(room, np.uint8).tobytes().rstrip(b'\0').decode(errors='ignore')


def _unreadable(path: epath.Path, share: int, shares: int) -> str | None:
  """Returns which part of a checkpoint without a manifest can't be read; None if all can."""
  options, name = alone(), ''
  try:
    with ocp.Checkpointer(
      ocp.JsonCheckpointHandler(), multiprocessing_options=options
    ) as checkpointer:
      for name in ('model', 'data'):
        checkpointer.restore(path / name)
    name = 'state'
    with ocp.Checkpointer(
      ocp.PyTreeCheckpointHandler(multiprocessing_options=options), multiprocessing_options=options
    ) as checkpointer:
      tree = checkpointer.metadata(path / name).item_metadata.tree
      for part in _parts(tree, share, shares):
        checkpointer.restore(
          path / name,
          args=ocp.args.PyTreeRestore(
            item=part,
            restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree),
          ),
        )
  except Exception as error:
    # Orbax and TensorStore raise many types of errors.
    return f"{name} can't be read ({' '.join(str(error).split())[:200]})"
  return None


def _parts(tree, share: int, shares: int):
  """Yields a tree of array descriptions in parts, with placeholders for the other leaves."""
  leaves, structure = jax.tree.flatten(tree)
  chosen, size = [], 0
  mine = range(share, len(leaves), shares)
  for index in mine:
    chosen.append(index)
    size += math.prod(leaves[index].shape) * np.dtype(leaves[index].dtype).itemsize
    if size >= _BYTES_AT_ONCE or index == mine[-1]:
      yield jax.tree.unflatten(
        structure,
        [leaf if number in chosen else ocp.PLACEHOLDER for number, leaf in enumerate(leaves)],
      )
      chosen, size = [], 0

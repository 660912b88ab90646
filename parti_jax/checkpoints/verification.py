"""Which of a run's checkpoints are whole, and what becomes of the damaged ones."""

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

# Bytes of the arrays that are read at once of a checkpoint without a manifest.
_BYTES_AT_ONCE = 1 << 28
# Bytes of a text that processes tell each other.
_ROOM = 1 << 14


@dataclasses.dataclass(frozen=True)
class Damaged:
  """A checkpoint that is not whole: its step, and the file at fault."""

  step: int
  fault: str


@dataclasses.dataclass(frozen=True)
class Found:
  """What `newest_whole` found.

  Attributes:
    step: the newest whole checkpoint; None if there is no checkpoint at all.
    damaged: the newer ones that are not whole, the newest first.
  """

  step: int | None
  damaged: tuple[Damaged, ...] = ()

  def lines(self) -> list[str]:
    """A line on each damaged checkpoint: the file at fault, and what is lost."""
    return [
      f'checkpoint {bad.step}: {bad.fault}; going on from {self.step}: '
      f'{bad.step - self.step} steps are done again'
      for bad in self.damaged
    ]


def newest_whole(directory: epath.Path, together: bool = False, copies: bool = False) -> Found:
  """Reads a run's checkpoints, from the newest to the first that is whole.

  Args:
    directory: the folder `checkpoints` of the run; nothing in it is changed.
    together: whether all processes of this run call it, divide the files and agree.
    copies: whether each process has a folder of its own, of which it reads everything.

  Raises:
    UserError: if there are checkpoints and none is whole; names the files at fault.
  """
  while True:
    steps, damaged = _steps(directory, together), []
    for step in steps:
      found = fault(directory / str(step), together, copies)
      if found is None:
        return Found(step, tuple(damaged))
      damaged.append(Damaged(step, found))
    # A run that goes on meanwhile may have written newer ones and removed these.
    if steps == _steps(directory, together):
      break
  if damaged:
    faults = '; '.join(f'checkpoint {bad.step}: {bad.fault}' for bad in damaged)
    raise errors.UserError(
      f'{directory}: no checkpoint there is whole, and none was touched: {faults}; put a copy of '
      'a whole one there, or begin anew in another --model_dir'
    )
  return Found(None)


def fault(path: epath.Path, together: bool = False, copies: bool = False) -> str | None:
  """What is wrong with one checkpoint; None if it is whole.

  Args:
    path: its folder.
    together: whether all processes of this run call it, divide the files and agree.
    copies: whether each process has a folder of its own, of which it reads everything.
  """
  divided = together and not copies
  share, shares = (jax.process_index(), jax.process_count()) if divided else (0, 1)
  try:
    found = manifest.fault(path, share, shares)
  except FileNotFoundError:
    found = _unreadable(path, share, shares)
  return of_any(found) if together else found


def move_aside(directory: epath.Path, damaged: Sequence[Damaged]) -> None:
  """Renames damaged checkpoints `STEP.damaged`, so that they neither count nor are in the way.

  Args:
    directory: the folder `checkpoints` of the run, of which this is the only process that writes.
    damaged: of `newest_whole`.

  Raises:
    UserError: if they can't be renamed.
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
  """A name for a damaged checkpoint of a step, of which `taken` says that none has it."""
  name, number = f'{step}.damaged', 1
  while taken(name):
    number += 1
    name = f'{step}.damaged-{number}'
  return name


def alone() -> ocp.options.MultiprocessingOptions:
  """Orbax' options for reading in this process, whatever the others do: it waits for none."""
  process = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})


class KeepWhole:
  """Orbax' policy of what stays: the last few, and always one that is known to be whole.

  What is being written is not known to be whole, so that with it the newest whole one stays.

  Args:
    keep: how many checkpoints stay; damaged ones don't count.
    fault_of: tells what is wrong with the checkpoint of a step that has been written.
  """

  def __init__(self, keep: int, fault_of: Callable[[int], str | None]):
    self._keep, self._fault_of = keep, fault_of

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    """Whether each of the checkpoints stays; the last is the one that is being written."""
    del context
    stay, counted, whole = {checkpoints[-1].step}, 1, False
    for step in [checkpoint.step for checkpoint in checkpoints[-2::-1]]:
      if whole and counted >= self._keep:
        break
      # Of those before it nothing depends on whether they are whole.
      if whole or self._fault_of(step) is None:
        stay.add(step)
        counted, whole = counted + 1, True
    if not whole:
      return [True] * len(checkpoints)
    return [checkpoint.step in stay for checkpoint in checkpoints]


def _steps(directory: epath.Path, together: bool) -> list[int]:
  """Steps of the committed checkpoints, the newest first."""
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
  """What of a checkpoint without a manifest can't be read; None if all can."""
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
    # Whatever Orbax and TensorStore stumble over.
    return f"{name} can't be read ({' '.join(str(error).split())[:200]})"
  return None


def _parts(tree, share: int, shares: int):
  """A tree of arrays' descriptions in parts, with placeholders for what is not in a part."""
  leaves, structure = jax.tree.flatten(tree)
  chosen, size = [], 0
  mine = range(share, len(leaves), shares)
  for index in mine:
    chosen.append(index)
    size += math.prod(leaves[index].shape) * np.dtype(leaves[index].dtype).itemsize
    if size >= _BYTES_AT_ONCE or index == mine[-1]:
      yield structure.unflatten(
        leaf if place in chosen else ocp.PLACEHOLDER for place, leaf in enumerate(leaves)
      )
      chosen, size = [], 0

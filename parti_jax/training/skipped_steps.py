"""Steps whose loss or gradients are not finite: not applied, counted, and after too many the end.

optax.apply_if_finite does not do: it knows gradients alone, while an infinite loss, the statistics
of an objective (average of weights, use of codes) and the other optimisers of one count too; it gives in
after a number of steps and applies the update; and its counters would change every checkpoint.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import errors

# Places that the error names; the journal has all.
_NAMED = 12


def all_finite(loss, norms: Iterable[jax.Array]):
  """Whether a step may be applied, inside a jit.

  Args:
    loss: float32 [], all of it.
    norms: float32 [] each, norms of all gradients. One whose square overflows is infinite here
      even where each gradient is finite, and rightly so: second moments would be infinite.

  Returns:
    bool [].
  """
  return jnp.all(jnp.isfinite(jnp.stack([loss, *norms])))


def select(finite, updated, before):
  """`updated` where `finite`, else `before`, bit for bit; inside a jit.

  An element of the result needs only the same element of both, so that XLA writes it into the
  donated buffer of `before`. Nothing is asked of `updated` itself, which would have to be kept
  beside `before` until the last of it is known.

  Args:
    finite: bool [].
    updated: a tree of arrays.
    before: likewise.
  """
  return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before)


@dataclasses.dataclass(frozen=True)
class SkippedStep:
  """A step that was not applied.

  Attributes:
    step: its number, from 1.
    places: its batch, of each share that this process reads, see `shared_batches.Place`.
    values: what was not finite, by the metrics' names.
  """

  step: int
  places: tuple[str, ...]
  values: Mapping[str, float]

  def __str__(self) -> str:
    values = ', '.join(f'{name} {value}' for name, value in self.values.items())
    return (
      f'step {self.step} was not applied, its numbers are not finite'
      f'{f" ({values})" if values else ""}; batch {" ".join(self.places)}'
    )


class SkippedSteps:
  """Counts the steps that were not applied, without waiting for any step until asked to.

  All processes find the same ones, since 'finite' is one scalar of the whole mesh.

  Attributes:
    total: how many there are, those of before a resume included.
    in_a_row: how many of them were the last steps.
  """

  def __init__(self, most: int | None):
    """Begins with none.

    Args:
      most: in a row, after which training ends; None for never.

    Raises:
      UserError: if it is not positive.
    """
    if most is not None and most < 1:
      raise errors.UserError(f'train.max_bad_steps={most} must be at least 1, or None for no end')
    self.total, self.in_a_row = 0, 0
    self._most = most
    self._streak: list[SkippedStep] = []
    self._pending = collections.deque()

  def state(self) -> dict[str, int]:
    """What a checkpoint keeps."""
    return {'skipped_steps': self.total, 'skipped_in_a_row': self.in_a_row}

  def restore(self, state: Mapping) -> None:
    """Goes on with the counts of `state()`; checkpoints from before there was any have none."""
    self.total = int(state.get('skipped_steps', 0))
    self.in_a_row = int(state.get('skipped_in_a_row', 0))

  def add(self, step: int, places: Iterable, metrics: Mapping):
    """Notes a step that has been started.

    Args:
      step: its number, from 1.
      places: its batch, see SkippedStep.
      metrics: of the step, on the device; 'finite' among them.
    """
    self._pending.append((step, places, metrics))

  @property
  def unread(self) -> int:
    """Steps since the last reading."""
    return len(self._pending)

  def read(self) -> list[SkippedStep]:
    """Waits for the steps since the last reading; returns those that were not applied.

    It stops at the step with which there are too many in a row, see `check`.
    """
    found = []
    finite = jax.device_get([metrics['finite'] for _, _, metrics in self._pending])
    for applied in finite:
      step, places, metrics = self._pending.popleft()
      if applied:
        self.in_a_row, self._streak = 0, []
        continue
      skipped = SkippedStep(step, tuple(map(str, places)), not_finite(jax.device_get(metrics)))
      self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
      self._streak.append(skipped)
      found.append(skipped)
      if self._too_many:
        break
    return found

  @property
  def _too_many(self) -> bool:
    return self._most is not None and self.in_a_row >= self._most

  def check(self, model_dir, checkpoints: Callable[[], Iterable[int]]):
    """Ends training where too many steps in a row were not applied.

    Args:
      model_dir: the run's folder.
      checkpoints: returns the steps of the whole checkpoints in it.

    Raises:
      UserError: names these steps, their batches, and the checkpoint to go on from.
    """
    if not self._too_many:
      return
    last = self._streak[-1].step
    first = last - self.in_a_row + 1
    kept = sorted(checkpoints())
    # One of later than the first is of the same parameters; it is there if a run was asked to stop.
    before = [step for step in kept if step < first] or kept
    go_on = (
      f'go on from {model_dir}/checkpoints/{before[-1]}, the newest checkpoint with nothing '
      'of them, as the same command does'
      if before
      else 'there is no checkpoint from before them, so start anew'
    )
    places = [place for skipped in self._streak for place in skipped.places]
    more = f' and {len(places) - _NAMED} more' if len(places) > _NAMED else ''
    raise errors.UserError(
      f'steps {first} to {last} were not applied, {self.in_a_row} in a row '
      '(train.max_bad_steps), since their loss or gradients are not finite; '
      f'{go_on}, with a lower learning rate (train.schedule) or after a look at their batches: '
      f'parti-jax batch --model_dir={model_dir} --place {" ".join(places[:_NAMED])}{more}'
    )


def bad_examples(measures: Mapping[str, np.ndarray]) -> int:
  """How many examples have a measure that is not finite, of arrays [examples, ...]."""
  bad = [~np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in measures.values()]
  return int(np.any(bad, axis=0).sum())


def not_finite(metrics: Mapping) -> dict[str, float]:
  """Those of some numbers, {name: a scalar}, that are NaN or infinite, as floats."""
  return {name: float(value) for name, value in metrics.items() if not np.isfinite(value)}

"""Skips and counts the steps whose loss or gradients aren't finite; too many end training.

`optax.apply_if_finite` doesn't suffice, for three reasons. It only looks at gradients, while the
loss, an objective's statistics and its other optimizers matter too. It applies the update after a
number of bad steps. And its counters would change the format of checkpoints.
"""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Mapping
from typing import Any
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Bool
from jaxtyping import Float
from jaxtyping import Shaped

from parti_jax.core import errors

# Number of places that the error lists; the journal has all of them.
_NAMED = 12

_Tree = TypeVar('_Tree')


def all_finite(loss: Float[Array, ''], norms: Iterable[Float[Array, '']]) -> Bool[Array, '']:
  """Returns whether to apply a step; works inside a jit.

  Args:
    loss: the whole loss.
    norms: norms of all gradients. A norm whose square overflows is infinite even if all gradients
      are finite. That is intended, since second moments would be infinite too.
  """
  return jnp.all(jnp.isfinite(jnp.stack([loss, *norms])))


def select(finite: Bool[Array, ''], updated: _Tree, before: _Tree) -> _Tree:
  """Returns `updated` if `finite`, else `before`, bit for bit; works inside a jit.

  Each element of the result depends only on the same element of both trees, so XLA can write it
  into the donated buffer of `before`. A test of `updated` itself would keep both trees in memory
  until all of `updated` is computed.

  Args:
    finite: a result of `all_finite`.
    updated: a tree of arrays.
    before: a tree of the same structure and shapes.
  """
  return jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, before)


@dataclasses.dataclass(frozen=True)
class SkippedStep:
  """A step that was not applied.

  Attributes:
    step: the step, counted from 1.
    places: where its batch is in the data: a `shared_batches.Place` of each share that this
      process reads.
    values: {name: value} of the metrics that aren't finite.
  """

  step: int
  places: tuple[str, ...]
  values: Mapping[str, float]

  def __str__(self) -> str:
    values = ', '.join(f'{name} {value}' for name, value in self.values.items())
    return (
      f'step {self.step} was not applied because its loss or gradients are not finite'
      f'{f" ({values})" if values else ""}; batch {" ".join(self.places)}'
    )


class SkippedSteps:
  """Counts the steps that were not applied; only `read` waits for the devices.

  All processes count the same steps, since 'finite' is a scalar of the whole mesh.

  Attributes:
    total: number of steps that were not applied, including those before a resume.
    in_a_row: number of these steps since the last step that was applied.
  """

  def __init__(self, most: int | None):
    """Initializes the counts with 0.

    Args:
      most: number of consecutive skipped steps that ends training; None for no limit.

    Raises:
      UserError: if `most` is not positive.
    """
    if most is not None and most < 1:
      raise errors.UserError(f'train.max_bad_steps={most} must be at least 1, or None for no end')
    self.total, self.in_a_row = 0, 0
    self._most = most
    self._streak: list[SkippedStep] = []
    self._pending: collections.deque[tuple[int, Iterable, Mapping[str, Any]]] = collections.deque()

  def state(self) -> dict[str, int]:
    """Returns what a checkpoint stores."""
    return {'skipped_steps': self.total, 'skipped_in_a_row': self.in_a_row}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Restores the counts from a result of `state`; they are 0 in older checkpoints."""
    self.total = int(state.get('skipped_steps', 0))
    self.in_a_row = int(state.get('skipped_in_a_row', 0))

  def add(self, step: int, places: Iterable, metrics: Mapping[str, Any]) -> None:
    """Adds a step that has been started.

    Args:
      step: the step, counted from 1.
      places: where its batch is in the data, as in SkippedStep.
      metrics: metrics of the step on the device, including 'finite'.
    """
    self._pending.append((step, places, metrics))

  @property
  def unread(self) -> int:
    """Number of steps that were added since the last `read`."""
    return len(self._pending)

  def read(self) -> list[SkippedStep]:
    """Waits for the steps since the last `read` and returns those that were not applied.

    It stops at the step after which `check` raises an error.
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

  def check(self, model_dir: str | os.PathLike, checkpoints: Callable[[], Iterable[int]]) -> None:
    """Checks that not too many consecutive steps were skipped.

    Args:
      model_dir: the run's folder.
      checkpoints: returns the steps of the run's whole checkpoints.

    Raises:
      UserError: if too many were; names these steps, their batches, and the checkpoint to resume
        from.
    """
    if not self._too_many:
      return
    last = self._streak[-1].step
    first = last - self.in_a_row + 1
    kept = sorted(checkpoints())
    # A later checkpoint, written when the run was asked to stop, has the same parameters.
    before = [step for step in kept if step < first] or kept
    remedy = (
      f'resume from {model_dir}/checkpoints/{before[-1]}, the newest checkpoint from before '
      'them, with the same command'
      if before
      else 'there is no checkpoint from before them, so start a new run'
    )
    places = [place for skipped in self._streak for place in skipped.places]
    more = f' and {len(places) - _NAMED} more' if len(places) > _NAMED else ''
    raise errors.UserError(
      f'steps {first} to {last} were not applied, {self.in_a_row} in a row '
      '(train.max_bad_steps), because their loss or gradients are not finite; '
      f'{remedy}, with a lower learning rate (train.schedule) or after a look at their batches: '
      f'parti-jax batch --model_dir={model_dir} --place {" ".join(places[:_NAMED])}{more}'
    )


def bad_examples(measures: Mapping[str, Shaped[np.ndarray, 'examples ...']]) -> int:
  """Returns the number of examples with a measure that isn't finite."""
  bad = [~np.isfinite(values).reshape(len(values), -1).all(axis=1) for values in measures.values()]
  return int(np.any(bad, axis=0).sum())


def not_finite(metrics: Mapping[str, Any]) -> dict[str, float]:
  """Returns the metrics, {name: a scalar}, that are NaN or infinite."""
  return {name: float(value) for name, value in metrics.items() if not np.isfinite(value)}

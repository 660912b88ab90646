"""Generated pictures as a set to measure."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from collections.abc import Iterator

import numpy as np
from jaxtyping import Bool

from parti_jax.evaluation.datasets import picture_sets
from parti_jax.evaluation.datasets import picture_shards
from parti_jax.evaluation.metrics import features as features_lib


class GeneratedSet(picture_sets.PictureSet):
  """Pictures that were generated, or those of them that were chosen.

  Args:
    place: where they are, for reports.
    shards: all generated pictures.
    size: height and width of the samples, in pixels. Pictures of another size are resized to it, which
      is no part of the protocol.
    chosen: which of them to measure, in any shape with one value for each; None for all.
  """

  def __init__(
    self,
    place: str,
    shards: picture_shards.PictureShards,
    size: int,
    chosen: Bool[np.ndarray, '...'] | None = None,
  ):
    self.place, self._shards, self._size = place, shards, size
    self._chosen = np.ones(len(shards.captions), bool) if chosen is None else chosen.reshape(-1)

  @property
  def count(self) -> int:
    return int(self._chosen.sum())

  def size(self) -> tuple[int, int]:
    return self._size, self._size

  def identity(self) -> str:
    return hashlib.sha256(np.packbits(self._chosen).tobytes()).hexdigest()

  def blocks(
    self, size: int | None, wanted: Callable[[int], bool]
  ) -> Iterator[picture_sets.Block | None]:
    size = size or self._size
    start, index = 0, 0
    waiting = np.zeros((0, size, size, 3), np.uint8)
    for batch in self._shards.batches():
      kept = batch[self._chosen[start : start + len(batch)]]
      start += len(batch)
      if len(kept):
        waiting = np.concatenate([waiting, features_lib.resized(kept, size)])
      last = start == len(self._chosen)
      while len(waiting) >= picture_sets.BLOCK or (last and len(waiting)):
        images, waiting = waiting[: picture_sets.BLOCK], waiting[picture_sets.BLOCK :]
        yield picture_sets.block_of(images, size != self._size) if wanted(index) else None
        index += 1

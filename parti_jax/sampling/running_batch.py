"""A batch that is sampled continuously, while pictures join and leave it.

Between two calls of a compiled program, which advances all slots by a few tokens, pictures that are
finished leave their slots and waiting ones take them. The programs are those of `slots`; this module
decides what they compute and when.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32
from jaxtyping import UInt8

from parti_jax.core import numerics
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import results as results_lib
from parti_jax.sampling import slots as slots_lib
from parti_jax.sampling import text_to_image

# Texts are encoded, and pictures decoded, in batches of sizes that differ by this factor.
_BETWEEN_SIZES = 4
# Share of the time of a whole batch that free slots may lose while others become free.
_MOST_HELD_BACK = 1 / 16


@dataclasses.dataclass(frozen=True)
class Preview:
  """A picture whose first rows are sampled.

  Attributes:
    image: the picture; below these rows it is blank, of the gray `slots.BLANK`.
    rows: number of rows of image tokens that are there.
    of_rows: number of rows of image tokens of the whole picture.
  """

  image: UInt8[np.ndarray, 'height width 3']
  rows: int
  of_rows: int


@dataclasses.dataclass(eq=False)
class PictureRequest:
  """A picture to sample; the fields are arguments of `ContinuousSampler.submit`, as checked.

  Previews follow once the numbers of tokens in `preview_at` are there.
  """

  prompt: str
  text: Int32[np.ndarray, 'text_length']
  other: Int32[np.ndarray, 'text_length'] | None
  seed: int
  image_index: int
  settings: sampling_settings.SamplingSettings
  future: concurrent.futures.Future[results_lib.Result]
  on_preview: Callable[[Preview], None] | None = None
  preview_at: tuple[int, ...] = ()
  negative: str | None = None
  kept: Int32[np.ndarray, 'image_length'] | None = None
  settled: bool = False

  def settle(self) -> bool:
    """Returns whether the future waits for a result or an error, which it must then be given.

    It doesn't if it is cancelled, or has failed before, such as by an error of `on_preview`.
    """
    waits = not self.settled and self.future.set_running_or_notify_cancel()
    self.settled = True
    return waits

  def fail(self, error: BaseException) -> None:
    """Hands an error to the one who asked for the picture."""
    if self.settle():
      self.future.set_exception(error)

  def drop(self) -> None:
    """Cancels the picture, also for those who wait for several futures."""
    self.future.cancel()
    self.settle()


@dataclasses.dataclass(frozen=True)
class _Previewed:
  """Requests with previews, and the rows and pixels, which devices may still compute."""

  requests: list[PictureRequest]
  rows: list[int]
  images: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """Requests whose tokens are complete, and their tokens and pixels, which devices may still compute."""

  requests: list[PictureRequest]
  arrays: tuple[jax.Array, jax.Array]


class RunningBatch:
  """The pictures that are sampled together, and those that the devices still decode.

  It belongs to a single thread, except for `count`.

  Attributes:
    size: number of slots.
    tokens_per_call: number of tokens by which a call advances all slots.
  """

  def __init__(
    self, model: text_to_image.TextToImage, size: int, tokens_per_call: int, guided: bool
  ):
    """Prepares a batch without pictures, whose memory on the devices the first ones take.

    Args:
      model: the loaded model.
      size: number of slots, which the model's mesh can split.
      tokens_per_call: number of tokens by which a call advances all slots; it divides the number of
        image tokens.
      guided: whether each slot has a second row, without text.
    """
    self.size = size
    self.tokens_per_call = tokens_per_call
    self._model = model
    self._place = model.place
    self._config = model.config
    self._statics = {'config': self._config, 'guided': guided}
    self._sizes = _sizes(size, self._place.divisible(1))
    self._slots: slots_lib.Slots | None = None
    self._requests = slots_lib.Requests.empty(size, self._config.image_length)
    self._running: list[PictureRequest | None] = [None] * size
    self._drawn: list[_Drawn] = []
    self._previewed: list[_Previewed] = []
    self._reached: Any = None

  @property
  def count(self) -> int:
    """Number of slots that are taken."""
    return sum(request is not None for request in self._running)

  @property
  def busy(self) -> bool:
    """Whether `step` has something to do even if no picture joins."""
    return bool(self.count or self._drawn or self._previewed)

  def step(self, next_requests: Callable[[int], Sequence[PictureRequest]], waiting: int) -> None:
    """Lets pictures leave and join, and advances all slots by one call.

    Args:
      next_requests: returns pictures that join, at most the given number.
      waiting: number of pictures that wait for a slot.
    """
    for slot, request in enumerate(self._running):
      if request is not None and request.future.cancelled():
        request.drop()
        self._running[slot] = None
    before, previewed = len(self._drawn), len(self._previewed)
    try:
      if self.count < self.size:
        # Pictures that are asked for during the previous call can then join the next one.
        jax.block_until_ready(self._reached)
      self._admit(next_requests, waiting)
      if self.count:
        self._advance()
    except Exception as error:  # The memory of the slots may be gone.
      self._slots = self._reached = None
      self._fail(self._taken(), error)
    # Only now, so that the devices have work while pictures are copied.
    for _ in range(previewed):
      self._hand_out_previews(self._previewed.pop(0))
    for _ in range(before):
      self._hand_out(self._drawn[0])
      del self._drawn[0]

  def fail(self, error: BaseException) -> None:
    """Hands an error to those who asked for pictures of the batch, which is over."""
    self._fail(
      self._taken() + [request for drawn in self._drawn for request in drawn.requests], error
    )

  def _admit(self, next_requests: Callable[[int], Sequence[PictureRequest]], waiting: int) -> None:
    """Gives free slots to waiting pictures."""
    free = [slot for slot, request in enumerate(self._running) if request is None]
    admitted = list(next_requests(0 if self._holds_back(waiting) else len(free)))
    for slot, request in zip(free, admitted):
      self._running[slot] = request
    for slot, request in zip(free, admitted):
      self._requests.set(slot, request.seed, request.image_index, request.settings, request.kept)
    for start, size, count in _pieces(len(admitted), self._sizes):
      self._join(admitted[start : start + count], free[start : start + count], size)

  def _holds_back(self, waiting: int) -> bool:
    """Returns whether free slots stay free until the next slots are.

    Pictures that join together are encoded and decoded as one batch, and so are those that later
    take their slots. So a short wait pays off if enough pictures wait for all of these slots.
    """
    position = np.asarray(self._requests.position)
    ahead = [position[slot] for slot, request in enumerate(self._running) if request is not None]
    if not ahead:
      return False
    free = self.size - len(ahead)
    length, furthest = self._config.image_length, max(ahead)
    lost = free * (length - furthest) / (self.size * length)
    return waiting >= free + ahead.count(furthest) and lost <= _MOST_HELD_BACK

  def _join(self, requests: list[PictureRequest], into: list[int], size: int) -> None:
    """Encodes the texts of pictures, as a batch of `size`, and writes them into their slots."""
    texts = np.zeros([size, self._config.text_length], np.int32)
    others = np.full_like(texts, -1)
    texts[: len(requests)] = [request.text for request in requests]
    for row, request in enumerate(requests):
      if request.other is not None:
        others[row] = request.other
    places = np.full(size, self.size, np.int32)
    places[: len(into)] = into
    params, cache = (self._model.generator_params,), self._model.cache
    try:
      encoded = self._place.start(
        slots_lib.encode, params, (texts, others), cache=cache, **self._statics
      )
    except Exception as error:  # Such as a batch that doesn't fit into memory.
      self._fail(requests, error)
      return
    if self._slots is None:
      empty = np.zeros([self.size, self._config.text_length], np.int32)
      self._slots = self._place.start(
        slots_lib.begin, params, (empty,), cache=cache, **self._statics
      )
    self._slots = self._place.start(slots_lib.insert, (), (places,), self._slots, encoded)

  def _advance(self) -> None:
    """Samples the next tokens of all slots, and decodes the pictures that are then complete."""
    # A copy, since the devices may read the arrays later, and without a copy of their own.
    requests = jax.tree.map(np.copy, self._requests)
    self._slots, reached = self._place.start(
      slots_lib.advance,
      (self._model.generator_params,),
      (requests,),
      self._slots,
      count=self.tokens_per_call,
      **self._statics,
    )
    # Waits for the previous call, so that no more than two are under way: what the devices have been
    # given can't be cancelled.
    self._reached, previous = reached, self._reached
    jax.block_until_ready(previous)
    position = self._requests.position
    position += self.tokens_per_call
    self._preview(np.asarray(position))
    complete = position >= self._config.image_length
    position[complete] = 0  # Free slots sample pictures that nobody asked for.
    finished = [int(slot) for slot in np.flatnonzero(complete) if self._running[slot] is not None]
    for start, size, count in _pieces(len(finished), self._sizes):
      self._finish(finished[start : start + count], size)

  def _preview(self, position: Int32[np.ndarray, 'slots']) -> None:
    """Decodes the first rows of pictures that have reached a place for a preview in this call."""
    shown = [
      slot
      for slot, request in enumerate(self._running)
      if request is not None
      and any(-self.tokens_per_call < at - position[slot] <= 0 for at in request.preview_at)
      and position[slot] < self._config.image_length
    ]
    rows = position[shown] // self._config.grid[1]
    for start, size, count in _pieces(len(shown), self._sizes):
      chosen = slice(start, start + count)
      requests = [request for slot in shown[chosen] if (request := self._running[slot]) is not None]
      places = np.resize(np.asarray(shown[chosen], np.int32), size)
      assert self._slots is not None
      try:
        images = self._place.start(
          slots_lib.preview,
          (self._model.tokenizer_params,),
          (places, np.resize(rows[chosen], size)),
          self._slots.tokens,
          np.asarray(self._requests.kept)[places],
          tokenizer=self._model.tokenizer,
          grid=tuple(self._config.grid),
        )
      except Exception as error:
        self._fail(requests, error)
      else:
        self._previewed.append(_Previewed(requests, rows[chosen].tolist(), images))

  def _hand_out_previews(self, previewed: _Previewed) -> None:
    """Waits for previews and gives them to those who asked for them."""
    try:
      with numerics.fixed():
        images = jax.device_get(previewed.images)
    except Exception as error:
      self._fail(previewed.requests, error)
      return
    for request, rows, image in zip(previewed.requests, previewed.rows, images):
      if request.future.done():  # Cancelled, or failed since.
        continue
      assert request.on_preview is not None
      try:
        request.on_preview(Preview(image, rows, self._config.grid[0]))
      except Exception as error:
        self._fail([request], error)

  def _finish(self, finished: Sequence[int], size: int) -> None:
    """Decodes complete pictures, as a batch of `size`, and frees their slots."""
    requests = [request for slot in finished if (request := self._running[slot]) is not None]
    for slot in finished:
      self._running[slot] = None
    places = np.resize(np.asarray(finished, np.int32), size)
    assert self._slots is not None
    try:
      arrays = self._place.start(
        slots_lib.detokenize,
        (self._model.tokenizer_params,),
        (places,),
        self._slots.tokens,
        tokenizer=self._model.tokenizer,
      )
    except Exception as error:
      self._fail(requests, error)
    else:
      self._drawn.append(_Drawn(requests, arrays))

  def _hand_out(self, drawn: _Drawn) -> None:
    """Waits for pictures and gives them to those who asked for them."""
    try:
      with numerics.fixed():
        tokens, images = jax.device_get(drawn.arrays)
      results = [
        self._result(request, images[row], tokens[row])
        for row, request in enumerate(drawn.requests)
      ]
    except Exception as error:
      self._fail(drawn.requests, error)
      if not self.count:  # Those who come next get slots that no failed call has computed.
        self._slots = self._reached = None
      return
    for result in results:
      request = drawn.requests.pop(0)
      if request.settle():
        request.future.set_result(result)

  def _result(
    self,
    request: PictureRequest,
    image: UInt8[np.ndarray, 'height width 3'],
    tokens: Int32[np.ndarray, 'image_length'],
  ) -> results_lib.Result:
    return results_lib.Result(
      image[None, None],
      tokens[None, None],
      [request.prompt],
      request.seed,
      request.settings,
      self._model.model_name,
      image_index=np.full([1, 1], request.image_index, np.int32),
      weights=self._model.weights,
      cache=self._model.cache,
      negative=request.negative,
    )

  def _taken(self) -> list[PictureRequest]:
    return [request for request in self._running if request is not None]

  def _fail(self, requests: Sequence[PictureRequest], error: BaseException) -> None:
    """Hands an error to those who asked for pictures, and frees their slots."""
    failed = set(requests)
    self._running = [None if request in failed else request for request in self._running]
    for request in requests:
      request.fail(error)


def _sizes(batch_size: int, ways: int) -> list[int]:
  """Returns the sizes of batches in which texts are encoded and pictures decoded, in ascending order.

  There are few, because each is compiled.

  Args:
    batch_size: the largest size.
    ways: number of parts into which the mesh splits a batch.
  """
  sizes = [ways]
  while sizes[-1] * _BETWEEN_SIZES < batch_size:
    sizes.append(sizes[-1] * _BETWEEN_SIZES)
  return sizes if batch_size == ways else [*sizes, batch_size]


def _pieces(total: int, sizes: Sequence[int]) -> Iterator[tuple[int, int, int]]:
  """Cuts a number of things into batches of given sizes, at most half empty or of the smallest size.

  Args:
    total: number of things, at most the largest size.
    sizes: the sizes, in ascending order.

  Yields:
    The first thing of a batch, the size of the batch, and its number of things.
  """
  start = 0
  while start < total:
    left = total - start
    above = next(size for size in sizes if size >= left)
    below = max((size for size in sizes if size <= left), default=above)
    size = above if 2 * left > above else below
    yield start, size, min(size, left)
    start += size

"""Continuous batching: pictures join and leave a running batch while it is sampled.

A server's prompts arrive one at a time. `ContinuousSampler` keeps a batch of a fixed number of slots
on the devices and advances all of them by a few tokens per call of a compiled program. Between two
calls, pictures that are finished leave their slots and waiting ones take them. The programs are
those of `slots`; this module decides what they compute and when.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int32
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core import numerics
from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import slots as slots_lib
from parti_jax.sampling import text_to_image

# Samplers whose threads have not ended; they must before Python does.
_OPEN: set[ContinuousSampler] = set()

# Number of tokens per call, at most. Fewer let prompts join sooner, more save overhead on the host.
_MOST_PER_CALL = 8
# Texts are encoded, and pictures decoded, in batches of sizes that differ by this factor.
_BETWEEN_SIZES = 4


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
class _Request:
  """A picture to sample; the fields are arguments of `ContinuousSampler.submit`, as checked.

  Previews follow once the numbers of tokens in `preview_at` are there.
  """

  prompt: str
  text: Int32[np.ndarray, 'text_length']
  other: Int32[np.ndarray, 'text_length'] | None
  seed: int
  image_index: int
  settings: sampling_settings.SamplingSettings
  future: concurrent.futures.Future[text_to_image.Result]
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


@dataclasses.dataclass(frozen=True)
class _Previewed:
  """Requests with previews, and the rows and pixels, which devices may still compute."""

  requests: list[_Request]
  rows: list[int]
  images: jax.Array


@dataclasses.dataclass(frozen=True)
class _Drawn:
  """Requests whose tokens are complete, and their tokens and pixels, which devices may still compute."""

  requests: list[_Request]
  arrays: tuple[jax.Array, jax.Array]


class ContinuousSampler:
  """Samples pictures of prompts that arrive at any time, as one batch.

  The prompt, the seed, the picture's index and the settings determine a picture, as in
  `TextToImage.generate`. When it joins and what else the batch samples doesn't matter: all slots
  run the same program whatever they hold.

  All methods may be called from any thread. As a context manager it is closed in the end; after an
  exception, the pictures that wait for a slot are cancelled. Until it is closed, its thread holds the
  model.

  Attributes:
    batch_size: number of slots.
    tokens_per_call: number of tokens by which a call advances all slots.
    settings: default settings of `submit`.
  """

  def __init__(
    self,
    model: text_to_image.TextToImage,
    batch_size: int = 16,
    tokens_per_call: int | None = None,
    **sampling,
  ):
    """Starts a thread that waits for pictures to sample.

    Args:
      model: the loaded model.
      batch_size: number of slots, rounded up to a multiple of the ways in which the model's mesh
        splits a batch. The devices compute all slots, also those that are free.
      tokens_per_call: number of tokens by which a call advances all slots, a divisor of the number
        of image tokens; pictures join and leave between calls. By default the largest divisor up to
        8.
      **sampling: fields of SamplingSettings that replace the model's defaults, as in
        `TextToImage.generate`. Unless `guidance_scale` is 1, each slot has a second row, without
        text.

    Raises:
      UserError: if a value is invalid, or the settings skip layers or passes or are speculative; the
        message names it.
    """
    self._model = model
    self._place = model.place
    self._config = model.config
    length = self._config.image_length
    self.settings = _supported(model.sampling.replace(**sampling))
    self.batch_size = self._place.divisible(checks.count('batch_size', batch_size))
    self.tokens_per_call = _divisor(tokens_per_call, length)
    self._statics = {'config': self._config, 'guided': self.settings.guided}
    self._sizes = _sizes(self.batch_size, self._place.divisible(1))

    # What follows belongs to the thread alone, up to the condition.
    self._slots: slots_lib.Slots | None = None
    self._requests = slots_lib.Requests.empty(self.batch_size, length)
    self._running: list[_Request | None] = [None] * self.batch_size
    self._drawn: list[_Drawn] = []
    self._previewed: list[_Previewed] = []
    self._reached: Any = None

    self._changed = threading.Condition()
    self._waiting: collections.deque[_Request] = collections.deque()
    self._closed = False
    self._thread = threading.Thread(target=self._work, name='parti_jax sampling', daemon=True)
    self._thread.start()
    _OPEN.add(self)

  def submit(
    self,
    prompt: str,
    seed: int = 0,
    image_index: int = 0,
    on_preview: Callable[[Preview], None] | None = None,
    previews: int | None = None,
    negative: str | None = None,
    kept=None,
    **sampling,
  ) -> concurrent.futures.Future[text_to_image.Result]:
    """Asks for a picture.

    Args:
      prompt: a text, truncated like those of `TextToImage.generate`.
      seed: integer from 0 to 2³² − 1.
      image_index: index of the picture among those of its prompt, from 0 to 2³¹ − 1; `generate`
        gives indices from `first_index` on.
      on_preview: called in the sampler's thread with each preview of the picture, in order, before
        the future has its result; it should be short. If it raises an error, the future gets it.
      previews: number of previews, at most; by default one for each row of image tokens but the
        last. They come after rows that are as far apart as possible. Previews of several rows that
        one call samples are one.
      negative: the text of guidance's other side, as in `generate`.
      kept: int32 [image_length], image tokens to take over; -1 where a token is sampled. By default
        all are sampled.
      **sampling: fields of SamplingSettings that replace the sampler's defaults; None keeps the
        default.

    Returns:
      A future of the picture, a Result with one prompt and one picture. Its `cancel` works until the
      picture is finished, and the slot is free after the current call. Callbacks run in the
      sampler's thread and should be short.

    Raises:
      UserError: if the prompt is blank, a value is invalid, the settings skip layers or passes or
        are speculative, they need guidance and the sampler's defaults don't, or the sampler is
        closed.
    """
    prompt = checks.text('prompt', prompt)
    if previews is not None:
      previews = checks.whole_number('previews', previews, 0, checks.LARGEST_INT32)
    settings = _supported(self.settings.replace(**sampling))
    if settings.guided and not self._statics['guided']:
      raise UserError(
        f'guidance_scale={settings.guidance_scale:g} needs the pass without text, which this sampler '
        'leaves out because its own guidance_scale is 1; create it with another one'
      )
    text = self._model.encode_prompts([prompt])
    other = None if negative is None else self._model.encode_negative(negative, settings)
    request = _Request(
      prompt,
      text[0],
      other,
      checks.whole_number('seed', seed, 0, sampling_settings.LARGEST_SEED),
      checks.whole_number('image_index', image_index, 0, checks.LARGEST_INT32),
      settings,
      concurrent.futures.Future(),
      on_preview,
      _preview_at(self._config.grid, previews) if on_preview is not None else (),
      negative,
      None if kept is None else self._checked_kept(kept),
    )
    with self._changed:
      if self._closed:
        raise UserError('this sampler is closed; create another one')
      self._waiting.append(request)
      self._changed.notify_all()
    return request.future

  def _checked_kept(self, kept) -> Int32[np.ndarray, 'image_length']:
    length, codes = self._config.image_length, self._config.codebook_size
    found = np.asarray(kept)
    if found.shape != (length,) or found.dtype.kind != 'i':
      raise UserError(f'kept is {found.dtype} {list(found.shape)}, expected int32 [{length}]')
    if found.min() < -1 or found.max() >= codes:
      raise UserError(f'kept has numbers that are neither -1 nor one of the {codes} codes')
    return found.astype(np.int32)

  @property
  def waiting(self) -> int:
    """Number of pictures that wait for a slot."""
    with self._changed:
      return len(self._waiting)

  @property
  def running(self) -> int:
    """Number of slots that are taken."""
    return sum(request is not None for request in self._running)

  @property
  def closed(self) -> bool:
    """Whether the sampler accepts no more pictures, after `close` or an error of its thread."""
    with self._changed:
      return self._closed

  def close(self, wait: bool = True, cancel_waiting: bool = False) -> None:
    """Accepts no more pictures; those that have a slot are finished.

    Args:
      wait: whether to return only once all are finished.
      cancel_waiting: whether to cancel the pictures that wait for a slot, rather than sample them.
    """
    with self._changed:
      self._closed = True
      dropped = list(self._waiting) if cancel_waiting else []
      if cancel_waiting:
        self._waiting.clear()
      self._changed.notify_all()
    for request in dropped:
      _drop(request)
    if wait and threading.current_thread() is not self._thread:
      self._thread.join()

  def __enter__(self) -> ContinuousSampler:
    return self

  def __exit__(self, kind, *unused_error) -> None:
    self.close(cancel_waiting=kind is not None)

  def _work(self) -> None:
    """Samples until the sampler is closed and nothing is left to do; the thread's function."""
    try:
      while self._wait_for_work():
        self._turn()
    except BaseException as error:  # A fault of this module: nobody may wait for ever.
      self._fail(self._taken(), error)
      with self._changed:
        self._closed = True
        left = list(self._waiting)
        self._waiting.clear()
      self._fail(left + [request for drawn in self._drawn for request in drawn.requests], error)
      raise
    finally:
      _OPEN.discard(self)

  def _wait_for_work(self) -> bool:
    """Waits until there is something to do; returns False once there never will be."""
    busy = lambda: self._waiting or self._taken() or self._drawn or self._previewed
    with self._changed:
      self._changed.wait_for(lambda: busy() or self._closed)
      return bool(busy())

  def _turn(self) -> None:
    """Lets pictures leave and join, and advances all slots by one call."""
    for slot, request in enumerate(self._running):
      if request is not None and request.future.cancelled():
        _drop(request)
        self._running[slot] = None
    before, previewed = len(self._drawn), len(self._previewed)
    try:
      self._admit()
      if self._taken():
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

  def _admit(self) -> None:
    """Gives free slots to waiting pictures."""
    free = [slot for slot, request in enumerate(self._running) if request is None]
    with self._changed:
      asked = list(self._waiting)
      kept = [request for request in asked if not request.future.cancelled()]
      admitted = kept[: len(free)]
      self._waiting = collections.deque(kept[len(free) :])
    for request in set(asked).difference(kept):
      _drop(request)
    for slot, request in zip(free, admitted):
      self._running[slot] = request
    for slot, request in zip(free, admitted):
      self._requests.set(slot, request.seed, request.image_index, request.settings, request.kept)
    for start, size, count in _pieces(len(admitted), self._sizes):
      self._join(admitted[start : start + count], free[start : start + count], size)

  def _join(self, requests: list[_Request], into: list[int], size: int) -> None:
    """Encodes the texts of pictures, as a batch of `size`, and writes them into their slots."""
    texts = np.zeros([size, self._config.text_length], np.int32)
    others = np.full_like(texts, -1)
    texts[: len(requests)] = [request.text for request in requests]
    for row, request in enumerate(requests):
      if request.other is not None:
        others[row] = request.other
    places = np.full(size, self.batch_size, np.int32)
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
      empty = np.zeros([self.batch_size, self._config.text_length], np.int32)
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
    position[complete] = 0  # Free slots go on with pictures that nobody asked for.
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
      if not self._taken():  # Those who come next get slots that no failed call has computed.
        self._slots = self._reached = None
      return
    for result in results:
      request = drawn.requests.pop(0)
      if request.settle():
        request.future.set_result(result)

  def _result(
    self,
    request: _Request,
    image: UInt8[np.ndarray, 'height width 3'],
    tokens: Int32[np.ndarray, 'image_length'],
  ) -> text_to_image.Result:
    return text_to_image.Result(
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

  def _taken(self) -> list[_Request]:
    return [request for request in self._running if request is not None]

  def _fail(self, requests: Sequence[_Request], error: BaseException) -> None:
    """Hands an error to those who asked for pictures, and frees their slots."""
    failed = set(requests)
    self._running = [None if request in failed else request for request in self._running]
    for request in requests:
      if request.settle():
        request.future.set_exception(error)


def _drop(request: _Request) -> None:
  """Cancels a picture, also for those who wait for several futures."""
  request.future.cancel()
  request.settle()


@atexit.register
def _close_all() -> None:
  """Closes samplers that a program left open.

  Their threads are daemons, so that such a program can end; but they must not use the devices while
  Python takes itself apart.
  """
  for sampler in list(_OPEN):
    sampler.close(cancel_waiting=True)


def _supported(
  settings: sampling_settings.SamplingSettings,
) -> sampling_settings.SamplingSettings:
  """Returns settings; raises UserError if slots can't sample with them."""
  if settings.skipping is not None:
    name, off = settings.skipping
    raise UserError(
      f'{name}={getattr(settings, name):g} is not possible with continuous batching, which samples '
      f'one token after the other with all layers and passes; set it to {off}'
    )
  return settings


def _preview_at(grid: Sequence[int], previews: int | None) -> tuple[int, ...]:
  """Returns the numbers of tokens after which to show a picture.

  Args:
    grid: rows and columns of image tokens.
    previews: number of previews, at most; None for one after each row but the last.
  """
  rows, columns = grid
  count = rows - 1 if previews is None else min(previews, rows - 1)
  return tuple(columns * (number * rows // (count + 1)) for number in range(1, count + 1))


def _divisor(tokens_per_call: int | None, length: int) -> int:
  """Returns the number of tokens per call, of pictures of `length` tokens."""
  divisors = [number for number in range(1, length + 1) if length % number == 0]
  if tokens_per_call is None:
    return max(number for number in divisors if number <= _MOST_PER_CALL)
  number = checks.count('tokens_per_call', tokens_per_call)
  if number not in divisors:
    raise UserError(
      f'tokens_per_call={number} does not divide the {length} image tokens of a picture; choose one '
      f'of {", ".join(map(str, divisors))}'
    )
  return number


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

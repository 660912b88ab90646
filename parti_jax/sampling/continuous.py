"""Continuous batching: pictures join and leave a running batch while it is sampled.

A server's prompts arrive one at a time. `ContinuousSampler` takes them from any thread, and has a
thread of its own that samples a batch with a fixed number of slots, a `running_batch.RunningBatch`.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import threading
from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32

from parti_jax.core import checks
from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings
from parti_jax.sampling import results
from parti_jax.sampling import running_batch
from parti_jax.sampling import text_to_image

# Samplers whose threads have not ended; they must before Python does.
_OPEN: set[ContinuousSampler] = set()

# Number of tokens per call, at most. Fewer let prompts join sooner, more save overhead on the host.
_MOST_PER_CALL = 8


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
    self._config = model.config
    self.settings = _supported(model.sampling.replace(**sampling))
    self.batch_size = model.place.divisible(checks.count('batch_size', batch_size))
    self.tokens_per_call = _divisor(tokens_per_call, self._config.image_length)
    # Belongs to the thread alone.
    self._batch = running_batch.RunningBatch(
      model, self.batch_size, self.tokens_per_call, self.settings.guided
    )
    self._changed = threading.Condition()
    self._waiting: collections.deque[running_batch.PictureRequest] = collections.deque()
    self._closed = False
    self._thread = threading.Thread(target=self._work, name='parti_jax sampling', daemon=True)
    self._thread.start()
    _OPEN.add(self)

  def submit(
    self,
    prompt: str,
    seed: int = 0,
    image_index: int = 0,
    on_preview: Callable[[running_batch.Preview], None] | None = None,
    previews: int | None = None,
    negative: str | None = None,
    kept=None,
    **sampling,
  ) -> concurrent.futures.Future[results.Result]:
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
    if settings.guided and not self.settings.guided:
      raise UserError(
        f'guidance_scale={settings.guidance_scale:g} needs the pass without text, which this sampler '
        'leaves out because its own guidance_scale is 1; create it with another one'
      )
    text = self._model.encode_prompts([prompt])
    other = None if negative is None else self._model.encode_negative(negative, settings)
    request = running_batch.PictureRequest(
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
    return self._batch.count

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
      request.drop()
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
        self._step()
    except BaseException as error:  # A fault of this package: nobody may wait forever.
      self._batch.fail(error)
      with self._changed:
        self._closed = True
        left = list(self._waiting)
        self._waiting.clear()
      for request in left:
        request.fail(error)
      raise
    finally:
      _OPEN.discard(self)

  def _wait_for_work(self) -> bool:
    """Waits until there is something to do; returns False once there never will be."""
    busy = lambda: self._batch.busy or bool(self._waiting)
    with self._changed:
      self._changed.wait_for(lambda: busy() or self._closed)
      return busy()

  def _step(self) -> None:
    self._batch.step(self._next_requests, self.waiting)

  def _next_requests(self, count: int) -> list[running_batch.PictureRequest]:
    """Returns the `count` pictures that have waited longest, or fewer; they then wait no more."""
    with self._changed:
      asked = list(self._waiting)
      kept = [request for request in asked if not request.future.cancelled()]
      self._waiting = collections.deque(kept[count:])
    for request in set(asked).difference(kept):
      request.drop()
    return kept[:count]


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

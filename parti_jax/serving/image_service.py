"""Draws what clients ask for at the same time, as one running batch, within limits."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import threading
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any
from typing import TypeVar

import numpy as np

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.sampling import continuous
from parti_jax.sampling import results as results_lib
from parti_jax.sampling import running_batch
from parti_jax.sampling import text_to_image
from parti_jax.serving import image_requests

_Finished = TypeVar('_Finished')
_Future = concurrent.futures.Future


class ImageService:
  """Queues requests for pictures, samples them with a ContinuousSampler, ranks and enlarges them.

  A picture is that of `TextToImage.generate` for the same prompt, seed, index and settings. All
  methods may be called from any thread.

  Attributes:
    model: the loaded model.
    limits: what clients may ask for.
    offer: what the model can do.
    sampler: samples the pictures.
  """

  def __init__(
    self,
    model: text_to_image.TextToImage,
    limits: image_requests.Limits | None = None,
    batch_size: int = 16,
    tokens_per_call: int | None = None,
    **sampling,
  ):
    """Starts the sampler.

    Args:
      model: the loaded model.
      limits: what clients may ask for; by default `Limits()`.
      batch_size: an argument of ContinuousSampler: number of pictures that are sampled at once.
      tokens_per_call: an argument of ContinuousSampler.
      **sampling: fields of SamplingSettings that replace the model's defaults.

    Raises:
      UserError: if a value is invalid, or the queue is shorter than a request may be long.
    """
    self.model = model
    self.limits = limits or image_requests.Limits()
    if self.limits.queue < self.limits.images:
      raise UserError(
        f'a queue of {self.limits.queue} pictures is too short for a request of '
        f'{self.limits.images}; make it longer, or allow fewer pictures in a request'
      )
    upscaler = model.upscaler
    rows, columns = model.config.grid
    self.offer = image_requests.Offer(
      model.model_name,
      model.image_size,
      (rows, columns),
      None if upscaler is None else image_sizes.times(model.image_size, upscaler.factor),
      model.ranker is not None,
    )
    self.sampler = continuous.ContinuousSampler(model, batch_size, tokens_per_call, **sampling)
    # One thread: the devices are busy in any case.
    self._finishing = concurrent.futures.ThreadPoolExecutor(1, 'parti_jax pictures')
    self._lock = threading.Lock()
    self._pending = 0
    self._stopping = False

  @property
  def pending(self) -> int:
    """Number of pictures that clients wait for."""
    with self._lock:
      return self._pending

  @property
  def accepting(self) -> bool:
    """Whether requests are accepted, if there is room."""
    return not (self._stopping or self.sampler.closed)

  def submit(
    self,
    request: image_requests.ImageRequest,
    finish: Callable[[results_lib.Result], _Finished],
    on_preview: Callable[[int, running_batch.Preview], None] | None = None,
  ) -> concurrent.futures.Future[_Finished]:
    """Asks for pictures.

    Args:
      request: the request, within the limits.
      finish: called in another thread with the pictures, one prompt and `num_images` of them.
      on_preview: called in the sampler's thread with the index of a picture and each preview of it,
        if the request asks for any.

    Returns:
      A future of what `finish` returns. Its `cancel` works until `finish` is called, and frees the
      slots of all its pictures.

    Raises:
      RequestError: if there is no room (status 429), the service is stopping (503), or slots can't
        sample with these settings (400).
    """
    self._enter(request.num_images)
    asked: list[_Future[results_lib.Result]] = []
    answer: _Future[Any] = _Future()
    try:
      kept, taken = self._kept(request)
      for index in range(request.num_images):
        asked.append(self._ask(request, index, taken[index], on_preview))
    except UserError as error:
      for future in asked:
        future.cancel()
      self._leave(request.num_images)
      status = 400 if self.accepting else 503
      raise image_requests.RequestError(str(error), status) from error
    except BaseException:
      self._leave(request.num_images)
      raise
    answer.add_done_callback(lambda _: self._leave(request.num_images))
    answer.add_done_callback(lambda done: _cancel(asked) if done.cancelled() else None)
    left = len(asked)

    def note(_) -> None:
      nonlocal left
      with self._lock:
        left -= 1
        if left:
          return
      self._complete(request, asked, kept, finish, answer)

    for future in asked:
      future.add_done_callback(note)
    return answer

  def warnings(self, request: image_requests.ImageRequest) -> list[str]:
    """Returns what the pictures leave out of the request: the end of a long prompt."""
    found = []
    texts = {'prompt': request.prompt, 'negative prompt': request.negative or ''}
    for name, text in texts.items():
      if cut := self.model.left_out(text):
        found.append(
          f'the {name} is longer than the {self.model.config.text_length} text tokens of the model; '
          f'left out: {cut!r}'
        )
    ranker = self.model.ranker if request.rank else None
    if ranker is not None and (cut := ranker.encode([request.prompt])[1][0]):
      found.append(f"the prompt is longer than the ranker's text; left out: {cut!r}")
    return found

  def warm_up(self) -> None:
    """Draws one picture, so that what is needed for it is compiled."""
    request = image_requests.ImageRequest(
      'a picture', rank=self.offer.ranked, upscale=self.offer.upscaled is not None, previews=1
    )
    self.submit(request, lambda result: result, lambda index, preview: None).result()

  def stop_accepting(self) -> None:
    """Refuses requests from now on; what was accepted is finished."""
    self._stopping = True

  def close(self, cancel: bool = False) -> None:
    """Stops; returns once no picture is sampled any more.

    Args:
      cancel: whether to cancel the pictures that wait for a slot, rather than sample them.
    """
    self.stop_accepting()
    self.sampler.close(cancel_waiting=cancel)
    self._finishing.shutdown()

  def _enter(self, images: int) -> None:
    """Counts pictures; raises RequestError if there are too many."""
    if not self.accepting:
      raise image_requests.RequestError('the server is stopping', 503, code='stopping')
    most = self.sampler.batch_size + self.limits.queue
    with self._lock:
      if self._pending + images > most:
        raise image_requests.RequestError(
          f'{self._pending} pictures are being drawn or wait, of at most {most}; try again later',
          429,
          code='queue_full',
        )
      self._pending += images

  def _leave(self, images: int) -> None:
    with self._lock:
      self._pending -= images

  def _ask(
    self,
    request: image_requests.ImageRequest,
    index: int,
    kept: np.ndarray | None,
    on_preview: Callable[[int, running_batch.Preview], None] | None,
  ) -> _Future[results_lib.Result]:
    """Asks the sampler for one of the pictures, which takes these tokens over."""
    show = None
    if on_preview is not None and request.previews != 0:
      show = lambda preview: on_preview(index, preview)
    return self.sampler.submit(
      request.prompt,
      request.seed,
      index,
      show,
      request.previews,
      request.negative,
      kept,
      **request.sampling,
    )

  def _kept(
    self, request: image_requests.ImageRequest
  ) -> tuple[np.ndarray | None, Sequence[np.ndarray | None]]:
    """Returns which tokens the pictures keep, and for each the tokens that it takes over.

    The former is bool [1, num_images, image_length], and None without an edit; the latter are int32
    [image_length].
    """
    if request.edit is None:
      return None, [None] * request.num_images
    index = np.arange(request.num_images, dtype=np.int32)[None]
    kept = request.edit.kept_tokens(request.seed, index, self.model.config.image_length)
    tokens = self.model.tokenize(request.edit.image[None])
    return kept, list(np.where(kept[0], tokens, -1).astype(np.int32))

  def _complete(
    self,
    request: image_requests.ImageRequest,
    asked: Sequence[_Future[results_lib.Result]],
    kept: np.ndarray | None,
    finish: Callable[[results_lib.Result], _Finished],
    answer: _Future[_Finished],
  ) -> None:
    """Finishes pictures that are sampled; called once no future of `asked` waits any more."""
    try:
      self._finishing.submit(self._finish, request, asked, kept, finish, answer)
    except RuntimeError:  # The threads are gone: the service is closed.
      if answer.set_running_or_notify_cancel():
        answer.set_exception(_stopped())

  def _finish(
    self,
    request: image_requests.ImageRequest,
    asked: Sequence[_Future[results_lib.Result]],
    kept: np.ndarray | None,
    finish: Callable[[results_lib.Result], _Finished],
    answer: _Future[_Finished],
  ) -> None:
    if not answer.set_running_or_notify_cancel():
      return
    try:
      result = _joined([future.result() for future in asked])
      result = dataclasses.replace(result, edit=request.edit, kept=kept)
      result = self.model.ranked(result) if request.rank else result
      result = self.model.upscaled(result) if request.upscale else result
      finished = finish(result)
    except concurrent.futures.CancelledError:
      answer.set_exception(_stopped())
    except BaseException as error:
      answer.set_exception(error)
    else:
      answer.set_result(finished)


def _stopped() -> image_requests.RequestError:
  return image_requests.RequestError(
    'the server stopped before the picture was drawn', 503, code='stopping'
  )


def _cancel(futures: Sequence[_Future[Any]]) -> None:
  for future in futures:
    future.cancel()


def _joined(results: Sequence[results_lib.Result]) -> results_lib.Result:
  """Returns pictures of one prompt as one result."""
  arrays: dict[str, Any] = {
    name: np.concatenate([getattr(result, name) for result in results], axis=1)
    for name in ('images', 'tokens', 'image_index')
  }
  return dataclasses.replace(results[0], **arrays)

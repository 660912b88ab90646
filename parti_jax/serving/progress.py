"""Follows a request: the state of its pictures at each change, until they are drawn."""

from __future__ import annotations

import dataclasses
import queue
from collections.abc import Iterator
from collections.abc import Sequence

import numpy as np

from parti_jax.sampling import results
from parti_jax.sampling import running_batch
from parti_jax.serving import image_requests
from parti_jax.serving import image_service

# Seconds after which somebody who no longer looks is noticed.
_LONGEST_WAIT = 0.5


@dataclasses.dataclass(frozen=True)
class Progress:
  """How far the pictures of a request are.

  Attributes:
    images: a preview of each picture, uint8 [height, width, 3]; None if there is none yet.
    share: share of the rows of image tokens that are there, from 0 to 1.
    result: the pictures, ranked and enlarged as requested, once they are drawn.
  """

  images: Sequence[np.ndarray | None]
  share: float
  result: results.Result | None = None


def follow(
  service: image_service.ImageService, request: image_requests.ImageRequest
) -> Iterator[Progress]:
  """Draws the pictures of a request.

  Args:
    service: draws them.
    request: the request.

  Yields:
    The progress at the start, whenever there is more to see, and at least every half second; the
    last one has the result. Closing the iterator before withdraws the request.

  Raises:
    RequestError: if the request is refused.
  """
  news: queue.SimpleQueue[tuple[int, running_batch.Preview] | None] = queue.SimpleQueue()
  answer = service.submit(
    request, lambda result: result, lambda index, preview: news.put((index, preview))
  )
  answer.add_done_callback(lambda _: news.put(None))
  images: list[np.ndarray | None] = [None] * request.num_images
  shares = [0.0] * request.num_images
  try:
    while True:
      yield Progress(tuple(images), sum(shares) / len(shares))
      for event in _arrived(news):
        if event is None:
          yield Progress(tuple(images), 1.0, answer.result())
          return
        index, preview = event
        images[index] = preview.image
        shares[index] = preview.rows / preview.of_rows
  finally:
    answer.cancel()


def _arrived(news: queue.SimpleQueue) -> Iterator:
  """Yields what has arrived, after a wait for the first."""
  try:
    yield news.get(timeout=_LONGEST_WAIT)
    while True:
      yield news.get_nowait()
  except queue.Empty:
    return

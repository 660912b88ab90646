"""Tokenizes parts of a split; reading, computing and writing run in parallel."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import queue
import threading
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int32
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.data import input_parts
from parti_jax.data import share
from parti_jax.data import tally
from parti_jax.data import text_features
from parti_jax.data import token_cache
from parti_jax.data import token_cache_parts
from parti_jax.data import views
from parti_jax.tokenization import tokenizing_progress
from parti_jax.training.objectives import frozen_text_encoder
from parti_jax.training.objectives import frozen_tokenizer

# Number of batches to read ahead, and number of batches to compute concurrently.
_READ_AHEAD, _COMPUTED_AT_ONCE = 4, 2
# Number of records that wait for the thread that writes them; with text features they are large.
_WAITING = 256


@dataclasses.dataclass
class Batch:
  """Consecutive examples of a part.

  Attributes:
    part: index of the part.
    captions: captions of the examples.
    pictures: views of the examples' pictures.
    tallies: the counts in `token_cache_parts.TALLIES` since the previous batch.
    last: whether this is the part's last batch.
  """

  part: int
  captions: list[str]
  pictures: UInt8[np.ndarray, 'examples views height width 3']
  tallies: Mapping[str, collections.Counter[str]]
  last: bool


def tokenize(
  encoder: frozen_tokenizer.Encoder,
  texts: frozen_text_encoder.Encoder | None,
  inputs: input_parts.InputParts,
  indices: Iterable[int],
  preparation: views.Preparation,
  parts: token_cache_parts.SplitParts,
  info: Mapping[str, Any],
  batch_size: int,
  progress: tokenizing_progress.Progress,
) -> None:
  """Tokenizes and writes parts of a split.

  Args:
    encoder: computes the tokens.
    texts: computes text features; None for a cache without them.
    inputs: the parts to read.
    indices: indices of the parts.
    preparation: decodes pictures.
    parts: the parts to write.
    info: the token cache's info.
    batch_size: number of examples to read and compute at once.
    progress: counts examples and parts.
  """
  settings = dataclasses.replace(share.Settings(), num_workers=0).divided(1)
  read = itertools.chain.from_iterable(
    _batches(inputs, index, preparation, settings, batch_size) for index in indices
  )
  computed: collections.deque = collections.deque()
  with _Ahead(read, _READ_AHEAD) as ahead, _Writing(parts, info, progress) as writing:
    for batch in ahead:
      tokens = encoder(batch.pictures.reshape(-1, *batch.pictures.shape[2:]))
      features = texts and texts(batch.captions, batch.tallies['shortened'])
      computed.append((batch, tokens, features))
      if len(computed) == _COMPUTED_AT_ONCE:
        writing.add(*computed.popleft())
    for batch in computed:
      writing.add(*batch)


def _batches(
  inputs: input_parts.InputParts,
  index: int,
  preparation: views.Preparation,
  settings: share.Settings,
  size: int,
) -> Iterator[Batch]:
  """Yields the examples of a part; the last batch may be empty."""
  reading = share.Reading(preparation, shuffle=False, num_epochs=1, settings=settings)
  shape = (preparation.count, *image_sizes.sides(preparation.image_size), 3)
  with contextlib.closing(share.open_stream(inputs.open(index), reading)) as stream:
    last = False
    while not last:
      found: list[dict[str, Any]] = []
      tallies = _no_tallies()
      while len(found) < size and not last:
        outcome = next(stream, None)
        if outcome is None:
          last = True
        elif outcome.features is None:
          tally.warn_once(outcome.reason, outcome.where)
          tallies['skipped'][outcome.reason] += 1
        else:
          tallies['shortened'].update(outcome.notes)
          found.append(outcome.features)
      pictures = (
        np.stack([features['views'] for features in found])
        if found
        else np.zeros((0, *shape), np.uint8)
      )
      yield Batch(index, [features['caption'] for features in found], pictures, tallies, last)


def _no_tallies() -> dict[str, collections.Counter[str]]:
  return {name: collections.Counter() for name in token_cache_parts.TALLIES}


class _Ahead:
  """Prefetches items from an iterator in a thread."""

  def __init__(self, items: Iterator[Any], size: int):
    self._queue: queue.Queue = queue.Queue(size)
    self._closed = threading.Event()
    self._thread = threading.Thread(target=self._read, args=(items,), name='read', daemon=True)

  def __enter__(self) -> _Ahead:
    self._thread.start()
    return self

  def __exit__(self, *_) -> None:
    self._closed.set()
    self._thread.join()

  def __iter__(self) -> Iterator[Any]:
    while True:
      item, error = self._queue.get()
      if error is not None:
        raise error
      if item is None:
        return
      yield item

  def _read(self, items: Iterator[Any]) -> None:
    error = None
    try:
      for item in items:
        if not self._put((item, None)):
          return
    except BaseException as found:
      error = found
    self._put((None, error))

  def _put(self, value: tuple[Any, BaseException | None]) -> bool:
    """Waits for space in the queue; returns whether the items are still wanted."""
    while not self._closed.is_set():
      with contextlib.suppress(queue.Full):
        self._queue.put(value, timeout=0.1)
        return True
    return False


class _Aborted(Exception):
  """The records of a part won't be complete."""


class _Writing:
  """Writes parts in threads: one may be uploading to a store while the next is computed."""

  def __init__(
    self,
    parts: token_cache_parts.SplitParts,
    info: Mapping[str, Any],
    progress: tokenizing_progress.Progress,
  ):
    self._parts, self._info, self._progress = parts, info, progress
    self._executor = concurrent.futures.ThreadPoolExecutor(2, thread_name_prefix='write')
    self._futures: collections.deque[concurrent.futures.Future] = collections.deque()
    # The records for the thread, and the tallies, of the part that is being computed.
    self._records: queue.Queue | None = None
    self._tallies: dict[str, collections.Counter[str]] = {}

  def add(
    self,
    batch: Batch,
    tokens: Callable[[], Int32[np.ndarray, 'examples*views image_length']],
    features: Callable[[], list[list[text_features.Rows]]] | None,
  ) -> None:
    """Adds examples; `tokens` and `features` return theirs, once these are computed."""
    if self._records is None:
      self._records = self._begin(batch.part)
    elif self._futures[-1].done():
      self._futures[-1].result()  # Raises its error.
    for name, counts in batch.tallies.items():
      self._tallies[name].update(counts)
    if batch.captions:
      found = tokens().reshape(len(batch.captions), self._info['views'], -1)
      of_texts = features() if features else itertools.repeat(None)
      for caption, sequences, rows in zip(batch.captions, found, of_texts):
        self._put(token_cache.serialized(caption, sequences, self._info, rows))
    self._progress.add(len(batch.captions), batch.tallies['skipped'])
    if batch.last:
      self._put(None)
      self._records = None
      self._progress.end_part()

  def _put(self, record: bytes | _Aborted | None) -> None:
    """Waits for space in the queue; raises the error of a thread that has ended with one."""
    assert self._records is not None
    while True:
      try:
        self._records.put(record, timeout=0.1)
        return
      except queue.Full:
        if self._futures[-1].done():
          self._futures[-1].result()
          raise

  def _begin(self, part: int) -> queue.Queue:
    """Starts to write a part; returns the queue for its records."""
    while len(self._futures) > 1:
      self._futures.popleft().result()
    records: queue.Queue = queue.Queue(_WAITING)
    self._tallies = _no_tallies()
    self._futures.append(
      self._executor.submit(self._parts.write, part, _until_none(records), self._tallies)
    )
    return records

  def __enter__(self) -> _Writing:
    return self

  def __exit__(self, kind, *_) -> None:
    if self._records is not None and not self._futures[-1].done():
      with contextlib.suppress(Exception):  # The error that ends the body is the first one.
        self._put(_Aborted())
    self._executor.shutdown(wait=True)
    if kind is None:
      while self._futures:
        self._futures.popleft().result()


def _until_none(records: queue.Queue) -> Iterator[bytes]:
  while (record := records.get()) is not None:
    if isinstance(record, _Aborted):
      raise record
    yield record

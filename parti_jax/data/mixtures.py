"""Mixtures of sources, configured in gin; the paper mixes its data sets in the same way.

  train.task = 'mixture_pairs'
  mixture.sources = {'webdataset_a': 0.7, 'folder_b': 0.3}
  webdataset_a/webdataset.path = 'gs://bucket/a'
  folder_b/folder.path = 'b'

'mixture_texts', 'mixture_images' and 'mixture_pairs' mix tasks of that kind. Each source is
configured in the gin scope of its name. 'mixture_tokens' mixes token caches of one tokenizer:

  mixture.sources = {'token_cache_a': 0.7, 'token_cache_b': 0.3}
  token_cache_a/token_cache.path = 'tokens_a'
"""

from __future__ import annotations

import contextlib
import dataclasses
import fractions
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging

from parti_jax.core import fingerprints
from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.core.fingerprints import Fingerprint
from parti_jax.data import datasets
from parti_jax.data import examples
from parti_jax.data import mixing
from parti_jax.data import order as order_lib
from parti_jax.data import share as share_lib
from parti_jax.data import text_features as text_features_lib

_PREFIX, _TOKENS = 'mixture_', 'tokens'
NAMES = tuple(f'{_PREFIX}{kind}' for kind in (*datasets.ALIASES, _TOKENS))


def is_one(task: str) -> bool:
  """Returns whether a task is a mixture."""
  return task in NAMES


def feature_names(task: str) -> tuple[str, ...]:
  """Returns the names of the features of a mixture, in order."""
  kind = task.removeprefix(_PREFIX)
  return datasets.feature_names(datasets.TOKEN_TASKS[0] if kind == _TOKENS else kind)


def tasks(task: str) -> dict[str, fractions.Fraction]:
  """Returns the tasks of a mixture and their shares of the examples.

  Raises:
    UserError: `mixture.sources` isn't set, or a source doesn't fit the kind of mixture.
  """
  kind, found = task.removeprefix(_PREFIX), mixing.weights()
  for name in found:
    if mixing.is_token_cache(name) != (kind == _TOKENS):
      raise UserError(
        f'mixture.sources: {name} has no {kind}; {_PREFIX}{_TOKENS} mixes token '
        f'caches, {", ".join(NAMES[:-1])} mix sources of pictures and captions'
      )
  return {f'{name}_{kind}': share for name, share in found.items()}


def source_of(task: str) -> str:
  """Returns the source in the task name of a mixture's part: 'folder_b' of 'folder_b_pairs'."""
  return task.rpartition('_')[0]


def part_seed(seed: int, task: str) -> int:
  """Returns the seed of a part, so that two sources are shuffled differently."""
  return order_lib.mixed(seed, task)


@contextlib.contextmanager
def naming(task: str) -> Iterator[None]:
  """Adds the name of a mixture's part to the UserErrors of its body."""
  try:
    yield
  except UserError as error:
    raise UserError(f'mixture.sources, {source_of(task)}: {error}') from error


def vocabulary_sizes(task: str, image_size: image_sizes.ImageSize = 64) -> dict[str, int]:
  """Returns {feature: number of ids} of a task of `datasets`, a mixture or a seqio task."""
  if datasets.is_ours(task) or is_one(task):
    return get(task, image_size)[0].sizes
  from parti_jax.data import tasks as tasks_lib

  features = tasks_lib.get_task(task, image_size).output_features
  return {name: feature.vocabulary.vocab_size for name, feature in features.items()}


def text_features(
  task: str, image_size: image_sizes.ImageSize = 64
) -> text_features_lib.TextFeatures | None:
  """Returns the text features of a task's examples; None without them.

  Raises:
    UserError: there is no data, or the parts of a mixture have other text features.
  """
  if datasets.is_ours(task) or is_one(task):
    return get(task, image_size)[0].text_features
  return None


def get(task: str, image_size: image_sizes.ImageSize = 64) -> list[datasets.Dataset]:
  """Returns the data of a task, or of all tasks of a mixture.

  Raises:
    UserError: there is no data, or a mixture's tokens come from several tokenizers.
  """
  if not is_one(task):
    return [datasets.get(task, image_size)]
  found = []
  for name in tasks(task):
    with naming(name):
      found.append(datasets.get(name, image_size))
  for other in found[1:]:
    _check_same(found[0], other)
  return found


def _check_same(first: datasets.Dataset, other: datasets.Dataset) -> None:
  """Raises UserError if the ids of two data sets have different meanings."""
  different = fingerprints.mismatches(
    first.fingerprints,
    other.fingerprints,
    {
      'vocabulary': 'read both with one vocabulary',
      'tokenizer': '`parti-jax tokenize` both with one tokenizer, or leave one out',
    },
  )
  if different:
    raise UserError(f'mixture.sources: {different[0]}')
  text_features_lib.check_same(
    first.text_features, other.text_features, [first.source.name, other.source.name]
  )
  if 'targets' in first.features:
    for key in ('codebook_size', 'image_tokens'):
      values = [dataset.source.info[key] for dataset in (first, other)]
      if values[0] != values[1]:
        raise UserError(
          f'mixture.sources: {first.source.name} has {key} {values[0]}, and '
          f'{other.source.name} {values[1]}; leave one out'
        )


def opened(
  task: str, split: str, lengths: examples.Lengths, reading: share_lib.Reading, training: bool
) -> share_lib.ShareExamples | Mixed:
  """Opens a share of a task or of a mixture.

  Args:
    task: name of the task or mixture.
    split: the split; for a mixture, the split of each source.
    lengths: lengths of the features.
    reading: how to read the share, without the preparation of examples.
    training: whether texts are dropped.

  Raises:
    UserError: it can't be read, or a source of a mixture doesn't have the split.
  """
  found = get(task, lengths.get('images', 64))
  if not is_one(task):
    (dataset,) = found
    return share_lib.ShareExamples(
      dataset, split, dataclasses.replace(reading, prepare=dataset.preparation(lengths, training))
    )
  shares = tasks(task)
  reading = dataclasses.replace(reading, settings=reading.settings.divided(len(shares)))
  parts = []
  for name, dataset in zip(shares, found):
    with naming(name):
      parts.append(
        share_lib.ShareExamples(
          dataset,
          split,
          dataclasses.replace(
            reading,
            prepare=dataset.preparation(lengths, training),
            seed=part_seed(reading.seed, name),
          ),
        )
      )
  return Mixed(shares, parts)


def check_state(task: str, state: Mapping[str, Any]) -> None:
  """Checks that a checkpoint's data position belongs to the sources of this run.

  Raises:
    UserError: the sources differ.
  """
  before, now = list(state.get('parts', ())), list(tasks(task)) if is_one(task) else []
  if before != now:
    raise UserError(
      f'the checkpoint has a data position in {_mixture_of(before) or "no mixture"}, but '
      f'this run reads {_mixture_of(now) or task}; restore train.task and mixture.sources, or '
      'set train.restart_data=True to continue with a new pass over the data'
    )


def _mixture_of(names: list[str]) -> str:
  return f'a mixture of {", ".join(names)}' if names else ''


class Mixed:
  """Interleaves the examples of several shares by their weights, with `mixing.Turns`.

  When a part of a finite reading ends, the others continue, so all examples are read.

  Args:
    shares: {name of a task: share of the examples}.
    parts: the examples of each.

  Attributes:
    fingerprints: the fingerprints that all parts share.
  """

  def __init__(
    self, shares: Mapping[str, fractions.Fraction], parts: Sequence[share_lib.ShareExamples]
  ):
    self._shares, self._parts = dict(shares), dict(zip(shares, parts))
    self._seen = dict.fromkeys(shares, 0)
    self.fingerprints: dict[str, Fingerprint | None] = parts[0].fingerprints
    self._begin(list(shares))

  def _begin(self, names: list[str], taken: list[int] | None = None) -> None:
    """Schedules these parts from now on."""
    total = sum(self._shares[name] for name in names)
    self._names = names
    self._turns = mixing.Turns([self._shares[name] / total for name in names], taken)

  @property
  def place(self) -> tuple[int, int]:
    """0, since a mixture has no epochs, and the number of examples taken so far."""
    return 0, sum(self._seen.values())

  def places(self, count: int) -> list[tuple]:
    """Returns (epoch, read, count, task) for the next examples of each part."""
    turns = self._turns.copy()
    for _ in range(count if self._names else 0):
      turns.next()
    return [
      (*self._parts[name].place, after - before, name)
      for name, before, after in zip(self._names, self._turns.taken, turns.taken)
      if after > before
    ]

  def seek(self, epoch: int, read: int) -> None:
    """Raises UserError: a mixture doesn't have a single position."""
    raise UserError('a position in a mixture ends in @TASK, the task of one of its sources')

  def counts(self, name: str) -> dict[str, int]:
    """Returns {'SOURCE: reason': count} for 'skipped' or 'shortened'."""
    return {
      f'{source_of(task)}: {reason}': count
      for task, part in self._parts.items()
      for reason, count in part.counts(name).items()
    }

  def state(self) -> dict[str, Any]:
    """Returns each part's position and counts, and the state of the schedule."""
    return {
      'weights': {name: str(share) for name, share in self._shares.items()},
      'taken': dict(zip(self._names, self._turns.taken)),
      'seen': dict(self._seen),
      'skipped': self.counts('skipped'),
      'parts': {name: part.state() for name, part in self._parts.items()},
    }

  def restore(self, state: Mapping[str, Any]) -> None:
    """Continues where `state` was taken; call `check_state` first.

    If the weights differ from those of the state, the new ones apply from here on.
    """
    for name, part in self._parts.items():
      part.restore(state['parts'][name])
    self._seen = dict(state['seen'])
    shown = {name: str(share) for name, share in self._shares.items()}
    if state['weights'] != shown:
      logging.warning(
        'mixture.sources: the weights were %s; from here on they are %s',
        *(
          ', '.join(
            f'{source_of(name)} {float(fractions.Fraction(share)):.4g}'
            for name, share in found.items()
          )
          for found in (state['weights'], shown)
        ),
      )
      self._begin(list(self._shares))
    else:
      self._begin(list(state['taken']), list(state['taken'].values()))

  def close(self) -> None:
    """Stops prefetching."""
    for part in self._parts.values():
      part.close()

  def take(self, count: int) -> dict[str, np.ndarray]:
    """Returns the next examples, stacked; fewer when all parts have ended, {} at the end."""
    found: list[dict[str, np.ndarray]] = []
    while self._names and len(found) < count:
      name = self._names[self._turns.next()]
      if (features := self._parts[name].next()) is not None:
        self._seen[name] += 1
        found.append(features)
      elif others := [other for other in self._names if other != name]:
        self._begin(others)
      else:
        self._names = []
    return examples.stacked(found)

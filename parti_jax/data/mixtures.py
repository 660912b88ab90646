"""Mixtures of sources, which gin configures: as the paper mixes its sets of pictures.

  train.task = 'mixture_pairs'
  mixture.sources = {'webdataset_a': 0.7, 'folder_b': 0.3}
  webdataset_a/webdataset.path = 'gs://bucket/a'
  folder_b/folder.path = 'b'

'mixture_texts', 'mixture_images' and 'mixture_pairs' are mixtures of tasks of that kind, each with
settings of its own in gin's scope of its name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import gin
import numpy as np

from parti_jax.data import datasets
from parti_jax.data import share as share_lib
from parti_jax.data import sources as sources_lib
from parti_jax.errors import UserError
from parti_jax.fingerprints import Fingerprint

_PREFIX = 'mixture_'


@gin.configurable('mixture')
def weights(sources: Mapping[str, float] | None = None) -> dict[str, float]:
  """The sources of a mixture and their weights.

  Args:
    sources: {name of a source, perhaps with an ending: weight}; only ratios count.

  Returns:
    {name: share of the examples}, which sum to 1.

  Raises:
    UserError: there are none, one is unknown, or a weight is not above 0.
  """
  if not isinstance(sources, Mapping) or not sources:
    raise UserError("mixture.sources is not set; give --gin.mixture.sources=\"{'webdataset_a': 0.7, "
                    "'folder_b': 0.3}\"")
  for name, weight in sources.items():
    if sources_lib.kind(name) is None:
      raise UserError(f'mixture.sources: there is no source {name!r}; there are '
                      f'{", ".join(sources_lib.NAMES)}, each perhaps with an ending: folder_b')
    if type(weight) not in (int, float) or not 0 < weight < float('inf'):
      raise UserError(f'mixture.sources: the weight {weight!r} of {name} must be a number above 0')
  total = sum(sources.values())
  return {name: weight / total for name, weight in sources.items()}


def is_one(task: str) -> bool:
  """Whether a task is a mixture."""
  return task.startswith(_PREFIX) and task.removeprefix(_PREFIX) in datasets.ALIASES


def tasks(task: str) -> dict[str, float]:
  """The tasks of a mixture and their shares of the examples."""
  kind = task.removeprefix(_PREFIX)
  return {f'{name}_{kind}': weight for name, weight in weights().items()}


def vocabulary_sizes(task: str, image_size: int = 64) -> dict[str, int]:
  """Feature -> how many ids it has, of a task of `datasets`, a mixture or a task of seqio."""
  if datasets.is_ours(task) or is_one(task):
    return get(task, image_size)[0].sizes
  from parti_jax.data import tasks  # pylint: disable=g-import-not-at-top
  features = tasks.get_task(task, image_size).output_features
  return {name: feature.vocabulary.vocab_size for name, feature in features.items()}


def get(task: str, image_size: int = 64) -> list[datasets.Dataset]:
  """The data of a task, or of all tasks of a mixture."""
  names = tasks(task) if is_one(task) else [task]
  return [datasets.get(name, image_size) for name in names]


def opened(task: str, split: str, lengths: Mapping[str, int], reading: share_lib.Reading,
           training: bool):
  """Opens a share of a task or of a mixture.

  Args:
    task: its name.
    split: the split; of a mixture, that of every source.
    lengths: of the features.
    reading: how it is read, without what is done to an example.
    training: whether texts are dropped.

  Returns:
    A `share_lib.ShareExamples`, or a `Mixed` of several.
  """
  found = []
  for dataset in get(task, lengths.get('images', 64)):
    found.append(share_lib.ShareExamples(dataset, split, dataclasses.replace(
        reading, prepare=dataset.preparation(lengths, training))))
  return Mixed(tasks(task), found) if is_one(task) else found[0]


class Mixed:
  """Examples of several shares, interleaved by their weights.

  The n-th example is from the source that is furthest behind its weight, so that over any stretch
  each has its part to within one example for each source.

  Args:
    shares: {name of a task: share of the examples}.
    parts: the examples of each.

  Attributes:
    fingerprints: what all parts agree on.
  """

  def __init__(self, shares: Mapping[str, float], parts):
    self._names, self._parts = list(shares), parts
    self._shares = np.array(list(shares.values()))
    self._taken = np.zeros(len(parts), np.int64)
    self.fingerprints: dict[str, Fingerprint | None] = parts[0].fingerprints

  @property
  def place(self) -> tuple[int, int]:
    """0, since a mixture has no epochs, and the examples taken before the next."""
    return 0, int(self._taken.sum())

  def places(self, count: int) -> list[tuple]:
    """(epoch, read, count, task) of the next examples of each part."""
    taken = self._taken.copy()
    for _ in range(count):
      taken[self._next_part(taken)] += 1
    return [(*part.place, int(more), name) for name, part, more in zip(
        self._names, self._parts, taken - self._taken) if more]

  def seek(self, epoch: int, read: int) -> None:
    """A mixture has no place of its own."""
    raise UserError('a place in a mixture ends in @TASK, the task of one of its sources')

  def counts(self, name: str) -> dict[str, int]:
    """Reason -> count over all parts; of 'skipped' or 'shortened'."""
    found: dict[str, int] = {}
    for part in self._parts:
      for reason, count in part.counts(name).items():
        found[reason] = found.get(reason, 0) + count
    return found

  def state(self) -> dict[str, Any]:
    """Where the next example of each part is."""
    return {'taken': dict(zip(self._names, self._taken.tolist())),
            'parts': {name: part.state() for name, part in zip(self._names, self._parts)}}

  def restore(self, state: Mapping[str, Any]) -> None:
    """Goes on where `state` was taken.

    Raises:
      UserError: it is of other sources.
    """
    if set(state.get('parts', {})) != set(self._names):
      raise UserError(f'the checkpoint was trained on {", ".join(state.get("parts", ["no mixture"]))}'
                      f', and mixture.sources are {", ".join(self._names)}; set them back, or set '
                      'train.restart_data=True')
    self._taken = np.array([state['taken'][name] for name in self._names])
    for name, part in zip(self._names, self._parts):
      part.restore(state['parts'][name])

  def close(self) -> None:
    """Ends reading ahead."""
    for part in self._parts:
      part.close()

  def take(self, count: int) -> dict[str, np.ndarray]:
    """The next examples, stacked; fewer after the last epoch of a part."""
    found = []
    for _ in range(count):
      part = self._next_part(self._taken)
      features = self._parts[part].next()
      if features is None:
        break
      self._taken[part] += 1
      found.append(features)
    return {name: np.stack([features[name] for features in found]) for name in found[0]
            } if found else {}

  def _next_part(self, taken: np.ndarray) -> int:
    return int(np.argmax(self._shares * (taken.sum() + 1) - taken))

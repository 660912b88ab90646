"""The inception score (Salimans et al. 2016, arXiv 1606.03498, section 4), over Inception's logits.

exp of the mean KL divergence of p(class | picture) from p(class), averaged over parts of the
pictures. The score depends on the size of the parts and, if pictures are sorted, on their order, so
protocols state both: torch-fidelity shuffles the pictures and makes ten parts; ADM's evaluator
(arXiv 2105.05233) takes parts of 5,000 in the given order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from jaxtyping import Float64

# The number of parts of most publications, and the seed with which torch-fidelity shuffles.
SPLITS = 10
_SHUFFLE_SEED = 2020
# ADM's size of a part.
PART = 5000


class Part:
  """The pictures of a part, which come in batches."""

  def __init__(self):
    self.count = 0
    self._probabilities: Float64[np.ndarray, 'classes'] | None = None
    self._negative_entropy = 0.0

  def add(self, logits: Float[np.ndarray, 'pictures classes']) -> None:
    """Adds the pictures of a batch."""
    logits = logits.astype(np.float64)
    logits -= logits.max(axis=1, keepdims=True)
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    total = p.sum(axis=0)
    self._probabilities = total if self._probabilities is None else self._probabilities + total
    self._negative_entropy += float(np.sum(p * log_p))
    self.count += len(logits)

  def score(self) -> float:
    """Returns the score of at least one picture."""
    if self._probabilities is None:
      raise ValueError('an inception score of no pictures')
    mean = self._probabilities / self.count
    seen = mean > 0
    entropy = -np.sum(mean[seen] * np.log(mean[seen]))
    return float(np.exp(self._negative_entropy / self.count + entropy))


class Consecutive:
  """Scores of consecutive parts, as ADM's evaluator makes them.

  Args:
    part: number of pictures in a part; the last one may have fewer.
  """

  def __init__(self, part: int = PART):
    self._size, self._parts = part, [Part()]

  def add(self, logits: Float[np.ndarray, 'pictures classes']) -> None:
    """Adds the pictures that come next."""
    while len(logits):
      if self._parts[-1].count == self._size:
        self._parts.append(Part())
      room = self._size - self._parts[-1].count
      self._parts[-1].add(logits[:room])
      logits = logits[room:]

  def scores(self) -> list[float]:
    """Returns the score of each part."""
    return [part.score() for part in self._parts]


def shuffled(
  logits: Float[np.ndarray, 'pictures classes'], splits: int = SPLITS
) -> Sequence[float]:
  """Returns the scores of parts of the shuffled pictures, the same parts as torch-fidelity's."""
  count = len(logits)
  order = np.random.RandomState(_SHUFFLE_SEED).permutation(count)
  found = []
  for split in range(splits):
    part = Part()
    part.add(logits[order[split * count // splits : (split + 1) * count // splits]])
    found.append(part.score())
  return found

"""Measures how well pictures fit their prompts, and how much the pictures of a prompt differ.

The benchmarks of guidance and adaptive computation and `parti-jax calibrate` use these measures.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from jaxtyping import Float64
from jaxtyping import Int
from jaxtyping import UInt8

from parti_jax.core import image_sizes
from parti_jax.core.errors import UserError
from parti_jax.data import openmoji
from parti_jax.evaluation.openmoji import openmoji_judge

RANKER = 'ranker'
# Largest possible difference between two scores of a measure.
SPANS = {'tone_right': 1.0, 'name_top1': 1.0, RANKER: 2.0}


def _chosen(total: int, most: int | None, seed: int) -> Int[np.ndarray, 'chosen']:
  """Returns indices of at most `most` of `total` prompts, chosen at random, ascending."""
  count = min(most or total, total)
  return np.sort(np.random.default_rng(seed).choice(total, count, replace=False))


class RankerAlignment:
  """Scores pictures by the model's own ranker: the cosine of a prompt's and a picture's features.

  Attributes:
    prompts: the texts.
    measures: names of the scores.
  """

  measures = (RANKER,)

  def __init__(self, ranker, prompts: Sequence[str], max_prompts: int | None = None, seed: int = 0):
    """Wraps the `TextToImage.ranker`; the other arguments are those of OpenMojiAlignment."""
    self._ranker = ranker
    self.prompts = [prompts[index] for index in _chosen(len(prompts), max_prompts, seed)]

  def judged(self, measure: str) -> int:
    """Returns the number of prompts, since the ranker judges all of them."""
    del measure
    return len(self.prompts)

  def scores(
    self, images: UInt8[np.ndarray, 'prompts num_images height width 3']
  ) -> dict[str, Float64[np.ndarray, 'prompts']]:
    """Returns the mean cosine of each prompt's pictures, from -1 to 1."""
    texts = [prompt for prompt in self.prompts for _ in range(images.shape[1])]
    scores = np.asarray(self._ranker.scores(texts, images.reshape(-1, *images.shape[2:])))
    return {RANKER: scores.astype(np.float64).reshape(images.shape[:2]).mean(axis=1)}


class OpenMojiAlignment:
  """Scores pictures by OpenMoji's judge, over prompts of one split.

  Attributes:
    prompts: captions.
    measures: names of the scores.
  """

  measures = ('tone_right', 'name_top1')

  def __init__(
    self,
    image_size: image_sizes.ImageSize,
    split: str,
    max_prompts: int | None = None,
    seed: int = 0,
    pictures: Sequence | None = None,
    render: Callable[[str, int], UInt8[np.ndarray, 'size size 3']] | None = None,
  ):
    """Renders the real pictures once.

    Args:
      image_size: height and width of the pictures to judge, in pixels.
      split: a split of OpenMoji.
      max_prompts: maximum number of prompts, chosen at random; None for all.
      seed: seed of that choice.
      pictures: the real pictures of all splits; None for OpenMoji's.
      render: as in `openmoji_judge.Judge`.

    Raises:
      UserError: if the split doesn't exist or has no pictures, or the pictures aren't square.
    """
    if split not in openmoji.SPLITS:
      raise UserError(f'unknown split {split!r}: the splits are {", ".join(openmoji.SPLITS)}')
    pictures = openmoji.pictures() if pictures is None else pictures
    members = [picture for picture in pictures if picture.split == split]
    if not members:
      raise UserError(f'the split {split} has no pictures')
    self._targets = [members[index] for index in _chosen(len(members), max_prompts, seed)]
    self._judge = openmoji_judge.Judge(pictures, image_size, render)
    self.prompts = [picture.caption for picture in self._targets]

  def judged(self, measure: str) -> int:
    """Returns how many prompts a measure judges: the tone only for names that have tones."""
    if measure != 'tone_right':
      return len(self._targets)
    return sum(self._judge.has_tones(picture.name) for picture in self._targets)

  def scores(
    self, images: UInt8[np.ndarray, 'prompts num_images height width 3']
  ) -> dict[str, Float64[np.ndarray, 'prompts']]:
    """Judges pictures.

    Args:
      images: the pictures of each prompt.

    Returns:
      For each of `measures` the share of each prompt's pictures that are right; nan if it isn't
      judged (the tone of a name without tones).
    """
    verdicts = self._judge.judge(self._targets, images)
    tone = np.where(verdicts.tone_judged, verdicts.tone_right.mean(axis=1), np.nan)
    return {'tone_right': tone, 'name_top1': verdicts.name_top1.mean(axis=1)}


def pairwise_distance(
  images: UInt8[np.ndarray, 'prompts num_images height width 3'],
) -> Float64[np.ndarray, 'prompts']:
  """Returns the mean distance between the pictures of each prompt, over all pairs of them.

  The distance of two pictures is their root mean squared difference, with pixels in [0, 1].

  Args:
    images: the pictures of each prompt, at least two.

  Raises:
    ValueError: if there is only one picture per prompt.
  """
  prompts, count = images.shape[:2]
  if count < 2:
    raise ValueError('a distance needs at least two pictures')
  flat = images.reshape(prompts, count, -1).astype(np.float32) / 255.0
  total = np.zeros(prompts)
  for first in range(count):
    for second in range(first + 1, count):
      total += np.sqrt(np.square(flat[:, first] - flat[:, second]).mean(axis=1, dtype=np.float64))
  return total / (count * (count - 1) / 2)


def mean_and_error(values: Float[np.ndarray, 'prompts']) -> tuple[float, float]:
  """Returns the mean over prompts and its standard error, ignoring nan.

  The error of a single prompt is nan.

  Raises:
    UserError: if all values are nan.
  """
  values = values[~np.isnan(values)]
  if not values.size:
    raise UserError('none of the prompts can be judged, so the mean is undefined; choose others')
  error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
  return float(values.mean()), float(error)

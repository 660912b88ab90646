"""Scores of pictures for texts from a ranker's vectors, scaled as in publications.

| score | network | scale |
|---|---|---|
| CLIPScore (arXiv 2104.08718) | CLIP ViT-B/32 | 2.5 · max(cosine, 0) |
| HPSv2 (arXiv 2306.09341), HPSv2.1 | its CLIP ViT-H/14 | 100 · cosine |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# The prefix that CLIPScore adds to each text (section 3).
CLIP_SCORE_PREFIX = 'A photo depicts '


class Score(NamedTuple):
  """A published score.

  Attributes:
    name: its name.
    prefix: what stands before each text.
    of: computes the scores of pairs from `image_features` and `text_features` of the prefixed texts.
  """

  name: str
  prefix: str
  of: Callable[[np.ndarray, np.ndarray], np.ndarray]


def scores_of(kind: str, file_format: str | None) -> tuple[Score, ...]:
  """Returns the published scores that a ranker's vectors give.

  Args:
    kind: the ranker's kind, a name in `parti_jax.models.rankers.KINDS`.
    file_format: the format of `parti-jax import` that it is from; None if it was trained here.
  """
  if kind != 'clip':
    return ()
  found = (Score('CLIPScore', CLIP_SCORE_PREFIX, clip_score),)
  return (*found, Score('HPSv2', '', hps_v2)) if file_format == 'hpsv2' else found


def clip_score(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
  """CLIPScore of each picture for its text (section 3).

  Args:
    image_features: float32 [n, feature_dim], of any length, of `CLIP.image_features`.
    text_features: as `image_features`, of the texts after CLIP_SCORE_PREFIX.

  Returns:
    float32 [n] in [0, 2.5]. Its mean is the published number, often given times 100.
  """
  return 2.5 * np.maximum(_cosines(image_features, text_features), 0)


def hps_v2(image_features: np.ndarray, text_features: np.ndarray) -> np.ndarray:
  """HPSv2's score of each picture for its prompt, as its benchmark's tables give it.

  Args:
    image_features: float32 [n, feature_dim], of any length, of HPSv2's weights.
    text_features: as `image_features`.

  Returns:
    float32 [n] in [-100, 100]. The benchmark takes the mean over the prompts of a style.
  """
  return 100 * _cosines(image_features, text_features)


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
  if one.shape != other.shape or one.ndim != 2:
    raise ValueError(f"vectors {one.shape} of pictures and {other.shape} of texts aren't pairs")
  lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
  return (np.sum(one * other, axis=1) / lengths).astype(np.float32)

"""Scores of pairs by their definitions."""

import numpy as np
import pytest

from parti_jax.evaluation.metrics import clip_score

ONE = np.array([[1, 0], [1, 0], [3, 4], [0, 2]], np.float32)
OTHER = np.array([[1, 0], [-2, 0], [4, 3], [1, 0]], np.float32)


def test_clip_score():
  np.testing.assert_allclose(clip_score.clip_score(ONE, OTHER), [2.5, 0, 2.5 * 0.96, 0], rtol=1e-6)


def test_hps_v2():
  np.testing.assert_allclose(clip_score.hps_v2(ONE, OTHER), [100, -100, 96, 0], rtol=1e-6)


def test_scores_are_those_that_a_network_is_published_for():
  names = lambda *ranker: [score.name for score in clip_score.scores_of(*ranker)]
  assert names('coca', None) == names('siglip', 'siglip2') == []
  assert names('clip', 'clip') == names('clip', 'open_clip') == ['CLIPScore']
  assert names('clip', 'hpsv2') == ['CLIPScore', 'HPSv2']


def test_no_pairs():
  with pytest.raises(ValueError, match="aren't pairs"):
    clip_score.clip_score(ONE, OTHER[:1])

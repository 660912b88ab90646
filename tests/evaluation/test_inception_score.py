"""Tests of the inception score against independent copies of ADM's and torch-fidelity's formulas."""

import numpy as np
import pytest

from parti_jax.evaluation.metrics import inception_score

LOGITS = 3 * np.random.default_rng(0).normal(size=(57, 9)).astype(np.float32)


def _plain(logits):
  p = np.exp(logits.astype(np.float64))
  p /= p.sum(axis=1, keepdims=True)
  return np.exp(np.mean(np.sum(p * (np.log(p) - np.log(p.mean(axis=0, keepdims=True))), axis=1)))


@pytest.mark.parametrize('batch', [1, 10, 57])
def test_consecutive_parts_as_adms_evaluator(batch):
  streaming = inception_score.Consecutive(part=20)
  for start in range(0, len(LOGITS), batch):
    streaming.add(LOGITS[start : start + batch])
  expected = [_plain(LOGITS[start : start + 20]) for start in (0, 20, 40)]
  np.testing.assert_allclose(streaming.scores(), expected, rtol=1e-9)


def test_shuffled_parts_as_torch_fidelity():
  order = np.random.RandomState(2020).permutation(57)
  expected = [_plain(LOGITS[order][i * 57 // 4 : (i + 1) * 57 // 4]) for i in range(4)]
  np.testing.assert_allclose(inception_score.shuffled(LOGITS, 4), expected, rtol=1e-9)


def test_agrees_with_torch_fidelity():
  torch = pytest.importorskip('torch')
  metric_isc = pytest.importorskip('torch_fidelity.metric_isc')
  theirs = metric_isc.isc_features_to_metric(torch.from_numpy(LOGITS), splits=4)
  ours = inception_score.shuffled(LOGITS, 4)
  assert np.mean(ours) == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_MEAN], rel=1e-9)
  assert np.std(ours) == pytest.approx(theirs[metric_isc.KEY_METRIC_ISC_STD], rel=1e-9)


def test_logits_of_any_size_and_no_pictures():
  part = inception_score.Part()
  with pytest.raises(ValueError, match='no pictures'):
    part.score()
  part.add(np.array([[1e4, 0.0], [0.0, 1e4]], np.float32))
  assert part.score() == pytest.approx(2)

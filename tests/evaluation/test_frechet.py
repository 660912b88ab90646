"""Tests of the Fréchet distance: closed forms of Gaussians, and torch-fidelity's own function."""

import numpy as np
import pytest

from parti_jax.evaluation.metrics import frechet


def gaussian(mean, covariance):
  return frechet.Gaussian(np.array(mean, float), np.array(covariance, float))


def test_diagonal_gaussians_have_a_closed_form():
  one = gaussian([1.0, 2.0, 0.0], np.diag([4.0, 9.0, 0.0]))
  other = gaussian([0.0, 4.0, 0.0], np.diag([1.0, 16.0, 25.0]))
  expected = (1 + 4) + ((2 - 1) ** 2 + (3 - 4) ** 2 + (0 - 5) ** 2)
  assert frechet.distance(one, other) == pytest.approx(expected)
  assert frechet.distance(other, one) == pytest.approx(expected)


def test_a_rotation_changes_nothing():
  rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
  one, other = np.diag([1.0, 4.0, 9.0, 2.0, 3.0]), np.diag([9.0, 1.0, 1.0, 8.0, 3.0])
  expected = np.square(np.sqrt(np.diag(one)) - np.sqrt(np.diag(other))).sum()
  turned = [
    gaussian(np.zeros(5), rotation @ covariance @ rotation.T) for covariance in (one, other)
  ]
  assert frechet.distance(*turned) == pytest.approx(expected)


def test_covariances_that_do_not_commute():
  # For 2x2 matrices, tr((AB)^½) = sqrt(tr(AB) + 2 sqrt(det(AB))).
  one, other = np.array([[2.0, 1.0], [1.0, 3.0]]), np.array([[5.0, -2.0], [-2.0, 1.0]])
  product = one @ other
  root = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
  expected = np.trace(one) + np.trace(other) - 2 * root
  found = frechet.distance(gaussian([0, 0], one), gaussian([0, 0], other))
  assert found == pytest.approx(expected)


def test_samples_approach_the_distance_of_their_gaussians():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(20_000, 3)).astype(np.float32)
  others = (1 + 2 * rng.normal(size=(30_000, 3))).astype(np.float32)
  assert frechet.frechet_distance(features, others) == pytest.approx(3 + 3, rel=0.03)


def test_fewer_pictures_than_features():
  features = np.random.default_rng(0).normal(size=(5, 40))
  assert frechet.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
  assert frechet.frechet_distance(features, features + 2) == pytest.approx(40 * 4)


def test_one_picture_has_no_covariance():
  with pytest.raises(ValueError, match='two pictures'):
    frechet.frechet_distance(np.zeros((1, 3)), np.zeros((9, 3)))


def test_agrees_with_torch_fidelity():
  torch = pytest.importorskip('torch')
  metric_fid = pytest.importorskip('torch_fidelity.metric_fid')
  rng = np.random.default_rng(0)
  sets = [rng.normal(size=(50, 8)) @ rng.normal(size=(8, 8)) for _ in range(2)]
  statistics = [metric_fid.fid_features_to_statistics(torch.from_numpy(part)) for part in sets]
  theirs = metric_fid.fid_statistics_to_metric(*statistics, verbose=False)
  assert frechet.frechet_distance(*sets) == pytest.approx(
    theirs['frechet_inception_distance'], rel=1e-6
  )

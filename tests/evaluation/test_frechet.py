"""Tests of the Fréchet distance: closed forms of Gaussians, and the functions of others."""

import numpy as np
import pytest
import scipy.linalg

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


def _published(features, others):
  """The formula as ADM's evaluator and the FID's first code compute it."""
  one, other = (np.cov(part, rowvar=False) for part in (features, others))
  apart = features.mean(axis=0) - others.mean(axis=0)
  root = scipy.linalg.sqrtm(one @ other).real
  return apart @ apart + np.trace(one) + np.trace(other) - 2 * np.trace(root)


def test_agrees_with_the_root_of_the_product():
  rng = np.random.default_rng(0)
  sets = [rng.normal(size=(90, 8)) @ rng.normal(size=(8, 8)) + shift for shift in (0, 1)]
  assert frechet.frechet_distance(*sets) == pytest.approx(_published(*sets), rel=1e-9)


def test_sums_over_batches_are_those_of_the_whole():
  # A mean far from 0, where sums of squares would lose the deviations.
  features = np.random.default_rng(0).normal(loc=1e6, size=(100, 6))
  parts = [frechet.Moments.of(features[start : start + 7]) for start in range(0, 100, 7)]
  total = sum(parts[1:], parts[0])
  reverse = sum(parts[-2::-1], parts[-1])
  assert total.count == 100
  for moments in (total, reverse):
    found = moments.gaussian()
    np.testing.assert_allclose(found.mean, features.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features, rowvar=False), rtol=1e-6)
  with pytest.raises(ValueError, match='at least one picture'):
    frechet.Moments.of(features[:0])


def test_influences_are_the_derivative_by_a_pictures_weight():
  rng = np.random.default_rng(0)
  features = rng.normal(size=(40, 3)) @ rng.normal(size=(3, 3))
  other = frechet.Gaussian.of(rng.normal(size=(50, 3)) + 0.5)

  def weighted(weights):
    weights = weights / weights.sum()
    mean = weights @ features
    apart = features - mean
    return frechet.distance(frechet.Gaussian(mean, (weights[:, None] * apart).T @ apart), other)

  uniform = np.full(len(features), 1 / len(features))
  step = 1e-6
  expected = []
  for index in range(5):
    towards = np.zeros(len(features))
    towards[index] = 1
    forward, backward = (
      weighted((1 - sign * step) * uniform + sign * step * towards) for sign in (1, -1)
    )
    expected.append((forward - backward) / (2 * step))
  mean = features.mean(axis=0)
  population = frechet.Gaussian(mean, np.cov(features, rowvar=False, bias=True))
  influence = frechet.Influence(population, other).of(features)
  np.testing.assert_allclose(influence[:5], expected, rtol=1e-5, atol=1e-7)
  assert influence.mean() == pytest.approx(0, abs=1e-9)


def test_the_standard_error_is_the_spread_over_samples():
  rng = np.random.default_rng(0)
  other = frechet.Gaussian.of(1.5 * rng.normal(size=(5000, 4)) + 0.3)
  distances, errors = [], []
  for _ in range(200):
    features = rng.normal(size=(400, 4))
    one = frechet.Gaussian.of(features)
    distances.append(frechet.distance(one, other))
    errors.append(frechet.Influence(one, other).of(features).std(ddof=1) / 400**0.5)
  assert np.mean(errors) == pytest.approx(np.std(distances), rel=0.15)


def test_the_standard_error_of_pictures_of_the_same_prompts():
  """Its mean is the spread over samples of prompts; as if independent, pictures give half of that."""
  rng = np.random.default_rng(0)
  other = frechet.Gaussian.of(1.5 * rng.normal(size=(5000, 3)) + 0.3)
  prompts, each = 100, 4
  prompt_of = np.arange(prompts).repeat(each)
  distances, errors, as_independent = [], [], []
  for _ in range(200):
    of_prompt = rng.normal(size=(prompts, 1, 3)) * 0.9**0.5
    features = (of_prompt + rng.normal(size=(prompts, each, 3)) * 0.1**0.5).reshape(-1, 3)
    one = frechet.Gaussian.of(features)
    influence = frechet.Influence(one, other).of(features)
    distances.append(frechet.distance(one, other))
    errors.append(frechet.standard_error(influence, prompt_of))
    as_independent.append(frechet.standard_error(influence, np.arange(len(influence))))
  spread = np.std(distances)
  assert np.mean(errors) == pytest.approx(spread, rel=0.15)
  assert np.mean(as_independent) < 0.6 * spread


def test_the_standard_error_over_groups():
  influence = np.random.default_rng(0).normal(size=12)
  alone = frechet.standard_error(influence, np.arange(12)[::-1])
  assert alone == pytest.approx(influence.std(ddof=1) / 12**0.5)
  # Copies of the pictures add nothing, and numbers of groups may have gaps.
  copied = frechet.standard_error(influence.repeat(3), 2 * np.arange(12).repeat(3))
  assert copied == pytest.approx(alone)
  assert frechet.standard_error(influence, np.zeros(12, int)) is None

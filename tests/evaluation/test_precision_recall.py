"""Tests of precision and recall: by hand, by brute force, and against torch-fidelity."""

import numpy as np
import pytest

from parti_jax.evaluation.metrics import precision_recall as lib


def by_definition(generated, real, neighbors):
  """The paper's definition, point by point."""

  def radii(points):
    return [sorted(np.linalg.norm(points - point, axis=1))[neighbors] for point in points]

  def share(points, centers):
    found = [
      any(
        np.linalg.norm(point - center) <= radius for center, radius in zip(centers, radii(centers))
      )
      for point in points
    ]
    return np.mean(found)

  return share(generated, real), share(real, generated)


def test_points_on_a_line():
  real = np.arange(10.0)[:, None]
  # Balls around 0..9 of radius 1 to 2 (k = 2) reach from -2 to 11.
  generated = np.array([[3.5], [4.5], [5.5], [100.0]])
  found = lib.precision_recall(generated, real, neighbors=2)
  assert found.precision == 0.75
  # The ball of 100 has a radius of 95.5 and covers points above 4.5; that of 3.5 reaches 1.5.
  assert found.recall == 0.8


@pytest.mark.parametrize('seed', [0, 1])
def test_agrees_with_the_definition_for_any_blocks(monkeypatch, seed):
  rng = np.random.default_rng(seed)
  generated = rng.normal(size=(37, 6)).astype(np.float32)
  real = (rng.normal(size=(50, 6)) + [1, 0, 0, 0, 0, 0]).astype(np.float32)
  expected = by_definition(generated.astype(float), real.astype(float), 3)
  assert 0 < min(expected) and max(expected) < 1
  for block_bytes in (1 << 27, 1, 8 * 50 * 7):
    monkeypatch.setattr(lib, '_BLOCK_BYTES', block_bytes)
    found = lib.precision_recall(generated, real)
    assert (found.precision, found.recall) == pytest.approx(expected)


def test_a_missing_mode_only_lowers_recall():
  rng = np.random.default_rng(0)
  one, other = rng.normal(size=(100, 4)), 50 + rng.normal(size=(100, 4))
  found = lib.precision_recall(one, np.concatenate([one + 0.01, other]))
  assert found.precision == 1.0 and found.recall == 0.5


def test_the_same_pictures_several_times():
  pictures = np.random.default_rng(0).normal(size=(6, 300)).repeat(5, axis=0)
  found = lib.precision_recall(pictures, pictures)
  assert (found.precision, found.recall) == (1.0, 1.0)


def test_too_few_pictures():
  with pytest.raises(ValueError, match='3 generated pictures; more than 3'):
    lib.precision_recall(np.zeros((3, 2)), np.zeros((9, 2)))


def test_agrees_with_torch_fidelity():
  torch = pytest.importorskip('torch')
  metric_prc = pytest.importorskip('torch_fidelity.metric_prc')
  rng = np.random.default_rng(0)
  generated, real = rng.normal(size=(60, 5)), rng.normal(size=(80, 5)) * 1.3
  precision, recall = metric_prc.calculate_precision_recall_part(
    torch.from_numpy(generated), torch.from_numpy(real)
  )
  found = lib.precision_recall(generated, real)
  assert (found.precision, found.recall) == pytest.approx((precision, recall))


@pytest.mark.parametrize('seed', range(20))
def test_points_on_the_surface_of_a_ball_are_inside(seed):
  rng = np.random.default_rng(seed)
  # Distances of integers are exact, and many are equal.
  generated = 100.0 + rng.integers(0, 4, (rng.integers(4, 30), 2))
  real = 100.0 + rng.integers(0, 4, (rng.integers(4, 30), 2))
  found = lib.precision_recall(generated, real)
  assert (found.precision, found.recall) == pytest.approx(by_definition(generated, real, 3))

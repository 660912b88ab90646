"""Alignment and diversity of pictures."""

import types

import evaluation_fakes as fakes
import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.evaluation.openmoji import alignment


def test_right_pictures_by_prompt():
  judge = alignment.OpenMojiAlignment(
    fakes.SIZE, 'train', pictures=fakes.small_set(), render=fakes.render
  )
  other = lambda prompt: prompt.replace('9', '8') if '9' in prompt else prompt
  images = np.stack(
    [[fakes.render(prompt), fakes.render(other(prompt))] for prompt in judge.prompts]
  )
  scores = judge.scores(images)
  changed = np.array(['9' in prompt for prompt in judge.prompts])
  np.testing.assert_array_equal(scores['name_top1'], np.where(changed, 0.5, 1.0))
  toned = np.array(['toned' in prompt for prompt in judge.prompts])
  np.testing.assert_array_equal(np.isnan(scores['tone_right']), ~toned)
  np.testing.assert_array_equal(scores['tone_right'][toned & ~changed], 1.0)
  mean, error = alignment.mean_and_error(np.array([0.0, 1.0, np.nan]))
  assert (mean, error) == (0.5, pytest.approx(0.5))


def test_the_seed_determines_the_prompts():
  prompts = lambda seed: (
    alignment.OpenMojiAlignment(
      fakes.SIZE, 'train', 5, seed, fakes.small_set(), fakes.render
    ).prompts
  )
  assert len(set(prompts(0))) == 5 and prompts(0) == prompts(0) != prompts(1)
  with pytest.raises(UserError, match='unknown split'):
    alignment.OpenMojiAlignment(fakes.SIZE, 'test', pictures=fakes.small_set())


def test_a_rankers_score_is_the_mean_of_a_prompts_pictures():
  texts = []
  ranker = types.SimpleNamespace(
    scores=lambda asked, images: (texts.extend(asked), images[:, 0, 0, 0] / 10.0)[1]
  )
  measured = alignment.RankerAlignment(ranker, ['a', 'b', 'c'], 2)
  images = np.array([1, 3, 6, 8], np.uint8).reshape(2, 2, 1, 1, 1).repeat(3, -1)
  np.testing.assert_allclose(measured.scores(images)['ranker'], [0.2, 0.7])
  assert texts == [measured.prompts[0]] * 2 + [measured.prompts[1]] * 2


def test_distance_of_all_pairs():
  shades = np.array([[0, 255, 0], [10, 10, 10]], np.uint8)
  images = np.broadcast_to(shades[:, :, None, None, None], (2, 3, 4, 4, 3))
  np.testing.assert_allclose(alignment.pairwise_distance(images), [2 / 3, 0])
  half = images.copy()
  half[0, 1, :2] = 0  # Half of the pixels differ by 1: the root of 1/2.
  np.testing.assert_allclose(alignment.pairwise_distance(half)[0], 2 / 3 * 0.5**0.5)
  with pytest.raises(ValueError, match='two pictures'):
    alignment.pairwise_distance(images[:, :1])

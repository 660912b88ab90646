"""The demo model in the package draws what docs/demo.md says, within its spread."""

import numpy as np
import pytest

import parti_jax


@pytest.mark.slow
def test_the_demo_draws_combinations_that_it_never_saw():
  from parti_jax.data import openmoji
  from parti_jax.evaluation.openmoji import openmoji_judge

  pictures = openmoji.pictures()
  asked = [picture for picture in pictures if picture.split == 'unseen_combinations'][::5]
  pipeline = parti_jax.load()
  drawn = pipeline.generate([picture.caption for picture in asked])
  verdicts = openmoji_judge.Judge(pictures, pipeline.image_size).judge(asked, drawn.images)
  assert np.mean(verdicts.name_top1) > 0.65
  assert np.mean(verdicts.tone_right[verdicts.tone_judged]) > 0.45

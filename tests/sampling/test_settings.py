"""Settings that can't be are named."""

import numpy as np
import pytest

from parti_jax.errors import UserError
from parti_jax.sampling import settings as settings_lib


@pytest.mark.parametrize('name, value', [
    ('guidance_scale', -1.0), ('guidance_scale', 'strong'), ('temperature', -0.1),
    ('temperature', float('nan')), ('top_k', -1), ('top_k', 2.5), ('top_p', 0.0), ('top_p', 1.1),
    ('top_p', float('inf')), ('guidance_start', -1), ('guidance_ramp', 'steep'),
    ('exit_threshold', 1.1), ('guidance_skip_threshold', -0.1)])
def test_bad_values_are_named(name, value):
  with pytest.raises(UserError, match=f'^{name}='):
    settings_lib.SamplingSettings(**{name: value})


def test_replace_keeps_what_is_none():
  settings = settings_lib.SamplingSettings(guidance_scale=3.0, top_k=7)
  changed = settings.replace(guidance_scale=None, temperature=0, top_p=np.float32(0.5))
  assert changed == settings_lib.SamplingSettings(3.0, 0.0, 7, 0.5)


def test_what_a_setting_needs():
  plain = settings_lib.SamplingSettings()
  assert not (plain.guided or plain.greedy or plain.filtered)
  assert plain.replace(guidance_scale=1.1).guided
  assert plain.replace(temperature=0).greedy
  assert plain.replace(top_k=5).filtered and plain.replace(top_p=0.9).filtered


def test_ramps_of_guidance():
  settings = settings_lib.SamplingSettings(guidance_scale=3.0, guidance_start=2.0)
  scales = lambda ramp, length=5: settings.replace(guidance_ramp=ramp).guidance_scales(length)
  assert settings.guidance_scales(5).tolist() == [3.0] * 5
  assert scales('linear').tolist() == [2.0, 2.25, 2.5, 2.75, 3.0]
  np.testing.assert_allclose(scales('cosine'), [2, 2.1464466, 2.5, 2.8535534, 3], rtol=1e-6)
  assert scales('linear').dtype == np.float32
  for ramp in settings_lib.GUIDANCE_RAMPS:
    assert scales(ramp)[-1] == 3.0 and scales(ramp, length=1).shape == (1,)


def test_a_ramp_that_starts_elsewhere_needs_the_second_pass():
  unguided = settings_lib.SamplingSettings(guidance_start=2.0)
  assert not unguided.guided
  assert not unguided.replace(guidance_start=1, guidance_ramp='linear').guided
  assert unguided.replace(guidance_ramp='linear').guided


def test_thresholds_of_one_skip_nothing():
  settings = settings_lib.SamplingSettings(exit_threshold=0.5, guidance_skip_threshold=0.25)
  assert settings_lib.SamplingSettings().thresholds == (None, None)
  assert settings.thresholds == (0.5, None)  # Without guidance there is no pass to skip.
  assert settings.replace(guidance_scale=2, exit_threshold=1).thresholds == (None, 0.25)


def test_whole_numbers():
  assert settings_lib.whole_number('n', np.int64(3), 1) == 3
  for value in (0, 5, 1.5, 'x', None, True):
    with pytest.raises(UserError, match='^n='):
      settings_lib.whole_number('n', value, 1, 4)

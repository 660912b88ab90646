"""Tests that messages name invalid settings."""

import numpy as np
import pytest

from parti_jax.core.errors import UserError
from parti_jax.exported_model import sampling_settings


@pytest.mark.parametrize(
  'name, value',
  [
    ('guidance_scale', -1.0),
    ('guidance_scale', 'strong'),
    ('temperature', -0.1),
    ('temperature', float('nan')),
    ('top_k', -1),
    ('top_k', 2.5),
    ('top_p', 0.0),
    ('top_p', 1.1),
    ('top_p', float('inf')),
    ('guidance_start', -1),
    ('guidance_ramp', 'steep'),
    ('exit_threshold', 1.1),
    ('guidance_skip_threshold', -0.1),
    ('speculative_window', -1),
    ('speculative_window', 2.5),
    ('speculative_drafts', 'below'),
    ('speculative_rule', 'always'),
  ],
)
def test_bad_values_are_named(name, value):
  with pytest.raises(UserError, match=f'^{name}='):
    sampling_settings.SamplingSettings(**{name: value})


def test_replace_keeps_what_is_none():
  settings = sampling_settings.SamplingSettings(guidance_scale=3.0, top_k=7)
  changed = settings.replace(guidance_scale=None, temperature=0, top_p=np.float32(0.5))
  assert changed == sampling_settings.SamplingSettings(3.0, 0.0, 7, 0.5)


def test_which_passes_a_setting_needs():
  plain = sampling_settings.SamplingSettings()
  assert not (plain.guided or plain.greedy or plain.filtered)
  assert plain.replace(guidance_scale=1.1).guided
  assert plain.replace(temperature=0).greedy
  assert plain.replace(top_k=5).filtered and plain.replace(top_p=0.9).filtered


def test_ramps_of_guidance():
  settings = sampling_settings.SamplingSettings(guidance_scale=3.0, guidance_start=2.0)
  scales = lambda ramp, length=5: settings.replace(guidance_ramp=ramp).guidance_scales(length)
  assert settings.guidance_scales(5).tolist() == [3.0] * 5
  assert scales('linear').tolist() == [2.0, 2.25, 2.5, 2.75, 3.0]
  np.testing.assert_allclose(scales('cosine'), [2, 2.1464466, 2.5, 2.8535534, 3], rtol=1e-6)
  assert scales('linear').dtype == np.float32
  for ramp in sampling_settings.GUIDANCE_RAMPS:
    assert scales(ramp)[-1] == 3.0 and scales(ramp, length=1).shape == (1,)


def test_a_ramp_that_starts_elsewhere_needs_the_second_pass():
  unguided = sampling_settings.SamplingSettings(guidance_start=2.0)
  assert not unguided.guided
  assert not unguided.replace(guidance_start=1, guidance_ramp='linear').guided
  assert unguided.replace(guidance_ramp='linear').guided


def test_thresholds_of_one_skip_nothing():
  settings = sampling_settings.SamplingSettings(exit_threshold=0.5, guidance_skip_threshold=0.25)
  assert sampling_settings.SamplingSettings().thresholds == (None, None)
  assert settings.thresholds == (0.5, None)  # Without guidance there is no pass to skip.
  assert settings.replace(guidance_scale=2, exit_threshold=1).thresholds == (None, 0.25)


@pytest.mark.parametrize(
  'name, value',
  [
    ('guidance_scale', 1e39),
    ('guidance_scale', 1e300),
    ('guidance_scale', 1e38),
    ('guidance_start', 1e30),
    ('temperature', 1e39),
    ('temperature', '0.5'),
    ('top_p', True),
    ('top_k', 2.0),
    ('top_k', 1e300),
    ('top_k', True),
    ('guidance_ramp', ['linear']),
    ('guidance_ramp', None),
    ('exit_threshold', float('nan')),
    ('top_p', 10**400),
    ('guidance_scale', np.array([2.0])),
    ('temperature', None),
  ],
)
def test_values_that_no_device_can_compute_with(name, value):
  with pytest.raises(UserError, match=f'^{name}=') as caught:
    sampling_settings.SamplingSettings(**{name: value})
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  'temperature, greedy',
  [
    (0, True),
    (-0.0, True),
    (5e-324, True),
    (1e-46, True),
    (1e-39, True),
    (1e-37, True),
    (1e-19, False),
    (0.01, False),
    (3e38, False),
  ],
)
def test_tiny_temperatures_are_greedy(temperature, greedy):
  settings = sampling_settings.SamplingSettings(temperature=temperature, guidance_scale=1e6)
  assert settings.greedy == greedy
  if not greedy:
    scale, temperature, *_ = settings.arrays(1)
    with np.errstate(all='raise'):  # Guided logits stay finite in float32.
      assert np.isfinite(scale * np.float32(1e10) / temperature)


def test_small_shares_of_the_probability_stay_above_zero():
  for top_p in (5e-324, 1e-46, 1e-39, 1e-37, 0.5):
    settings = sampling_settings.SamplingSettings(top_p=top_p)
    as_float32 = settings.arrays(1)[3]
    assert settings.filtered and as_float32.dtype == np.float32
    assert as_float32 >= np.finfo(np.float32).tiny


@pytest.mark.parametrize('top_k', [2**31 - 1, 2**31, 3_000_000_000, 2**40, 10**400])
def test_a_large_top_k_does_not_limit(top_k):
  settings = sampling_settings.SamplingSettings(top_k=top_k)
  assert settings.top_k == 2**31 - 1
  assert settings.arrays(1)[2] == 2**31 - 1 and settings.arrays(1)[2].dtype == np.int32


def test_numbers_that_float32_rounds_to_one_are_one():
  near = 1 + 1e-9
  assert not sampling_settings.SamplingSettings(guidance_scale=near).guided
  assert not sampling_settings.SamplingSettings(guidance_start=near, guidance_ramp='linear').guided
  assert sampling_settings.SamplingSettings(exit_threshold=1 - 1e-9).thresholds == (None, None)

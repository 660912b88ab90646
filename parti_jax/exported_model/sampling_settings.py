"""Defines and checks the settings of sampling."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float32

from parti_jax.core import checks
from parti_jax.core.errors import UserError

# Name of a ramp -> function of the positions [length], from 0 (the first) to 1 (the last), that
# returns the interpolation weights between `guidance_start` (0) and `guidance_scale` (1).
GUIDANCE_RAMPS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
  'constant': np.ones_like,
  'linear': lambda way: way,
  'cosine': lambda way: (1 - np.cos(np.pi * way)) / 2,
}

# How speculative decoding drafts tokens at positions that no pass has computed yet, and how it
# accepts drafts.
SPECULATIVE_DRAFTS = ('left', 'above', 'sample', 'random')
SPECULATIVE_RULES = ('ratio', 'equal')

# How a loaded model holds the weights of its decoder.
WEIGHTS = ('float', 'int8')
# How sampling holds the keys and values of the text and of earlier image tokens.
CACHES = ('float', 'int8')

LARGEST_SEED = 2**32 - 1
# Within these bounds, guided logits of up to 1e12 stay finite in float32 after division by the
# temperature. A lower temperature samples the same tokens as 0: the noise spans at most 22.
MOST_GUIDANCE = 1e6
_LEAST_TEMPERATURE = 1e-20
# Smaller numbers are 0 on devices without subnormal numbers.
_LEAST_FLOAT32 = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
  """Settings for sampling image tokens from logits.

  Attributes:
    guidance_scale: weight of classifier-free guidance, logits = uncond + scale · (cond − uncond)
      (Parti, section 2.4). 1 is plain conditional sampling and costs half; the maximum is
      MOST_GUIDANCE.
    temperature: divides the logits. 0, or a value too small for float32, selects the likeliest
      token.
    top_k: sample only from this many of the likeliest tokens; 0 disables the limit. Values beyond
      int32 are clipped to its maximum.
    top_p: sample only from the likeliest tokens that together have this probability; 1 disables
      the limit. It applies to the tokens that `top_k` leaves.
    guidance_ramp: how the scale reaches `guidance_scale` over the positions of an image, a name in
      GUIDANCE_RAMPS. 'constant' uses it from the first token on. 'linear' grows evenly from
      `guidance_start` at the first token to `guidance_scale` at the last, as Muse does over its
      steps (arXiv 2301.00704, section 2.7: early tokens are sampled freely, later ones follow the
      prompt). 'cosine' does so with a slow start and end.
    guidance_start: the scale at the first token of a ramp.
    exit_threshold: confidence of a decoder layer in a token above which the remaining layers are
      skipped, as `adaptive.sample_tokens` describes; 1 never skips any.
    guidance_skip_threshold: confidence of the prediction with text above which guidance's pass
      without text is skipped; 1 never skips it.
    speculative_window: number of drafted tokens that a pass of the decoder checks, as
      `speculative.sample_tokens` describes. 0 samples one token after the other. Values beyond the
      number of image tokens act like that number.
    speculative_drafts: what the draft at a new position is, a name in SPECULATIVE_DRAFTS. 'left'
      and 'above' repeat the nearest known token in the row or in the column; 'sample' samples from
      the distribution of the last known position; 'random' samples from all codes alike.
    speculative_rule: when a draft is accepted, a name in SPECULATIVE_RULES. 'ratio' accepts as many
      as possible without changing the distribution of the pictures. 'equal' accepts the token that
      sampling one after the other would take, so that a seed also gives the same pictures.

  Raises:
    UserError: if a value is invalid; the message names it.
  """

  guidance_scale: float = 1.0
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0
  guidance_ramp: str = 'constant'
  guidance_start: float = 1.0
  exit_threshold: float = 1.0
  guidance_skip_threshold: float = 1.0
  speculative_window: int = 0
  speculative_drafts: str = 'left'
  speculative_rule: str = 'ratio'

  def __post_init__(self):
    checks.check_fields(self)
    for name in ('guidance_scale', 'guidance_start'):
      if getattr(self, name) < 0:
        raise UserError(
          f'{name}={getattr(self, name):g} is negative; 1 disables guidance, and '
          'larger values follow the prompt more closely'
        )
      checks.number(name, getattr(self, name), 0, MOST_GUIDANCE)
    for name in ('exit_threshold', 'guidance_skip_threshold'):
      if not 0 <= getattr(self, name) <= 1:
        raise UserError(
          f'{name}={getattr(self, name):g} must be between 0 and 1; 1 skips nothing, lower values '
          'skip more'
        )
    for name, known in (
      ('guidance_ramp', GUIDANCE_RAMPS),
      ('speculative_drafts', SPECULATIVE_DRAFTS),
      ('speculative_rule', SPECULATIVE_RULES),
    ):
      if getattr(self, name) not in known:
        raise UserError(
          f'{name}={checks.shown(getattr(self, name))} is not one of {", ".join(known)}'
        )
    if self.temperature < 0:
      raise UserError(
        f'temperature={self.temperature:g} is negative; 0 selects the likeliest '
        'token, 1 samples from the learned distribution'
      )
    checks.whole_number('top_k', self.top_k, 0)
    checks.whole_number('speculative_window', self.speculative_window, 0)
    object.__setattr__(self, 'top_k', min(self.top_k, checks.LARGEST_INT32))
    if not 0 < self.top_p <= 1:
      raise UserError(f'top_p={self.top_p:g} must be above 0 and at most 1; 1 disables the limit')

  @property
  def guided(self) -> bool:
    """Whether a second pass without text is needed."""
    ramped = self.guidance_ramp != 'constant' and np.float32(self.guidance_start) != 1
    return bool(np.float32(self.guidance_scale) != 1 or ramped)

  @property
  def greedy(self) -> bool:
    """Whether to select the likeliest token instead of sampling."""
    return self.temperature < _LEAST_TEMPERATURE

  @property
  def filtered(self) -> bool:
    """Whether `top_k` or `top_p` excludes tokens."""
    return self.top_k > 0 or self.top_p < 1.0

  @property
  def thresholds(self) -> tuple[np.float32 | None, np.float32 | None]:
    """The thresholds of early exit and of skipping guidance's pass; None if nothing is skipped."""
    skip = self.guidance_skip_threshold if self.guided else 1.0
    exit_threshold, skip_threshold = (
      None if np.float32(threshold) == 1 else np.float32(threshold)
      for threshold in (self.exit_threshold, skip)
    )
    return exit_threshold, skip_threshold

  @property
  def skipping(self) -> tuple[str, int] | None:
    """The first setting in use that skips layers or passes or is speculative, and its value for off."""
    exit_threshold, skip_threshold = self.thresholds
    for name, is_off, off in (
      ('exit_threshold', exit_threshold is None, 1),
      ('guidance_skip_threshold', skip_threshold is None, 1),
      ('speculative_window', self.speculative_window == 0, 0),
    ):
      if not is_off:
        return name, off
    return None

  def arrays(
    self, length: int
  ) -> tuple[Float32[np.ndarray, '{length}'], np.float32, np.int32, np.float32]:
    """Returns the arrays that the decoding loop takes.

    Args:
      length: number of image tokens of a picture.

    Returns:
      `guidance_scales(length)`, temperature, top_k and top_p.
    """
    return (
      self.guidance_scales(length),
      np.float32(self.temperature),
      np.int32(self.top_k),
      np.float32(max(self.top_p, _LEAST_FLOAT32)),
    )

  def guidance_scales(self, length: int) -> Float32[np.ndarray, '{length}']:
    """Returns the guidance weight at each of `length` positions."""
    share = GUIDANCE_RAMPS[self.guidance_ramp](np.linspace(0.0, 1.0, length))
    scales = (1 - share) * self.guidance_start + share * self.guidance_scale
    return scales.astype(np.float32)

  def replace(self, **values) -> SamplingSettings:
    """Returns a copy of these settings with the given values that aren't None.

    Raises:
      UserError: if a name is unknown or a value is invalid; the message names it.
    """
    known = [field.name for field in dataclasses.fields(self)]
    for name in values:
      if name not in known:
        raise UserError(f'unknown setting {name!r}; the settings are {", ".join(known)}')
    chosen = {name: value for name, value in values.items() if value is not None}
    return dataclasses.replace(self, **chosen)


def check_weights(weights: str) -> str:
  """Returns a name in WEIGHTS; raises UserError if it is none."""
  return _one_of('weights', weights, WEIGHTS)


def check_cache(cache: str) -> str:
  """Returns a name in CACHES; raises UserError if it is none."""
  return _one_of('cache', cache, CACHES)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> str:
  if value not in known:
    raise UserError(f'{name}={checks.shown(value)} is not one of {", ".join(known)}')
  return value

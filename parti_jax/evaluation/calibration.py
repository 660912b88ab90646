"""Chooses a threshold that keeps a loss within a tolerance, and bounds the probability of an error.

This calibrates early exit as in CALM (arXiv 2207.07061, section 4), by Learn then Test
(Angelopoulos et al., arXiv 2110.01052) with fixed-sequence testing. Candidate thresholds are tried
in order, beginning with the most conservative. For each, the hypothesis "the expected loss is above
the tolerance" is tested at level `risk`. The first one that can't be rejected ends the search, and
the last rejected one is the result. The probability that its expected loss is above the tolerance
is at most `risk`, regardless of the number of thresholds tried.

CALM tests with the Hoeffding-Bentkus inequality, which leaves almost no gain for a hundred prompts.
This module uses the betting p-value of Waudby-Smith and Ramdas (arXiv 2010.09686, section 4.2). It
is equally valid for any number of prompts, and much tighter if losses vary little, as they do when
most pictures are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Float

# Largest bet, relative to the bet that could lose all capital; the authors use 1/2 or 3/4.
_TRUNCATION = 0.75


def p_value(
  losses: Float[np.ndarray, 'losses'],
  tolerance: float,
  low: float = -1.0,
  high: float = 1.0,
  risk: float = 0.05,
) -> float:
  """Returns the probability of losses this low if their expectation were above the tolerance.

  Args:
    losses: independent draws in [low, high], in an order that doesn't depend on them.
    tolerance: the expectation under the hypothesis.
    low: smallest possible loss.
    high: largest possible loss.
    risk: level that the bets are tuned for; the p-value is valid at any level.

  Returns:
    A number in (0, 1].

  Raises:
    ValueError: if a loss is out of bounds.
  """
  losses = np.asarray(losses, np.float64)
  if losses.size and (losses.min() < low or losses.max() > high):
    raise ValueError(f'losses from {losses.min()} to {losses.max()} are not in [{low}, {high}]')
  values, mean = (losses - low) / (high - low), (tolerance - low) / (high - low)
  if mean >= 1:
    return 0.0
  if mean <= 0:
    return 1.0
  # The regularized mean and variance of the draws before each draw determine its bet.
  counts = np.arange(1, len(values) + 1)
  means = (0.5 + np.cumsum(values)) / (counts + 1)
  variances = (0.25 + np.cumsum(np.square(values - means))) / (counts + 1)
  before = np.concatenate([[0.25], variances[:-1]])
  bets = np.sqrt(2 * np.log(1 / risk) / (len(values) * before))
  bets = np.minimum(bets, _TRUNCATION / (1 - mean))
  capital = np.cumsum(np.log1p(bets * (mean - values)))
  return float(min(1.0, np.exp(-capital.max(initial=0.0))))


def fixed_sequence(
  thresholds: Iterable[float], measure: Callable[[float], dict[str, Any]], risk: float
) -> tuple[float | None, list[dict[str, Any]]]:
  """Tries thresholds in the given order until one fails.

  Args:
    thresholds: the most conservative first; must be fixed before any is measured.
    measure: threshold -> a row of the table, which contains 'p_value'.
    risk: level of each test, and of the whole procedure.

  Returns:
    The last threshold that passed its test, None if the first one failed, and the rows of all
    that were tried.
  """
  found, rows = None, []
  for threshold in thresholds:
    rows.append(measure(threshold))
    if rows[-1]['p_value'] > risk:
      break
    found = threshold
  return found, rows

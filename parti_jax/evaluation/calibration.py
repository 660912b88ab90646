"""Which threshold keeps a loss within a tolerance, with a bound on the chance of being wrong.

Calibration of early exit as in CALM (arXiv 2207.07061, section 4): Learn then Test (Angelopoulos et
al., arXiv 2110.01052) with fixed-sequence testing. Candidate thresholds are tried from the most
careful one down. For each the hypothesis "the expected loss is above the tolerance" is tested at
level `risk`; the first one that can't be rejected ends the search, and the last rejected one is the
result. The chance that its expected loss is above the tolerance is at most `risk`, however many
thresholds were tried.

CALM tests with the Hoeffding-Bentkus inequality, which for a hundred prompts leaves almost nothing
to gain. Here the p-value is the betting one of Waudby-Smith and Ramdas (arXiv 2010.09686, section
4.2), which is as valid for any number of prompts and much tighter where losses vary little, as they
do when most pictures come out as they were.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Iterable
from typing import Any

import numpy as np

# The most that is bet, as a share of what can't be lost; 1/2 or 3/4 are the authors' choices.
_TRUNCATION = 0.75


def p_value(
  losses: np.ndarray, tolerance: float, low: float = -1.0, high: float = 1.0, risk: float = 0.05
) -> float:
  """Probability of losses as low as these, if their expectation were above the tolerance.

  Args:
    losses: float [n], independent draws in [low, high], in an order that does not depend on them.
    tolerance: the expectation of the hypothesis.
    low: least value that a loss can have.
    high: greatest value.
    risk: level that the bets are tuned for; the p-value is valid for every level.

  Returns:
    A number in (0, 1].

  Raises:
    ValueError: if a loss lies outside of its bounds.
  """
  losses = np.asarray(losses, np.float64)
  if losses.size and (losses.min() < low or losses.max() > high):
    raise ValueError(f'losses from {losses.min()} to {losses.max()} are not in [{low}, {high}]')
  values, mean = (losses - low) / (high - low), (tolerance - low) / (high - low)
  if mean >= 1:
    return 0.0
  if mean <= 0:
    return 1.0
  # Of what came before each draw: the regularised mean and variance that the bet rests on.
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
  """Tries thresholds in the order given until one fails.

  Args:
    thresholds: the most careful one first; fixed before any is measured.
    measure: threshold -> a row of the table, with 'p_value' in it.
    risk: level of each test, and of the whole.

  Returns:
    The last threshold whose test passed, None if the first one failed already, and the rows of all
    that were tried.
  """
  found, rows = None, []
  for threshold in thresholds:
    rows.append(measure(threshold))
    if rows[-1]['p_value'] > risk:
      break
    found = threshold
  return found, rows

"""Interleaves the sources of a mixture according to their weights."""

from __future__ import annotations

import fractions
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence

import gin

from parti_jax.core.errors import UserError
from parti_jax.data import sources as sources_lib

TOKEN_CACHE = 'token_cache'


def is_token_cache(name: str) -> bool:
  """Returns whether a name means a token cache: 'token_cache', optionally with a suffix."""
  return re.fullmatch(rf'{TOKEN_CACHE}(_\w+)?', name) is not None


@gin.configurable('mixture')
def weights(sources: Mapping[str, float] | None = None) -> dict[str, fractions.Fraction]:
  """Returns the sources of a mixture and their normalized weights.

  Args:
    sources: {name of a source or 'token_cache', optionally with a suffix: weight}; only ratios
      matter.

  Returns:
    {name: share of the examples}, sorted by name; the shares sum to 1.

  Raises:
    UserError: there are no sources, one is unknown, or a weight isn't positive.
  """
  if not isinstance(sources, Mapping) or not sources:
    raise UserError(
      'mixture.sources is not set; give '
      "--gin.mixture.sources=\"{'webdataset_a': 0.7, 'folder_b': 0.3}\""
    )
  for name, weight in sources.items():
    known = (
      isinstance(name, str)
      and re.fullmatch(r'\w+', name)
      and (is_token_cache(name) or sources_lib.kind(name))
    )
    if not known:
      raise UserError(
        f'mixture.sources: unknown source {name!r}; choose from '
        f'{", ".join(sources_lib.NAMES)} and {TOKEN_CACHE}, optionally with a suffix '
        'of letters, digits and _, such as folder_b'
      )
    if type(weight) not in (int, float) or not 0 < weight < float('inf'):
      raise UserError(f'mixture.sources: the weight {weight!r} of {name} must be a positive number')
  # Exact decimals as written, so that 0.7 and 0.3 are 7/10 and 3/10.
  exact = {name: fractions.Fraction(repr(weight)) for name, weight in sorted(sources.items())}
  total = sum(exact.values())
  return {name: weight / total for name, weight in exact.items()}


class Turns:
  """Schedules sources so that each has its share of the examples over any stretch.

  After n examples, each of k sources with share w has supplied between w·n - d and w·n + d of
  them, where d = 1 - 1 / (2k - 2), or 0 for a single source. No order has a smaller bound for all
  shares. So of any n successive examples it supplies w·n to within 2d, which is less than two.

  This is the rule of R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics, 1980):
  among the sources that are behind by at least 1 - d, choose the one that would first be behind by
  more than d.

  Args:
    shares: shares of the sources; they sum to 1.
    taken: examples of each source so far; None for none.

  Attributes:
    taken: examples of each source so far.
  """

  def __init__(self, shares: Sequence[fractions.Fraction], taken: Sequence[int] | None = None):
    self._whole = math.lcm(*(share.denominator for share in shares))
    self._parts = [share.numerator * (self._whole // share.denominator) for share in shares]
    self._slack = 2 * len(shares) - 2
    self.taken = [0] * len(shares) if taken is None else list(taken)
    self._total = sum(self.taken)
    self._bounds = [self._bound(source) for source in range(len(shares))]

  def copy(self) -> Turns:
    """Returns an independent copy."""
    other = object.__new__(Turns)
    other.__dict__.update(self.__dict__, taken=list(self.taken), _bounds=list(self._bounds))
    return other

  def next(self) -> int:
    """Returns the next source, and counts its example as taken."""
    self._total += 1
    source = 0
    if self._slack:
      source = min(
        (last, source) for source, (first, last) in enumerate(self._bounds) if first <= self._total
      )[1]
    self.taken[source] += 1
    self._bounds[source] = self._bound(source)
    return source

  def _bound(self, source: int) -> tuple[int, int]:
    """Returns the first and the last turn allowed for the source's next example."""
    slack, part, taken = self._slack, self._parts[source], self.taken[source]
    if not slack:
      return 0, 0
    return (
      -(-(slack * taken + 1) * self._whole // (slack * part)),
      (slack * taken + slack - 1) * self._whole // (slack * part) + 1,
    )

"""How the sources of a mixture follow one another: their weights, and whose turn it is."""

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
  """Whether a name means a token cache: 'token_cache', or the same with an ending."""
  return re.fullmatch(rf'{TOKEN_CACHE}(_\w+)?', name) is not None


@gin.configurable('mixture')
def weights(sources: Mapping[str, float] | None = None) -> dict[str, fractions.Fraction]:
  """The sources of a mixture and their weights.

  Args:
    sources: {name of a source or 'token_cache', perhaps with an ending: weight}; only ratios count.

  Returns:
    {name: share of the examples} in the order of the names; the shares sum to 1.

  Raises:
    UserError: there are none, one is unknown, or a weight is not above 0.
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
        f'mixture.sources: there is no source {name!r}; there are '
        f'{", ".join(sources_lib.NAMES)} and {TOKEN_CACHE}, each perhaps with an ending '
        'of letters, digits and _: folder_b'
      )
    if type(weight) not in (int, float) or not 0 < weight < float('inf'):
      raise UserError(f'mixture.sources: the weight {weight!r} of {name} must be a number above 0')
  # The decimal numbers that were written, so that 0.7 and 0.3 are 7 of 10 and 3 of 10.
  exact = {name: fractions.Fraction(repr(weight)) for name, weight in sorted(sources.items())}
  total = sum(exact.values())
  return {name: weight / total for name, weight in exact.items()}


class Turns:
  """Whose turn it is, so that each source has its share of the examples over any stretch.

  After n examples, each of k sources with the share w has given between w·n - d and w·n + d of
  them, where d = 1 - 1 / (2k - 2), or 0 for a single one. No order has a smaller bound for all
  shares. So of any n successive examples it gives w·n to within 2d, which is less than two.

  It is the rule of R. Tijdeman, "The chairman assignment problem" (Discrete Mathematics, 1980): of
  the sources that are behind by at least 1 - d, the one comes next that would first be behind by
  more than d.

  Args:
    shares: of the sources; they sum to 1.
    taken: examples of each so far; None for none.

  Attributes:
    taken: the same, up to now.
  """

  def __init__(self, shares: Sequence[fractions.Fraction], taken: Sequence[int] | None = None):
    self._whole = math.lcm(*(share.denominator for share in shares))
    self._parts = [share.numerator * (self._whole // share.denominator) for share in shares]
    self._slack = 2 * len(shares) - 2
    self.taken = [0] * len(shares) if taken is None else list(taken)
    self._total = sum(self.taken)
    self._bounds = [self._bound(source) for source in range(len(shares))]

  def copy(self) -> Turns:
    """Returns the same, which goes on by itself."""
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
    """The first and the last turn that the source's next example may have."""
    slack, part, taken = self._slack, self._parts[source], self.taken[source]
    if not slack:
      return 0, 0
    return (
      -(-(slack * taken + 1) * self._whole // (slack * part)),
      (slack * taken + slack - 1) * self._whole // (slack * part) + 1,
    )

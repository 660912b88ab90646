"""What a run is trained with: the vocabulary of its texts and the tokenizer of its image tokens."""

from __future__ import annotations

from collections.abc import Mapping

from parti_jax.core import errors
from parti_jax.core import fingerprints

_REMEDIES = {
  'vocabulary': 'set vocabulary.path to the one that it was trained with',
  'tokenizer': 'set token_cache.path, or {objective}.tokenizer, to the one that it was trained with',
}


class Inputs:
  """The fingerprints of a run's vocabulary and tokenizer, and what they are compared with.

  Args:
    objective: what is trained.
    of_examples: {kind: fingerprint} of the training examples; None where one is not known.
    uses_tokenizer: whether the run uses the tokenizer that the objective names, if it names one, to
      train or to draw.
    allow_mismatch: whether what differs is warned of and not refused.

  Attributes:
    warnings: a line on each mismatch that was allowed.

  Raises:
    UserError: if the objective's tokenizer is not that of the examples' tokens, or can't be loaded.
  """

  def __init__(
    self,
    objective,
    of_examples: Mapping[str, fingerprints.Fingerprint | None],
    uses_tokenizer: bool,
    allow_mismatch: bool = False,
  ):
    self._objective, self._allow_mismatch = type(objective).__name__, allow_mismatch
    self.warnings: list[str] = []
    self._known = {kind: found for kind, found in of_examples.items() if found}
    if uses_tokenizer and objective.tokenizer is not None:
      own = fingerprints.named(
        f'{self._objective}.tokenizer={objective.tokenizer!r}',
        {'tokenizer': objective.frozen_tokenizer.fingerprint},
      )
      self._compare(
        self._known,
        own,
        {
          'tokenizer': f'set {self._objective}.tokenizer to the tokenizer of these tokens, or '
          '`parti-jax tokenize` the pictures with this one'
        },
      )
      self._known = own | self._known

  def state(self) -> dict[str, str | None]:
    """What a checkpoint keeps: {kind: digits}, None where it is not known."""
    return fingerprints.values(self._known)

  def check(self, name: str, made_with: Mapping, way_out: str):
    """Compares what the run goes on with.

    Args:
      name: of what was trained before, for messages.
      made_with: what it keeps, as of `state`; kinds that are missing or None are not known.
      way_out: what else the user can do.

    Raises:
      UserError: if it was trained with another vocabulary or tokenizer.
    """
    remedies = {
      kind: f'{text.format(objective=self._objective)}, {way_out}'
      for kind, text in _REMEDIES.items()
    }
    self._compare(fingerprints.named(name, made_with), self._known, remedies)

  def _compare(self, made_with, given, remedies):
    for line in fingerprints.mismatches(made_with, given, remedies):
      if not self._allow_mismatch:
        raise errors.UserError(f'{line}; if it is meant, set train.allow_mismatch=True')
      self.warnings.append(line)

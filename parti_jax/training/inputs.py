"""Checks that a run keeps its text vocabulary, image tokenizer and imported text encoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from parti_jax.core import errors
from parti_jax.core import fingerprints

_REMEDIES = {
  'vocabulary': 'set vocabulary.path to the one that it was trained with',
  'tokenizer': 'set token_cache.path, or {objective}.tokenizer, to the one that it was trained with',
  'text_encoder': 'set {objective}.text_encoder to the one that it was trained with',
  'base': 'set LoraObjective.base to the one that its adapters were trained on',
}


class Inputs:
  """The fingerprints of a run's vocabulary, tokenizer, imported text encoder and base.

  Args:
    objective: the objective of the run (`base.Objective`).
    of_examples: {kind: fingerprint} of the training examples; None for an unknown fingerprint.
    uses_tokenizer: whether the run uses the objective's tokenizer, if it has one, to train or to
      draw images.
    allow_mismatch: whether to warn of a mismatch rather than raise an error.

  Attributes:
    warnings: one line for each mismatch that was allowed.

  Raises:
    UserError: if the objective's tokenizer can't be loaded or didn't make the examples' tokens.
  """

  def __init__(
    self,
    objective: Any,
    of_examples: Mapping[str, fingerprints.Fingerprint | None],
    uses_tokenizer: bool,
    allow_mismatch: bool = False,
  ):
    self._objective, self._allow_mismatch = objective.gin_name, allow_mismatch
    self.warnings: list[str] = []
    self._known = {kind: found for kind, found in of_examples.items() if found}
    self._known |= objective.sources()
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
    """Returns what a checkpoint stores: {kind: digits}, or None for an unknown fingerprint."""
    return fingerprints.values(self._known)

  def check(self, name: str, made_with: Mapping[str, Any], way_out: str) -> None:
    """Compares the run's fingerprints with those of parameters that it resumes or starts from.

    Args:
      name: name of these parameters, for messages.
      made_with: the fingerprints stored with them, a result of `state`. Kinds that are missing or
        None are unknown.
      way_out: what else the user can do, for messages.

    Raises:
      UserError: if they were trained with another vocabulary or tokenizer.
    """
    remedies = {
      kind: f'{text.format(objective=self._objective)}, {way_out}'
      for kind, text in _REMEDIES.items()
    }
    self._compare(fingerprints.named(name, made_with), self._known, remedies)

  def _compare(
    self,
    made_with: Mapping[str, fingerprints.Fingerprint | None],
    given: Mapping[str, fingerprints.Fingerprint | None],
    remedies: Mapping[str, str],
  ) -> None:
    for line in fingerprints.mismatches(made_with, given, remedies):
      if not self._allow_mismatch:
        raise errors.UserError(f'{line}; if this is intended, set train.allow_mismatch=True')
      self.warnings.append(line)

"""What a stage says that carries nothing from step to step but parameters."""

from __future__ import annotations


class PlainStage:
  """A stage without statistics, whose `loss` says nothing besides metrics."""

  # What a loss computes over several examples, in words; with microbatches, over those of one.
  over_examples: tuple[str, ...] = ()

  def initial_statistics(self):
    """Nothing is carried besides parameters."""
    return {}

  def merge(self, aux):
    """Nothing is said besides metrics."""
    return aux

  def after_step(self, params, statistics, aux, step, rng):
    """Nothing to do after an update."""
    del aux, step, rng
    return params, statistics, {}

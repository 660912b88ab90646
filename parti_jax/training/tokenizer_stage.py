"""The name that t5x' gin files of earlier versions have for `objectives.tokenizer_objective`."""

from parti_jax.training.objectives.tokenizer_objective import TokenizerObjective as TokenizerStage

__all__ = ['TokenizerStage']

"""The old name of `objectives.tokenizer_objective`, for t5x gin files of earlier versions."""

from parti_jax.training.objectives.tokenizer_objective import TokenizerObjective as TokenizerStage

__all__ = ['TokenizerStage']

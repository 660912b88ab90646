"""What an objective says that carries nothing from step to step but parameters."""

from __future__ import annotations

import functools

from parti_jax.training.objectives import frozen_tokenizer as frozen_tokenizer_lib


class Objective:
  """An objective without statistics, whose `loss` says nothing besides metrics.

  Attributes:
    tokenizer: run or exported model of a trained image tokenizer that the objective uses; None for
      none.
  """

  tokenizer: str | None = None

  @functools.cached_property
  def frozen_tokenizer(self) -> frozen_tokenizer_lib.FrozenTokenizer:
    """The image tokenizer that `tokenizer` names, with numpy arrays.

    Raises:
      UserError: if it can't be loaded.
    """
    return frozen_tokenizer_lib.load_for(
      f'{type(self).__name__}.tokenizer', self.tokenizer, 'set it to None to do without'
    )

  @functools.cached_property
  def tokenizer_config(self):
    """The sizes of that tokenizer; those that gin gives as long as it is not trained, for plans."""
    return frozen_tokenizer_lib.sizes(self.tokenizer, lambda: self.frozen_tokenizer.config)

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

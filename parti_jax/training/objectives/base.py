"""The interface between an objective, which knows a network and its losses, and the trainer."""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any
from typing import Protocol

import jax
import numpy as np
import optax

from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.training import inputs as inputs_lib
from parti_jax.training.objectives import frozen_tokenizer as frozen_tokenizer_lib

# A tree of float32 arrays under the name of each part of the network, such as 'text_encoder'.
Params = Mapping[str, Any]
# Feature -> array [batch, ...].
Batch = Mapping[str, jax.Array]
# What is carried from step to step besides parameters: name -> array or tree of arrays.
Statistics = Mapping[str, Any]
# Draws pictures of a batch: (params, batch, the painter's own arrays) -> {name: uint8 [batch,
# height, width, 3]}. It comes with those arrays.
Painter = tuple[Callable[[Params, Batch, Any], dict[str, jax.Array]], Any]


class ModelConfig(Protocol):
  """What the trainer and `parti-jax plan` read of a network's sizes, a dataclass.

  Attributes:
    remat: name of the rematerialisation policy.
    compute_dtype: dtype of activations.
  """

  remat: str

  @property
  def compute_dtype(self) -> Any: ...


class Objective(abc.ABC):
  """What a run trains: a network, its losses, its measures and its pictures.

  The trainer, the training loop and `parti-jax plan` know an objective by these members alone.
  Members that are not abstract have defaults for objectives that do without. All methods that take
  arrays are traced by JAX, but for `summarize`.

  Attributes:
    model: the network's sizes.
    frozen: parts of the parameters that training leaves as they are.
    tokenizer: run or exported model of a trained image tokenizer that the objective uses; None for
      none.
    over_examples: what the loss computes over several examples, in words. With microbatches it is
      computed over those of one, and a run says so.
  """

  model: ModelConfig
  frozen: tuple[str, ...] = ()
  tokenizer: str | None = None
  over_examples: tuple[str, ...] = ()

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """The objective's name in checkpoints and journals, such as 'generator'."""

  @property
  def compute_dtype(self) -> Any:
    """The dtype that most of a step's FLOPs are of."""
    return self.model.compute_dtype

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
  def tokenizer_config(self) -> vit_vqgan.ViTVQGANConfig:
    """The sizes of that tokenizer; those that gin gives as long as it is not trained, for plans."""
    return frozen_tokenizer_lib.sizes(self.tokenizer, lambda: self.frozen_tokenizer.config)

  # The data.

  @abc.abstractmethod
  def feature_lengths(self) -> dict[str, int]:
    """Lengths of the task's features that the objective reads.

    Returns:
      'inputs' and 'targets' -> tokens, 'images' -> height and width in pixels.
    """

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Feature -> the gin key of the number of ids that the network knows, and that number."""
    return {}

  @abc.abstractmethod
  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes [batch_size, ...] and dtypes of a batch, as `loss` takes it."""

  # The parameters.

  @abc.abstractmethod
  def init(self, rng: jax.Array) -> Params:
    """Random parameters, boxed with their logical axis names.

    Args:
      rng: a key.
    """

  def initial_parts(self, abstract_params: Params, inputs: inputs_lib.Inputs) -> dict[str, Any]:
    """Parts of the parameters that a new run takes from other runs.

    Args:
      abstract_params: shapes, dtypes and shardings of the parameters.
      inputs: what the run is trained with.

    Returns:
      {name of a part: its parameters on the mesh}; the other parts are random.

    Raises:
      UserError: if a part is missing or does not fit.
    """
    del abstract_params, inputs
    return {}

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    """Optimizers of parts that the run's own does not train: {name of a part: its optimizer}."""
    return {}

  def constants(self) -> dict[str, Any]:
    """Arrays that are not trained and not in checkpoints, such as LPIPS' network.

    `loss` and `evaluate` find them among the parameters.

    Returns:
      {name: tree of arrays}; no name may be that of a part of the parameters.

    Raises:
      UserError: if a file of them is missing or damaged.
    """
    return {}

  def abstract_constants(self) -> dict[str, Any]:
    """Shapes and dtypes of `constants`, for plans: it must do without files that may be missing."""
    return {}

  # A step.

  @abc.abstractmethod
  def loss(
    self, params: Params, batch: Batch, dropout_keys: layers.DropoutKeys, step: jax.Array
  ) -> tuple[jax.Array, dict[str, Any]]:
    """The loss that is differentiated.

    Args:
      params: of `init`, unboxed, with `constants`.
      batch: see `abstract_batch`.
      dropout_keys: a key for each example, for whatever is random.
      step: int32 [], steps done before this one.

    Returns:
      float32 [], and a dict with 'metrics', {name: float32 []}, and whatever `after_step` needs.
      A metric 'loss' is shown in place of the value that is differentiated.
    """

  @abc.abstractmethod
  def weight(self, batch: Batch) -> jax.Array:
    """How much a batch counts in a mean over microbatches, float32 []."""

  def merge(self, aux: dict[str, Any]) -> dict[str, Any]:
    """Joins what `loss` returned besides metrics for the microbatches of a step.

    Microbatch k of n has the examples k, k + n, k + 2 · n ...

    Args:
      aux: that dict without 'metrics', each array [microbatches, ...].

    Returns:
      The same for the whole batch.
    """
    return aux

  def initial_statistics(self) -> Statistics:
    """Statistics before the first step. Under 'average' {name of a part: its running average}."""
    return {}

  def after_step(
    self,
    params: Params,
    statistics: Statistics,
    aux: dict[str, Any],
    step: jax.Array,
    rng: jax.Array,
  ) -> tuple[Params, Statistics, dict[str, jax.Array]]:
    """What happens after the optimizer's update.

    Args:
      params: after the update.
      statistics: of the step before.
      aux: of `loss`, or of `merge` with 'metrics'.
      step: int32 [], steps done before this one.
      rng: a key.

    Returns:
      Parameters, statistics and further metrics, {name: float32 []}.
    """
    del aux, step, rng
    return params, statistics, {}

  @abc.abstractmethod
  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step over a whole batch."""

  # Evaluation and pictures.

  @abc.abstractmethod
  def evaluate(self, params: Params, batch: Batch) -> dict[str, jax.Array]:
    """Measures of each example, without dropout.

    Args:
      params: as in `loss`.
      batch: as in `loss`.

    Returns:
      {name: [batch, ...]}.
    """

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Turns the measures of all examples, [examples, ...] each, into numbers; means by default."""
    return {name: float(values.mean()) for name, values in measures.items()}

  def painter(self) -> Painter | None:
    """A function that draws pictures of examples, and arrays that it needs; None for no pictures.

    Raises:
      UserError: if a file that it draws with is missing or damaged.
    """
    return None

"""The interface between the trainer and an objective, which is a network with its losses."""

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
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import Shaped
from jaxtyping import UInt8

from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.data import text_features
from parti_jax.data import text_tokenizer
from parti_jax.models import image_tokenizers
from parti_jax.models import text_encoders
from parti_jax.models.nn import layers
from parti_jax.training import inputs as inputs_lib
from parti_jax.training.objectives import frozen_tokenizer as frozen_tokenizer_lib

# {name of a part of the network, such as 'text_encoder': tree of float32 arrays}.
Params = dict[str, Any]
# {feature: array [batch, ...]}.
Batch = Mapping[str, Shaped[Array, 'batch ...']]
# State, other than parameters, that is carried between steps: {name: array or tree of arrays}.
Statistics = dict[str, Any]
# A function that draws images of a batch, and arrays that it needs. The function takes the
# parameters, the batch and these arrays, and returns {name: images}.
Painter = tuple[
  Callable[[Params, Batch, Any], dict[str, UInt8[Array, 'batch height width 3']]], Any
]


class ModelConfig(Protocol):
  """The fields of a network's config that the trainer and `parti-jax plan` read.

  A config is a dataclass.

  Attributes:
    remat: name of the rematerialization policy.
    compute_dtype: dtype of activations.
  """

  @property
  def remat(self) -> str: ...

  @property
  def compute_dtype(self) -> Any: ...


class Objective(abc.ABC):
  """Defines what a run trains: a network, its losses, its evaluation and its images.

  The trainer, the training loop and `parti-jax plan` only use these members of an objective. The
  members that aren't abstract have defaults. JAX traces all methods that take arrays, except for
  `summarize`.

  Attributes:
    model: the network's config.
    frozen: parts of the parameters that training doesn't change.
    tokenizer: run or exported model of a trained image tokenizer that the objective uses; None for
      none.
    lora: what checkpoints say about the adapters that are trained in place of the network
      (`LoraObjective`), as JSON; None if the network is trained.
  """

  model: ModelConfig
  frozen: tuple[str, ...] = ()
  tokenizer: str | None = None
  lora: dict[str, Any] | None = None

  @property
  @abc.abstractmethod
  def name(self) -> str:
    """The objective's name in checkpoints and journals, such as 'generator'.

    `parti-jax export --generator` and other commands that read a run take it by this name: a subclass
    that trains the same network keeps it. A run resumes with any objective that has the name and the
    config of its checkpoint, and says so if the class is another one.
    """

  @property
  def gin_name(self) -> str:
    """The name in gin of the class that has the settings, for messages."""
    return type(self).__name__

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    """Descriptions of the terms of the loss that depend on several examples, such as statistics.

    With microbatches they are computed over each microbatch, which a run reports.
    """
    return ()

  @property
  def compute_dtype(self) -> Any:
    """Dtype of the matrix products; selects the peak FLOP/s for the utilization."""
    return self.model.compute_dtype

  @functools.cached_property
  def frozen_tokenizer(self) -> frozen_tokenizer_lib.FrozenTokenizer:
    """The image tokenizer at the path `tokenizer`, with numpy arrays.

    Raises:
      UserError: if it can't be loaded.
    """
    assert self.tokenizer is not None
    return frozen_tokenizer_lib.load_for(
      f'{self.gin_name}.tokenizer', self.tokenizer, 'set it to None to do without'
    )

  @functools.cached_property
  def tokenizer_config(self) -> image_tokenizers.Config:
    """The config of `frozen_tokenizer`; for plans, gin's config if it isn't trained yet."""
    assert self.tokenizer is not None
    return frozen_tokenizer_lib.sizes(self.tokenizer, lambda: self.frozen_tokenizer.config)

  # The data.

  @abc.abstractmethod
  def feature_lengths(self) -> dict[str, Any]:
    """Returns the lengths of the task's features.

    Returns:
      {feature: length}, with exactly the features of the task: the number of tokens of 'inputs' and
      'targets', and the `image_sizes.ImageSize` of 'images'.
    """

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Returns {feature: (gin key of its vocabulary size, vocabulary size)}."""
    return {}

  def grid(self) -> tuple[str, tuple[int, int]] | None:
    """Returns (gin key of the grid of image tokens, the grid); None without 'targets'."""
    return None

  def check_vocabulary(self, vocabulary: text_tokenizer.TextTokenizer) -> None:
    """Checks that a vocabulary ends texts and pads them as the network expects.

    Raises:
      UserError: if it doesn't.
    """
    self._check_empty_text(vocabulary, None)

  def _check_empty_text(
    self,
    vocabulary: text_tokenizer.TextTokenizer,
    config: Any,
    check: Callable[[Any, Any, str], None] = text_encoders.check_empty_text,
  ) -> None:
    if length := self.feature_lengths().get('inputs'):
      ids, _ = vocabulary.encode('', max(length, 3))
      check(config, ids, f'vocabulary.path={vocabulary.path!r}')

  def with_text_features(self, found: text_features.TextFeatures | None) -> Objective:
    """Returns the objective for examples with text features, or without any.

    Args:
      found: what the token cache says about them; None without text features.

    Raises:
      UserError: if the objective needs other text features, or doesn't use any.
    """
    if found is not None:
      raise errors.UserError(
        f'{found.name} has text features, which {type(self).__name__} does not use; set '
        'token_cache.text_features=False'
      )
    return self

  def check_text_features(self, params: Params, found: text_features.TextFeatures) -> None:
    """Checks that text features are those of the text encoder in the parameters of a run.

    Args:
      params: the parameters, on the mesh.
      found: the argument of `with_text_features`.

    Raises:
      UserError: if they are of another text encoder.
    """
    del params, found

  @abc.abstractmethod
  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of a batch of `loss`.

    A task's features become these keys of a batch:

    | feature | keys |
    |---|---|
    | 'inputs' | 'encoder_input_tokens' int32 [batch, text_length] |
    | 'images' | 'images' uint8 [batch, height, width, 3] |
    | 'targets' | 'decoder_target_tokens' int32 [batch, image_length] |
    | | 'decoder_loss_weights' float32 [batch, image_length] |

    If `with_text_features` accepts text features, there is also 'text_features' [batch, text_length,
    width].
    """

  # The parameters.

  @abc.abstractmethod
  def init(self, rng: PRNGKeyArray) -> Params:
    """Returns random parameters, boxed with their logical axis names."""

  def sources(self) -> dict[str, fingerprints.Fingerprint]:
    """Returns {kind: fingerprint} of the imported parts that a new run starts with, if known."""
    return {}

  def initial_parts(self, abstract_params: Params, inputs: inputs_lib.Inputs) -> dict[str, Any]:
    """Reads the parts of the parameters that a new run takes from other runs.

    Args:
      abstract_params: shapes, dtypes and shardings of the parameters.
      inputs: fingerprints of the run's vocabulary and tokenizer.

    Returns:
      {name of a part: its parameters on the mesh}; the other parts start from random parameters.

    Raises:
      UserError: if a part is missing or doesn't fit.
    """
    del abstract_params, inputs
    return {}

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    """Returns {name of a part: its optimizer} for parts that the run's own doesn't train."""
    return {}

  def constants(self) -> dict[str, Any]:
    """Reads arrays that are neither trained nor in checkpoints, such as the network of LPIPS.

    `loss`, `evaluate` and the function of `painter` get them among the parameters.

    Returns:
      {name: tree of arrays}, which may be lazily read ones. The names must differ from those of the
      parts of the parameters.

    Raises:
      UserError: if one of their files is missing or damaged.
    """
    return {}

  def abstract_constants(self) -> dict[str, Any]:
    """Returns shapes and dtypes of `constants`. Plans need it to work without their files.

    Those that are boxed with logical axis names are split over the mesh like parameters.
    """
    return {}

  # A step.

  @abc.abstractmethod
  def loss(
    self,
    params: Params,
    batch: Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """Computes the loss to differentiate.

    Args:
      params: the unboxed parameters, and `constants`.
      batch: arrays with the shapes and dtypes of `abstract_batch`.
      dropout_keys: keys of the examples, for dropout and everything else that is random; None for
        no dropout.
      step: number of steps done before this one.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics', {name: float32 scalar}, and whatever `after_step` needs. A metric
        'loss' replaces `loss` in what a run reports.
    """

  @abc.abstractmethod
  def weight(self, batch: Batch) -> Float[Array, '']:
    """Returns the weight of a batch in a mean over microbatches."""

  def merge(self, aux: dict[str, Any]) -> dict[str, Any]:
    """Combines the auxiliary outputs of `loss` for the microbatches of a step.

    Microbatch k of n has the examples k, k + n, k + 2 · n ...

    Args:
      aux: the outputs without 'metrics', each array [microbatches, ...].

    Returns:
      The outputs for the whole batch.
    """
    return aux

  def initial_statistics(self) -> Statistics:
    """Returns the first statistics; 'average' has {name of a part: its moving average}, if any."""
    return {}

  def after_step(
    self,
    params: Params,
    statistics: Statistics,
    aux: dict[str, Any],
    step: Int[Array, ''],
    rng: PRNGKeyArray | None,
  ) -> tuple[Params, Statistics, dict[str, Float[Array, '']]]:
    """Updates the parameters and statistics after the optimizer's update.

    Args:
      params: the parameters after the update.
      statistics: the statistics of the previous step.
      aux: the auxiliary outputs of `loss` for the whole batch.
      step: number of steps done before this one.
      rng: a key; None if nothing is random.

    Returns:
      The parameters, the statistics and further metrics.
    """
    del aux, step, rng
    return params, statistics, {}

  @abc.abstractmethod
  def step_flops(self, batch_size: int) -> int:
    """Returns the model FLOPs of a training step over a whole batch."""

  # Evaluation and images.

  @abc.abstractmethod
  def evaluate(self, params: Params, batch: Batch) -> dict[str, Shaped[Array, 'batch ...']]:
    """Evaluates each example, without dropout.

    Args:
      params: the unboxed parameters, and `constants`.
      batch: arrays with the shapes and dtypes of `abstract_batch`.

    Returns:
      {name: one value or array per example}.
    """

  def summarize(
    self, measures: Mapping[str, Shaped[np.ndarray, 'examples ...']]
  ) -> dict[str, float]:
    """Summarizes the results of `evaluate` for all examples; by default returns their means."""
    return {name: float(values.mean()) for name, values in measures.items()}

  def painter(self) -> Painter | None:
    """Returns a function that draws images of a batch, and arrays that it needs.

    Returns:
      The function and the arrays; None if the objective doesn't draw images.

    Raises:
      UserError: if a file that the function needs is missing or damaged.
    """
    return None

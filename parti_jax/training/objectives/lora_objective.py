"""LoRA (arXiv 2106.09685): trains adapters of a network in place of the network, for any objective."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import Shaped

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import numerics
from parti_jax.data import text_features
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.models import config_checks
from parti_jax.models import image_tokenizers
from parti_jax.models import lora
from parti_jax.models.nn import layers
from parti_jax.training import inputs as inputs_lib
from parti_jax.training.objectives import base as base_lib
from parti_jax.training.objectives import frozen_tokenizer as frozen_tokenizer_lib

ADAPTERS = run_checkpoints.ADAPTERS
# Settings by which an objective takes parts of its network from elsewhere.
_OTHER_SOURCES = ('text_encoder', 'first_phase')


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class LoraObjective(base_lib.Objective):
  """Trains low-rank adapters of a network with the loss of another objective.

  The network is that of a model folder, the base. Its parameters are constants: they have neither
  gradients nor optimizer state and are not in checkpoints, which have the adapters and the fingerprint
  of the base. The loss sees W + (alpha / rank) · A · B in place of each adapted kernel W
  (`parti_jax.models.lora`). Parts that the base lacks, such as a discriminator, are trained as a whole.

  Attributes:
    objective: the objective with the loss and with the network's config, which must be the base's.
      The parts that it freezes get no adapters.
    base: a model folder, or a folder with the network alone, such as `parti-jax import` writes.
    rank: rank of the adapters. With 0 there are none, and the run only evaluates the base.
    alpha: A · B is multiplied by alpha / rank; above 0 unless the rank is 0.
    targets: patterns of names of the projections to adapt, such as 'attention/query',
      'cross_attention' or 'image_decoder/*/mlp'; `lora.select` says how they match. By default
      the queries and values of attention, as in the paper.

  Raises:
    UserError: if a value has the wrong type or is out of range, if a pattern matches nothing, or if
      the objective can't be used: it keeps an average of parameters, changes them itself, or takes
      some from elsewhere.
  """

  objective: base_lib.Objective
  base: str
  rank: int = 8
  alpha: float = 8.0
  targets: tuple[str, ...] = lora.TARGETS

  def __post_init__(self) -> None:
    inner = self.objective
    if not isinstance(inner, base_lib.Objective) or isinstance(inner, LoraObjective):
      raise errors.UserError(
        f'LoraObjective.objective={checks.shown(inner)} must be an objective that trains a network, '
        'such as @GeneratorObjective()'
      )
    config_checks.check_fields(self, rank=(0, config_checks.MAX_SIZE), alpha=(0, None))
    if self.rank and not self.alpha:
      raise errors.UserError(
        'LoraObjective.alpha=0 multiplies the adapters by 0, so that nothing would be trained; set it '
        'above 0, or LoraObjective.rank to 0 to evaluate the base'
      )
    if not self.base:
      raise errors.UserError('LoraObjective.base is empty; set it to a model folder')
    name = inner.gin_name
    if inner.name not in (*model_folder.REQUIRED, *model_folder.OPTIONAL):
      raise errors.UserError(
        f'LoraObjective.objective: {name} trains no network of a model folder; to adapt a text '
        "encoder, use GeneratorObjective with targets such as 'text_encoder/*/attention/query'"
      )
    if getattr(inner, 'ema', 0):
      raise errors.UserError(f'{name}.ema: adapters have no moving average; set it to 0')
    revived = getattr(inner, 'revive_every', 0)
    if revived and 'quantizer' not in inner.frozen:
      raise errors.UserError(
        f'{name}.revive_every={revived} would change the codebook of the base; set it to 0'
      )
    for field in _OTHER_SOURCES:
      if isinstance(source := getattr(inner, field, None), str):
        raise errors.UserError(
          f'{name}.{field}={source!r}: LoraObjective.base has these parameters; set it to None'
        )
    # The trainer reads them as attributes.
    for field, value in {
      'model': inner.model,
      'tokenizer': inner.tokenizer,
      'frozen': tuple(part for part in inner.frozen if part not in self._abstract_base),
      'lora': {
        'rank': self.rank,
        'alpha': self.alpha,
        'targets': list(self.targets),
        'base': self.base,
      },
    }.items():
      object.__setattr__(self, field, value)
    # Here, since patterns may be at fault, and networks can't be traced for shapes alone on a mesh.
    assert self._projections and self._whole is not None

  @property
  def name(self) -> str:
    return self.objective.name

  @property
  def gin_name(self) -> str:
    return self.objective.gin_name

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    return self.objective.batch_dependent_terms

  @property
  def compute_dtype(self) -> Any:
    return self.objective.compute_dtype

  @property
  def frozen_tokenizer(self) -> frozen_tokenizer_lib.FrozenTokenizer:
    return self.objective.frozen_tokenizer

  @property
  def tokenizer_config(self) -> image_tokenizers.Config:
    return self.objective.tokenizer_config

  @property
  def settings(self) -> lora.Settings:
    """Rank, alpha and targets."""
    return lora.Settings(self.rank, self.alpha, self.targets)

  # The data.

  def feature_lengths(self) -> dict[str, Any]:
    return self.objective.feature_lengths()

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    return self.objective.vocabulary_sizes()

  def grid(self) -> tuple[str, tuple[int, int]] | None:
    return self.objective.grid()

  def check_vocabulary(self, vocabulary: text_tokenizer.TextTokenizer) -> None:
    self.objective.check_vocabulary(vocabulary)

  def with_text_features(self, found: text_features.TextFeatures | None) -> LoraObjective:
    return dataclasses.replace(self, objective=self.objective.with_text_features(found))

  def check_text_features(self, params: base_lib.Params, found: text_features.TextFeatures) -> None:
    self.objective.check_text_features(params, found)

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return self.objective.abstract_batch(batch_size)

  # The parameters.

  @functools.cached_property
  def _abstract_base(self) -> dict[str, Any]:
    """Abstract parameters of the base, with their logical axis names."""
    config: Any = self.objective.model
    return model_folder.abstract(self.objective.name, config)

  @functools.cached_property
  def _projections(self) -> list[lora.Projection]:
    """The projections that get adapters."""
    trained = {
      name: part for name, part in self._abstract_base.items() if name not in self.objective.frozen
    }
    return lora.select(lora.projections(trained), self.targets, 'LoraObjective.targets')

  @functools.cached_property
  def _whole(self) -> tuple[str, ...]:
    """Names of the parts that the base lacks."""
    with layers.only_shapes():
      parts = jax.eval_shape(self.objective.init, numerics.key(0))
    return tuple(name for name in parts if name not in self._abstract_base)

  @functools.cached_property
  def _base(self) -> model_folder.Part:
    """The base, whose config is that of the objective."""
    key = f'LoraObjective.base={self.base!r}'
    part = run_checkpoints.read_network(self.objective.name, self.base, key)
    theirs = run_checkpoints.description(self.objective.name, part.config)
    run_checkpoints.check_same_model(key, theirs, run_checkpoints.describe(self.objective))
    return part

  @functools.cached_property
  def base_fingerprint(self) -> str:
    """The fingerprint of the base's parameters (`fingerprints.of_parameters`)."""
    return fingerprints.of_parameters(self._base.params)

  def init(self, rng: PRNGKeyArray) -> base_lib.Params:
    """Returns first adapters, and random parameters of the parts that the base lacks."""
    of_adapters, of_whole = jax.random.split(rng)
    adapters = {ADAPTERS: lora.init(of_adapters, self._projections, self.rank)}
    if not self._whole:
      return adapters
    whole = self.objective.init(of_whole)
    return adapters | {name: whole[name] for name in self._whole}

  def sources(self) -> dict[str, fingerprints.Fingerprint]:
    """Returns the fingerprints of the base and of the text encoder that it began with."""
    where = f'LoraObjective.base={self.base!r}'
    made_with = {'text_encoder': self._base.made_with.get('text_encoder')}
    return fingerprints.named(where, made_with | {fingerprints.BASE: self.base_fingerprint})

  def initial_parts(
    self, abstract_params: base_lib.Params, inputs: inputs_lib.Inputs
  ) -> dict[str, Any]:
    """Checks that the base was trained with the vocabulary and the tokenizer of the run."""
    del abstract_params
    inputs.check(
      f'LoraObjective.base={self.base!r}', self._base.made_with, 'or set another LoraObjective.base'
    )
    return {}

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    others = self.objective.other_optimizers()
    return {name: others[name] for name in others if name in self._whole}

  def constants(self) -> dict[str, Any]:
    """Reads the base, and the constants of the objective."""
    return self._base.params | self.objective.constants()

  def abstract_constants(self) -> dict[str, Any]:
    """Returns shapes, dtypes and logical axes of the base, and those of the objective's constants."""
    return self._abstract_base | self.objective.abstract_constants()

  def effective(self, params: base_lib.Params) -> base_lib.Params:
    """Returns the parameters of the network with its adapters, for the loss.

    Args:
      params: the adapters, the parts that are trained as a whole, and `constants`.
    """
    params = dict(params)
    adapters = params.pop(ADAPTERS, {})
    return lora.effective(params, adapters, self._projections, self.settings.scale)

  # A step.

  def loss(
    self,
    params: base_lib.Params,
    batch: base_lib.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The loss of the objective for the network with its adapters."""
    return self.objective.loss(self.effective(params), batch, dropout_keys, step)

  def weight(self, batch: base_lib.Batch) -> Float[Array, '']:
    return self.objective.weight(batch)

  def merge(self, aux: dict[str, Any]) -> dict[str, Any]:
    return self.objective.merge(aux)

  def initial_statistics(self) -> base_lib.Statistics:
    return self.objective.initial_statistics()

  def after_step(
    self,
    params: base_lib.Params,
    statistics: base_lib.Statistics,
    aux: dict[str, Any],
    step: Int[Array, ''],
    rng: PRNGKeyArray | None,
  ) -> tuple[base_lib.Params, base_lib.Statistics, dict[str, Float[Array, '']]]:
    return self.objective.after_step(params, statistics, aux, step, rng)

  def step_flops(self, batch_size: int) -> int:
    """Returns the model FLOPs of a step that trains the whole network, of which this is a part."""
    return self.objective.step_flops(batch_size)

  # Evaluation and images.

  def evaluate(
    self, params: base_lib.Params, batch: base_lib.Batch
  ) -> dict[str, Shaped[Array, 'batch ...']]:
    return self.objective.evaluate(self.effective(params), batch)

  def summarize(
    self, measures: Mapping[str, Shaped[np.ndarray, 'examples ...']]
  ) -> dict[str, float]:
    return self.objective.summarize(measures)

  def painter(self) -> base_lib.Painter | None:
    painter = self.objective.painter()
    if painter is None:
      return None
    draw, arrays = painter

    def draw_adapted(params: base_lib.Params, batch: base_lib.Batch, arrays: Any) -> Any:
      return draw(self.effective(params), batch, arrays)

    return draw_adapted, arrays

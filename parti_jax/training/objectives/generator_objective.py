"""The objective of Parti: predict the next image token from text and earlier tokens (section 3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray
from jaxtyping import UInt8

from parti_jax.core import checks
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.data import text_features as text_features_lib
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import config_checks
from parti_jax.models import flops
from parti_jax.models import generators
from parti_jax.models import image_tokenizers
from parti_jax.models import pixels
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_text_encoder
from parti_jax.training.objectives import initial_text_encoder

PARTS = ('text_encoder', 'image_decoder')


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class GeneratorObjective(base.Objective):
  """Cross entropy of image tokens, and samples for fixed prompts.

  Attributes:
    model: config of the text encoder and the image-token decoder.
    tokenizer: model_dir of the image tokenizer's run, to draw samples as images; None for no
      images.
    guidance_scale: guidance scale of the samples.
    depth_loss_weights: weight of each decoder layer's own prediction in the loss, for early exit
      when sampling (CALM, arXiv 2207.07061, section 3). All layers predict through the final layer
      norm and the same logits. The loss is the mean of theirs with these weights, normalized to sum
      to 1. CALM's weights grow with depth: (1, 2, 3, 4) for four layers. None for the last layer
      only.
    text_encoder: where the text encoder of a new run comes from: the model_dir of a run of
      TextEncoderObjective (Parti, section 2.2) or of a generator, or a folder that `parti-jax import
      text_encoder` wrote. None for a random text encoder.
    frozen: parts that training doesn't change, such as ('text_encoder',).
    text_features: dtype of the text features that batches have, in place of running the frozen text
      encoder; a name in `text_features.DTYPES`. None runs it. A run whose token cache has text
      features sets it; set it by hand to plan such a run.
    z_loss_weight: weight of the z-loss, the squared logarithm of the softmax's normalizer, which
      keeps logits from drifting (1e-4 in PaLM, arXiv 2204.02311, section 5); 0 for none. Parti has
      none.
    label_smoothing: share ε of the target distribution that is spread evenly over the codebook (arXiv
      1512.00567, section 7); 0 for none, as in Parti.
    ema: decay of the moving average of the parameters, which evaluation, images and exported models
      use; 0 for no average, as in Parti. `state.update_average` computes it. Frozen parts have none.

  Raises:
    UserError: if a value has the wrong type or is out of range. `depth_loss_weights` needs one
      weight per decoder layer, none of them negative and the last one positive. `text_features` needs
      a frozen text encoder from elsewhere, without dropout.
  """

  model: generators.Config
  tokenizer: str | None = None
  guidance_scale: float = 2.0
  depth_loss_weights: tuple[float, ...] | None = None
  text_encoder: str | None = None
  frozen: tuple[str, ...] = ()
  text_features: str | None = None
  z_loss_weight: float = 0.0
  label_smoothing: float = 0.0
  ema: float = 0.0

  name = 'generator'

  def __post_init__(self) -> None:
    self._check_model()
    config_checks.check_fields(
      self, guidance_scale=(0, sampling_settings.MOST_GUIDANCE), z_loss_weight=(0, None)
    )
    for field in ('label_smoothing', 'ema'):
      if not 0 <= (value := getattr(self, field)) < 1:
        raise errors.UserError(f'{self.gin_name}.{field}={value} must be at least 0 and below 1')
    if unknown := set(self.frozen) - set(PARTS):
      raise errors.UserError(
        f'{self.gin_name}.frozen: unknown parts {sorted(unknown)}; choose from {", ".join(PARTS)}'
      )
    if self.text_features is not None:
      self._check_fit_for_text_features()
    weights = self.depth_loss_weights
    if weights is None:
      return
    if len(weights) != self.model.decoder_layers or min(weights) < 0 or weights[-1] <= 0:
      raise errors.UserError(
        f'{self.gin_name}.depth_loss_weights={weights!r} must be {self.model.decoder_layers} '
        f'numbers, one for each of {type(self.model).__name__}.decoder_layers, not negative and the '
        'last above 0'
      )

  def _check_model(self) -> None:
    """Raises UserError unless the model is the config of a generator."""
    model: Any = self.model
    if isinstance(model, type) and model in generators.CONFIGS.values():
      raise errors.UserError(
        f'{self.gin_name}.model={checks.shown(model)} must be a config; in gin, write '
        f'@{model.__name__}()'
      )
    try:
      generators.of(model)
    except errors.UserError as error:
      raise errors.UserError(f'{self.gin_name}.model: {error}') from error

  def _check_fit_for_text_features(self) -> None:
    """Raises UserError unless text features can stand for the text encoder."""
    encoder = self.model.text_encoder
    if self.text_features not in text_features_lib.DTYPES:
      raise errors.UserError(
        f'{self.gin_name}.text_features={self.text_features!r} is not one of '
        f'{", ".join(text_features_lib.DTYPES)}'
      )
    why = None
    if encoder is None:
      name = type(self.model).__name__
      why = f'but the text encoder of {name} is its own; set {name}.text_encoder'
    elif 'text_encoder' not in self.frozen:
      why = f"but {self.gin_name}.frozen={self.frozen!r} trains it; add 'text_encoder' to it"
    elif dropout := getattr(encoder, 'dropout', 0):
      why = f'without dropout, but its dropout is {dropout}; set imported_text_encoder.dropout=0'
    if why:
      raise errors.UserError(
        f'text features are of an imported text encoder that is not trained, {why}, or '
        f'{text_features_lib.WITHOUT}'
      )

  def with_text_features(self, found: text_features_lib.TextFeatures | None) -> GeneratorObjective:
    if found is None:
      if self.text_features is not None:
        raise errors.UserError(
          f'{self.gin_name}.text_features={self.text_features!r}, but the examples have no text '
          'features; write them with `parti-jax tokenize --text_encoder`, or set it to None'
        )
      return self
    if self.text_features not in (None, found.dtype):
      raise errors.UserError(
        f'{self.gin_name}.text_features={self.text_features!r}, but those of {found.name} are '
        f'{found.dtype}; set it to None'
      )
    objective = dataclasses.replace(self, text_features=found.dtype)
    if found.width != self.model.text_width:
      raise errors.UserError(
        f'{found.name} has {found.width} text features of a token, but the text encoder of '
        f'{type(self.model).__name__} has {self.model.text_width}; {self._other_encoder()}'
      )
    return objective

  def _other_encoder(self) -> str:
    """Returns what to do when text features are of another text encoder."""
    return (
      f'set {self.gin_name}.text_encoder to the folder that was given to `parti-jax tokenize '
      f'--text_encoder`, tokenize with that of this run, or {text_features_lib.WITHOUT}'
    )

  def check_text_features(self, params: base.Params, found: text_features_lib.TextFeatures) -> None:
    own = params['text_encoder']
    mesh = jax.tree.leaves(own)[0].sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ours = frozen_text_encoder.fingerprint(self.model, own, everywhere)
    if ours != found.encoder:
      raise errors.UserError(
        f'{found.name} has text features of the text encoder {found.encoder}, but that of the run '
        f'is {ours}; {self._other_encoder()}'
      )

  def feature_lengths(self) -> dict[str, Any]:
    return {'inputs': self.model.text_length, 'targets': self.model.image_length}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    encoder = self.model.text_encoder
    owner = type(self.model if encoder is None else encoder).__name__
    return {
      'inputs': (f'{owner}.text_vocabulary', self.model.text_vocabulary),
      'targets': (f'{type(self.model).__name__}.codebook_size', self.model.codebook_size),
    }

  def grid(self) -> tuple[str, tuple[int, int]]:
    return f'{type(self.model).__name__}.grid', self.model.grid

  def check_vocabulary(self, vocabulary: text_tokenizer.TextTokenizer) -> None:
    self._check_empty_text(vocabulary, self.model, generators.check_empty_text)

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    text, image = ((batch_size, length) for length in self.feature_lengths().values())
    found = {
      'encoder_input_tokens': jax.ShapeDtypeStruct(text, jnp.int32),
      'decoder_target_tokens': jax.ShapeDtypeStruct(image, jnp.int32),
      'decoder_loss_weights': jax.ShapeDtypeStruct(image, jnp.float32),
    }
    if self.text_features is not None:
      dtype = text_features_lib.DTYPES[self.text_features]
      found['text_features'] = jax.ShapeDtypeStruct((*text, self.model.text_width), dtype)
    return found

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return generators.module(self.model).init(rng, *generators.example_inputs(self.model))['params']

  def sources(self) -> dict[str, fingerprints.Fingerprint]:
    return initial_text_encoder.sources(self.text_encoder, f'{self.gin_name}.text_encoder')

  def initial_parts(
    self, abstract_params: base.Params, inputs: inputs_lib.Inputs
  ) -> dict[str, Any]:
    """Reads the text encoder of the run `text_encoder`, if it is set."""
    return initial_text_encoder.parts(
      self.text_encoder, self.model, abstract_params, inputs, f'{self.gin_name}.text_encoder'
    )

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    """Returns optimizers without moments, which change nothing, for the frozen parts."""
    return {part: optax.set_to_zero() for part in self.frozen}

  def initial_statistics(self) -> base.Statistics:
    """Returns 'average' with `ema`: the moving average of the parts that are trained."""
    if not self.ema:
      return {}
    trained = [part for part in PARTS if part not in self.frozen]
    return {'average': state_lib.initial_average(self.init, trained)}

  def after_step(
    self,
    params: base.Params,
    statistics: base.Statistics,
    aux: dict[str, Any],
    step: Int[Array, ''],
    rng: PRNGKeyArray | None,
  ) -> tuple[base.Params, base.Statistics, dict[str, Float[Array, '']]]:
    """Updates the average of parameters."""
    del aux, rng
    if self.ema:
      average = state_lib.update_average(statistics['average'], params, step, self.ema)
      statistics = statistics | {'average': average}
    return params, statistics, {}

  def loss(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The mean cross entropy of image tokens, averaged over the layers with a weight.

    Args:
      params: the unboxed parameters.
      batch: 'encoder_input_tokens' int32 [batch, text_length], 'decoder_target_tokens' int32
        [batch, tokens], 'decoder_loss_weights' float32 [batch, tokens]; and, if `text_features` is
        set, 'text_features' [batch, text_length, width of the text encoder].
      dropout_keys: keys of the examples; None for no dropout.
      step: not used.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics'. With a z-loss or label smoothing, the loss is the sum of the metrics
        'cross_entropy', 'z_loss' and 'smoothing_loss'; a term that is off has no metric.
        `token_losses` computes the terms.
    """
    del step
    found = self._predictions(params, batch, dropout_keys, regularized=True)
    weights = batch['decoder_loss_weights']
    total = jnp.maximum(jnp.sum(weights), 1.0)
    of_layers = {
      name: jnp.sum(values * weights, axis=(1, 2)) / total for name, values in found.items()
    }
    metrics = {'token_accuracy': of_layers.pop('hits')[-1]}
    if self.depth_loss_weights is None:
      terms = {name: values[-1] for name, values in of_layers.items()}
    else:
      shares = np.array([weight for weight in self.depth_loss_weights if weight > 0], np.float32)
      metrics['last_layer_loss'] = of_layers['cross_entropy'][-1]
      terms = {
        name: jnp.sum(values * (shares / shares.sum())) for name, values in of_layers.items()
      }
    if len(terms) > 1:
      metrics |= terms
    return functools.reduce(jnp.add, terms.values()), {'metrics': metrics}

  def token_losses(
    self, logits: Float[Array, 'batch tokens codebook'], batch: base.Batch, regularized: bool
  ) -> dict[str, Float[Array, 'batch tokens']]:
    """Computes the terms of the loss at each token; a subclass with another loss overrides it.

    `loss` averages each term over tokens with 'decoder_loss_weights' and over layers with
    `depth_loss_weights`, sums the terms, and reports them as metrics if there are several. A subclass
    that adds its terms to those of `super()` keeps all settings of this class.

    Args:
      logits: the logits of one layer, which may be split over devices along the codebook.
      batch: the batch.
      regularized: True for `loss`; False for `evaluate`, which reads 'cross_entropy' and 'hits' alone.

    Returns:
      The term 'cross_entropy'; 'hits', 1 for a correct prediction, which is no term; and, if
      `regularized`, the terms 'z_loss' and 'smoothing_loss' that are on.
    """
    losses, hits = layers.cross_entropy(logits, batch['decoder_target_tokens'])
    found = {'cross_entropy': losses, 'hits': hits}
    if not regularized or not (self.z_loss_weight or self.label_smoothing):
      return found
    # Sums over the codebook only, which need not gather the logits of all devices.
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    if self.z_loss_weight:
      found['z_loss'] = self.z_loss_weight * jnp.square(log_normalizer)
    if self.label_smoothing:
      of_even_targets = log_normalizer - jnp.mean(logits, axis=-1)
      found['smoothing_loss'] = self.label_smoothing * (of_even_targets - losses)
    return found

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the sum of the weights of a batch's tokens."""
    return jnp.sum(batch['decoder_loss_weights'])

  def evaluate(self, params: base.Params, batch: base.Batch) -> dict[str, Float[Array, 'batch']]:
    """Evaluates each example, without dropout, z-loss or label smoothing.

    Returns:
      'loss' and 'token_accuracy' of the last layer, and 'loss_after_1' and so on of the other
      layers with a weight.
    """
    found = self._predictions(params, batch, None, regularized=False)
    losses, hits = (jnp.mean(found[name], axis=2) for name in ('cross_entropy', 'hits'))
    measures = {'loss': losses[-1], 'token_accuracy': hits[-1]}
    return measures | {
      f'loss_after_{layer + 1}': loss for layer, loss in zip(self._predicting()[:-1], losses)
    }

  def painter(self) -> base.Painter | None:
    """Returns a function that draws each example's image, and a sample for its text to the right.

    Returns:
      A function of the parameters, a batch and the tokenizer's parameters, which returns
      {'samples': images [batch, height, 2 · width, 3]}; and the tokenizer's parameters. None
      without a tokenizer.

    Raises:
      UserError: if the tokenizer can't be loaded or doesn't fit the model.
    """
    if self.tokenizer is None:
      return None
    config = self.frozen_tokenizer.config
    model_folder.check_sizes(self.model, config, f'{self.gin_name}.tokenizer={self.tokenizer!r}')
    settings = sampling_settings.SamplingSettings(guidance_scale=self.guidance_scale)
    sampling = decoding.Sampling.of(settings, self.model.image_length)

    def draw(
      params: base.Params, batch: base.Batch, tokenizer_params: Any
    ) -> dict[str, UInt8[Array, 'batch height width 3']]:
      texts = batch['encoder_input_tokens']
      drawn = decoding.sample_tokens(
        self.model,
        parameters.for_sampling(self.model, params),
        texts,
        decoding.image_keys(0, jnp.arange(texts.shape[0])),
        sampling,
      )
      apply: Callable[..., Any] = image_tokenizers.module(config).apply
      decode = lambda tokens: apply({'params': tokenizer_params}, tokens, method='detokenize')
      with pipeline_parallelism.off():
        pairs = jnp.concatenate([decode(batch['decoder_target_tokens']), decode(drawn)], axis=2)
      return {'samples': pixels.to_bytes(pairs)}

    return draw, self.frozen_tokenizer.params

  def step_flops(self, batch_size: int) -> int:
    more = (len(self._predicting()) - 1) * flops.logits_forward(self.model)
    encoder = 0 if self.text_features else generators.text_flops(self.model)
    decoder = generators.decoder_flops(self.model) + more
    # The backward pass costs twice the forward pass, and ends at the decoder if the encoder is frozen.
    return batch_size * ((1 if 'text_encoder' in self.frozen else 3) * encoder + 3 * decoder)

  def _predicting(self) -> list[int]:
    """Returns the decoder layers with a weight in the loss."""
    if self.depth_loss_weights is None:
      return [self.model.decoder_layers - 1]
    return [layer for layer, weight in enumerate(self.depth_loss_weights) if weight > 0]

  def _predictions(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    regularized: bool,
  ) -> dict[str, Float[Array, 'layers batch tokens']]:
    """Returns the results of `token_losses` for the layers with a weight."""
    model = generators.module(self.model)
    apply: Callable[..., Any] = functools.partial(model.apply, {'params': params})
    features = batch['text_features'] if self.text_features else None
    inputs = batch['encoder_input_tokens'], batch['decoder_target_tokens'], dropout_keys, features
    if self.depth_loss_weights is None:
      found = self.token_losses(apply(*inputs), batch, regularized)
      return {name: values[None] for name, values in found.items()}

    def of_layer(
      outputs: Float[Array, 'batch tokens embed'],
    ) -> dict[str, Float[Array, 'batch tokens']]:
      return self.token_losses(apply(outputs, method='logits_from'), batch, regularized)

    # One layer after another: the logits of all layers would not fit in memory.
    outputs = apply(*inputs, method='all_layer_outputs')[np.array(self._predicting())]
    return jax.lax.map(layer_stack.remat(of_layer, self.model.remat), outputs)

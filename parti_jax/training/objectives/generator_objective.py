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

from parti_jax.core import errors
from parti_jax.data import text_features as text_features_lib
from parti_jax.data import text_tokenizer
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import config_checks
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import pixels
from parti_jax.models import text_encoders
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.training import inputs as inputs_lib
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_text_encoder
from parti_jax.training.objectives import initial_text_encoder

PARTS = ('text_encoder', 'image_decoder')
_OTHER_ENCODER = (
  'set GeneratorObjective.text_encoder to the folder that was given to `parti-jax tokenize '
  f'--text_encoder`, tokenize with that of this run, or {text_features_lib.WITHOUT}'
)


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

  Raises:
    UserError: if a value has the wrong type or is out of range. `depth_loss_weights` needs one
      weight per decoder layer, none of them negative and the last one positive. `text_features` needs
      a frozen text encoder from elsewhere, without dropout.
  """

  model: parti_config.PartiConfig
  tokenizer: str | None = None
  guidance_scale: float = 2.0
  depth_loss_weights: tuple[float, ...] | None = None
  text_encoder: str | None = None
  frozen: tuple[str, ...] = ()
  text_features: str | None = None

  name = 'generator'

  def __post_init__(self) -> None:
    config_checks.check_fields(self, guidance_scale=(0, sampling_settings.MOST_GUIDANCE))
    if unknown := set(self.frozen) - set(PARTS):
      raise errors.UserError(
        f'GeneratorObjective.frozen: unknown parts {sorted(unknown)}; choose from '
        f'{", ".join(PARTS)}'
      )
    if self.text_features is not None:
      self._check_fit_for_text_features()
    weights = self.depth_loss_weights
    if weights is None:
      return
    if len(weights) != self.model.decoder_layers or min(weights) < 0 or weights[-1] <= 0:
      raise errors.UserError(
        f'GeneratorObjective.depth_loss_weights={weights!r} must be {self.model.decoder_layers} '
        'numbers, one for each of PartiConfig.decoder_layers, not negative and the last above 0'
      )

  def _check_fit_for_text_features(self) -> None:
    """Raises UserError unless text features can stand for the text encoder."""
    encoder = self.model.text_encoder
    if self.text_features not in text_features_lib.DTYPES:
      raise errors.UserError(
        f'GeneratorObjective.text_features={self.text_features!r} is not one of '
        f'{", ".join(text_features_lib.DTYPES)}'
      )
    why = None
    if encoder is None:
      why = "but the text encoder of PartiConfig is Parti's own; set PartiConfig.text_encoder"
    elif 'text_encoder' not in self.frozen:
      why = f"but GeneratorObjective.frozen={self.frozen!r} trains it; add 'text_encoder' to it"
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
          f'GeneratorObjective.text_features={self.text_features!r}, but the examples have no text '
          'features; write them with `parti-jax tokenize --text_encoder`, or set it to None'
        )
      return self
    if self.text_features not in (None, found.dtype):
      raise errors.UserError(
        f'GeneratorObjective.text_features={self.text_features!r}, but those of {found.name} are '
        f'{found.dtype}; set it to None'
      )
    objective = dataclasses.replace(self, text_features=found.dtype)
    if found.width != self.model.text_width:
      raise errors.UserError(
        f'{found.name} has {found.width} text features of a token, but the text encoder of '
        f'PartiConfig has {self.model.text_width}; {_OTHER_ENCODER}'
      )
    return objective

  def check_text_features(self, params: base.Params, found: text_features_lib.TextFeatures) -> None:
    own = params['text_encoder']
    mesh = jax.tree.leaves(own)[0].sharding.mesh
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    ours = frozen_text_encoder.fingerprint(self.model, own, everywhere)
    if ours != found.encoder:
      raise errors.UserError(
        f'{found.name} has text features of the text encoder {found.encoder}, but that of the run '
        f'is {ours}; {_OTHER_ENCODER}'
      )

  def feature_lengths(self) -> dict[str, int]:
    return {'inputs': self.model.text_length, 'targets': self.model.image_length}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    encoder = self.model.text_encoder
    owner = 'PartiConfig' if encoder is None else type(encoder).__name__
    return {
      'inputs': (f'{owner}.text_vocabulary', self.model.text_vocabulary),
      'targets': ('PartiConfig.codebook_size', self.model.codebook_size),
    }

  def grid(self) -> tuple[str, tuple[int, int]]:
    return 'PartiConfig.grid', self.model.grid

  def check_vocabulary(self, vocabulary: text_tokenizer.TextTokenizer) -> None:
    self._check_empty_text(vocabulary, self.model.text_encoder)

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
    return parti.Parti(self.model).init(rng, *parti.example_inputs(self.model))['params']

  def initial_parts(
    self, abstract_params: base.Params, inputs: inputs_lib.Inputs
  ) -> dict[str, Any]:
    """Reads the text encoder of the run `text_encoder`, if it is set."""
    return initial_text_encoder.parts(
      self.text_encoder, self.model, abstract_params, inputs, 'GeneratorObjective.text_encoder'
    )

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    """Returns optimizers without moments, which change nothing, for the frozen parts."""
    return {part: optax.set_to_zero() for part in self.frozen}

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
      aux: a dict with 'metrics'.
    """
    del step
    losses, hits = self._losses(params, batch, dropout_keys)
    weights = batch['decoder_loss_weights']
    total = jnp.maximum(jnp.sum(weights), 1.0)
    mean = lambda values: jnp.sum(values * weights, axis=(1, 2)) / total
    losses, metrics = mean(losses), {'token_accuracy': mean(hits)[-1]}
    if self.depth_loss_weights is None:
      return losses[-1], {'metrics': metrics}
    shares = np.array([weight for weight in self.depth_loss_weights if weight > 0], np.float32)
    metrics['last_layer_loss'] = losses[-1]
    return jnp.sum(losses * (shares / shares.sum())), {'metrics': metrics}

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the sum of the weights of a batch's tokens."""
    return jnp.sum(batch['decoder_loss_weights'])

  def evaluate(self, params: base.Params, batch: base.Batch) -> dict[str, Float[Array, 'batch']]:
    """Evaluates each example, without dropout.

    Returns:
      'loss' and 'token_accuracy' of the last layer, and 'loss_after_1' and so on of the other
      layers with a weight.
    """
    losses, hits = self._losses(params, batch, None)
    losses, hits = jnp.mean(losses, axis=2), jnp.mean(hits, axis=2)
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
    model_folder.check_sizes(self.model, config, f'GeneratorObjective.tokenizer={self.tokenizer!r}')
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
    encoder = 0 if self.text_features else text_encoders.forward_flops(self.model)
    decoder = flops.token_decoder_forward(self.model) + more
    # The backward pass costs twice the forward pass, and ends at the decoder if the encoder is frozen.
    return batch_size * ((1 if 'text_encoder' in self.frozen else 3) * encoder + 3 * decoder)

  def _predicting(self) -> list[int]:
    """Returns the decoder layers with a weight in the loss."""
    if self.depth_loss_weights is None:
      return [self.model.decoder_layers - 1]
    return [layer for layer, weight in enumerate(self.depth_loss_weights) if weight > 0]

  def _losses(
    self, params: base.Params, batch: base.Batch, dropout_keys: layers.DropoutKeys | None
  ) -> tuple[Float[Array, 'layers batch tokens'], Float[Array, 'layers batch tokens']]:
    """Returns losses and hits (1 for a correct prediction) of the layers with a weight."""
    model = parti.Parti(self.model)
    apply: Callable[..., Any] = functools.partial(model.apply, {'params': params})
    features = batch['text_features'] if self.text_features else None
    inputs = batch['encoder_input_tokens'], batch['decoder_target_tokens'], dropout_keys, features
    if self.depth_loss_weights is None:
      losses, hits = self._of_logits(apply(*inputs), batch)
      return losses[None], hits[None]

    def of_layer(
      outputs: Float[Array, 'batch tokens embed'],
    ) -> tuple[Float[Array, 'batch tokens'], Float[Array, 'batch tokens']]:
      return self._of_logits(apply(outputs, method='logits_from'), batch)

    # One layer after another: the logits of all layers would not fit in memory.
    outputs = apply(*inputs, method='all_layer_outputs')[np.array(self._predicting())]
    return jax.lax.map(layer_stack.remat(of_layer, self.model.remat), outputs)

  def _of_logits(
    self, logits: Float[Array, 'batch tokens codebook'], batch: base.Batch
  ) -> tuple[Float[Array, 'batch tokens'], Float[Array, 'batch tokens']]:
    return layers.cross_entropy(logits, batch['decoder_target_tokens'])

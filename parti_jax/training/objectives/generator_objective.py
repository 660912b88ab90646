"""Training Parti: the next image token from text and earlier tokens (Parti, section 3)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import errors
from parti_jax.exported_model import model_folder
from parti_jax.exported_model import sampling_settings
from parti_jax.models import config_checks
from parti_jax.models import flops
from parti_jax.models import parti
from parti_jax.models import parti_config
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layer_stack
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.sampling import decoding
from parti_jax.sampling import parameters
from parti_jax.training.objectives import base
from parti_jax.training.objectives import initial_text_encoder


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class GeneratorObjective(base.Objective):
  """Cross entropy of image tokens, and samples for fixed prompts.

  Attributes:
    model: sizes of the text encoder and the image-token decoder.
    tokenizer: run of the image tokenizer (its --model_dir), to show samples as pictures; None
      for no pictures.
    guidance_scale: of the samples.
    depth_loss_weights: how much each decoder layer's own prediction counts in the loss, for early
      exit at sampling (CALM, arXiv 2207.07061, section 3): all layers predict through the last
      layer norm and the same logits, and the loss is their mean with these weights, scaled to sum
      to 1. CALM's grow with depth, (1, 2, 3, 4) for four layers. None has the last layer alone.
    text_encoder: run (its --model_dir) whose text encoder a new run starts with, such as one of
      TextEncoderObjective (Parti, section 2.2); None for a random one.

  Raises:
    UserError: if a value is of another type or out of its range; if the weights are not one for
      each decoder layer, none of them negative and the last one positive.
  """

  model: parti_config.PartiConfig
  tokenizer: str | None = None
  guidance_scale: float = 2.0
  depth_loss_weights: tuple[float, ...] | None = None
  text_encoder: str | None = None

  name = 'generator'

  def __post_init__(self):
    config_checks.check_fields(self, guidance_scale=(0, sampling_settings.MOST_GUIDANCE))
    weights = self.depth_loss_weights
    if weights is None:
      return
    if len(weights) != self.model.decoder_layers or min(weights) < 0 or weights[-1] <= 0:
      raise errors.UserError(
        f'GeneratorObjective.depth_loss_weights={weights!r} must be {self.model.decoder_layers} '
        'numbers, one for each of PartiConfig.decoder_layers, not negative and the last above 0'
      )

  def feature_lengths(self) -> dict[str, int]:
    return {'inputs': self.model.text_length, 'targets': self.model.image_length}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Feature -> the gin key of the number of ids that the model knows, and that number."""
    return {
      'inputs': ('PartiConfig.text_vocabulary', self.model.text_vocabulary),
      'targets': ('PartiConfig.codebook_size', self.model.codebook_size),
    }

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    text, image = ((batch_size, length) for length in self.feature_lengths().values())
    return {
      'encoder_input_tokens': jax.ShapeDtypeStruct(text, jnp.int32),
      'decoder_target_tokens': jax.ShapeDtypeStruct(image, jnp.int32),
      'decoder_loss_weights': jax.ShapeDtypeStruct(image, jnp.float32),
    }

  def init(self, rng):
    """Parameters with their logical axis names."""
    return parti.Parti(self.model).init(rng, *parti.example_inputs(self.model))['params']

  def initial_parts(self, abstract_params, inputs):
    """The text encoder of the run that `text_encoder` names."""
    return initial_text_encoder.parts(
      self.text_encoder, self.model, abstract_params, inputs, 'GeneratorObjective.text_encoder'
    )

  def loss(self, params, batch, dropout_keys, step):
    """The mean cross entropy of image tokens, with dropout, over the layers that predict.

    Args:
      params: of `init`.
      batch: 'encoder_input_tokens' int32 [batch, text_length], 'decoder_target_tokens' int32
        [batch, image_length], 'decoder_loss_weights' float32 [batch, image_length].
      dropout_keys: layers.DropoutKeys of the batch.
      step: not used; the loss is the same at all steps.

    Returns:
      float32 [] and a dict with 'metrics' (scalars).
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

  def weight(self, batch):
    """What a batch counts in a mean over several: the weights of its tokens, float32 []."""
    return jnp.sum(batch['decoder_loss_weights'])

  def evaluate(self, params, batch):
    """Measures of each example without dropout, [batch] each.

    'loss' and 'token_accuracy' are of the last layer; 'loss_after_1' and so on of the others that
    predict.
    """
    losses, hits = self._losses(params, batch, None)
    losses, hits = jnp.mean(losses, axis=2), jnp.mean(hits, axis=2)
    measures = {'loss': losses[-1], 'token_accuracy': hits[-1]}
    return measures | {
      f'loss_after_{layer + 1}': loss for layer, loss in zip(self._predicting()[:-1], losses)
    }

  def painter(self):
    """What draws real pictures beside samples for the same texts; None without a tokenizer.

    Returns:
      A function of `params`, a batch as in `loss` and the tokenizer's parameters, which returns
      {'samples': uint8 [batch, height, 2 · width, 3]}; and those parameters, numpy arrays.

    Raises:
      UserError: if the tokenizer can't be loaded, or its tokens are not the model's.
    """
    if self.tokenizer is None:
      return None
    config = self.frozen_tokenizer.config
    model_folder.check_sizes(self.model, config, f'GeneratorObjective.tokenizer={self.tokenizer!r}')

    def draw(params, batch, tokenizer_params):
      texts = batch['encoder_input_tokens']
      drawn = decoding.sample_tokens(
        self.model,
        parameters.cut(self.model, params),
        texts,
        decoding.image_keys(0, jnp.arange(texts.shape[0])),
        decoding.Sampling(self.guidance_scale, guided=True),
      )
      decode = lambda tokens: vit_vqgan.ViTVQGAN(config).apply(
        {'params': tokenizer_params}, tokens, method='detokenize'
      )
      with pipeline_parallelism.off():
        pairs = jnp.concatenate([decode(batch['decoder_target_tokens']), decode(drawn)], axis=2)
      return {'samples': jnp.round(pairs * 255.0).astype(jnp.uint8)}

    return draw, self.frozen_tokenizer.params

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step."""
    more = (len(self._predicting()) - 1) * flops.logits_forward(self.model)
    return 3 * batch_size * (flops.parti_forward(self.model) + more)

  def _predicting(self) -> list[int]:
    """The decoder layers whose predictions count in the loss."""
    if self.depth_loss_weights is None:
      return [self.model.decoder_layers - 1]
    return [layer for layer, weight in enumerate(self.depth_loss_weights) if weight > 0]

  def _losses(self, params, batch, dropout_keys):
    """Losses and hits of the layers that predict, [layers, batch, image_length]."""
    model = parti.Parti(self.model)
    apply = functools.partial(model.apply, {'params': params})
    inputs = batch['encoder_input_tokens'], batch['decoder_target_tokens'], dropout_keys
    if self.depth_loss_weights is None:
      losses, hits = self._of_logits(apply(*inputs), batch)
      return losses[None], hits[None]

    def of_layer(states):
      return self._of_logits(apply(states, method='predict'), batch)

    # One layer's logits after the other: those of all layers would not fit the memory.
    states = apply(*inputs, method='states')[np.array(self._predicting())]
    return jax.lax.map(layer_stack.remat(of_layer, self.model.remat), states)

  def _of_logits(self, logits, batch):
    return layers.cross_entropy(logits, batch['decoder_target_tokens'])

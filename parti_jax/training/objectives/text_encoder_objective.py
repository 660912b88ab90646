"""Training the text encoder before Parti: masked language modelling, contrast with pictures."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from parti_jax.core import errors
from parti_jax.models import coca
from parti_jax.models import config_checks
from parti_jax.models import contrastive
from parti_jax.models import flops
from parti_jax.models import masked_language
from parti_jax.models import parti_config
from parti_jax.models import text_pretraining
from parti_jax.models.nn import layers
from parti_jax.training.objectives import base
from parti_jax.training.objectives import initial_text_encoder


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class TextEncoderObjective(base.Objective):
  """Masked language modelling and the contrastive loss, each with a weight; 0 leaves it out.

  Both together take two passes through the text encoder, one of them without masks.

  Attributes:
    model: sizes of Parti, whose text encoder is trained. Those of its decoder do not count.
    image: sizes of the contrastive objective's image encoder and vectors; None where it is off.
    masked_weight: of masked language modelling (BERT, arXiv 1810.04805, section 3.1).
    contrastive_weight: of the contrastive loss (CLIP, arXiv 2103.00020). Without it no pictures
      are read. Negatives are the whole batch's over all devices, or a microbatch's.
    text_encoder: run (its --model_dir) whose text encoder this one starts with; None for a random
      one. So one run may follow another, on texts first and then on pairs.

  Raises:
    UserError: if a value is of another type, a weight is negative or both are 0, or the contrastive
      loss has no image encoder.
  """

  model: parti_config.PartiConfig
  image: coca.CoCaConfig | None = None
  masked_weight: float = 1.0
  contrastive_weight: float = 0.0
  text_encoder: str | None = None

  name = 'text_encoder'

  def __post_init__(self):
    config_checks.check_fields(self)
    if min(self.masked_weight, self.contrastive_weight) < 0 or not (
      self.masked_weight or self.contrastive_weight
    ):
      raise errors.UserError(
        f'TextEncoderObjective.masked_weight={self.masked_weight} and TextEncoderObjective.'
        f'contrastive_weight={self.contrastive_weight}: none may be negative, and one must be '
        'above 0'
      )
    if self.contrastive_weight and self.image is None:
      raise errors.UserError(
        f'TextEncoderObjective.contrastive_weight={self.contrastive_weight} needs an image encoder: '
        'set TextEncoderObjective.image = @CoCaConfig()'
      )

  @property
  def over_examples(self) -> tuple[str, ...]:
    """What the losses compute over several examples, see `Objective`."""
    if not self.contrastive_weight:
      return ()
    masked = ('mean over masked pieces',) if self.masked_weight else ()
    return ('negatives in the contrastive loss', *masked)

  def feature_lengths(self) -> dict[str, int]:
    lengths = {'inputs': self.model.text_length}
    return lengths | ({'images': self.image.image_size} if self.contrastive_weight else {})

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Feature -> the gin key of the number of ids that the model knows, and that number."""
    return {'inputs': ('PartiConfig.text_vocabulary', self.model.text_vocabulary)}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    batch = {
      'encoder_input_tokens': jax.ShapeDtypeStruct((batch_size, self.model.text_length), jnp.int32)
    }
    if self.contrastive_weight:
      shape = (batch_size, self.image.image_size, self.image.image_size, 3)
      batch['images'] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return batch

  def init(self, rng):
    """Parameters with their logical axis names; 'text_encoder' are Parti's of this name."""
    module = self._module()
    return module.init(rng, *text_pretraining.example_inputs(self.model, module.image))['params']

  def initial_parts(self, abstract_params, inputs):
    """The text encoder of the run that `text_encoder` names."""
    return initial_text_encoder.parts(
      self.text_encoder, self.model, abstract_params, inputs, 'TextEncoderObjective.text_encoder'
    )

  def loss(self, params, batch, dropout_keys, step):
    """The weighted sum of both losses, with dropout.

    Args:
      params: of `init`.
      batch: 'encoder_input_tokens' int32 [batch, text_length] and, for the contrastive loss,
        'images' uint8 [batch, height, width, 3].
      dropout_keys: layers.DropoutKeys of the batch; the masks follow from them as well.
      step: not used; the loss is the same at all steps.

    Returns:
      float32 [] and a dict with 'metrics' (scalars).
    """
    del step
    loss, metrics = jnp.zeros(()), {}
    if self.masked_weight:
      losses, hits, weights = self._masked(
        params, batch, layers.fold(dropout_keys, 0), layers.fold(dropout_keys, 1)
      )
      total = jnp.maximum(jnp.sum(weights), 1.0)
      metrics['masked_loss'] = jnp.sum(losses * weights) / total
      metrics['masked_accuracy'] = jnp.sum(hits * weights) / total
      loss += self.masked_weight * metrics['masked_loss']
    if self.contrastive_weight:
      losses, hits, scale = self._contrastive(params, batch, layers.fold(dropout_keys, 2))
      metrics |= {
        'contrastive_loss': jnp.mean(losses),
        'contrastive_accuracy': jnp.mean(hits),
        'logit_scale': scale,
      }
      loss += self.contrastive_weight * metrics['contrastive_loss']
    return loss, {'metrics': metrics}

  def weight(self, batch):
    """What a batch counts in a mean over several, float32 [].

    Its chosen pieces, or with the contrastive loss its pairs.
    """
    texts = batch['encoder_input_tokens']
    if self.contrastive_weight:
      return jnp.float32(len(texts))
    return jnp.sum(masked_language.count_chosen(texts)).astype(jnp.float32)

  def evaluate(self, params, batch):
    """Measures of each example without dropout, float32 [batch] each.

    'masked_loss' and 'masked_hits' are sums over 'masked_count' pieces, chosen by the text alone.
    'contrastive_loss' and 'contrastive_accuracy' are among the examples of this batch.
    """
    measures = {}
    if self.masked_weight:
      keys = masked_language.keys_of_texts(batch['encoder_input_tokens'])
      losses, hits, weights = self._masked(params, batch, keys, None)
      measures |= {
        'masked_loss': jnp.sum(losses * weights, axis=1),
        'masked_hits': jnp.sum(hits * weights, axis=1),
        'masked_count': jnp.sum(weights, axis=1),
      }
    if self.contrastive_weight:
      losses, hits, _ = self._contrastive(params, batch, None)
      measures |= {'contrastive_loss': losses, 'contrastive_accuracy': hits}
    return measures

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over chosen pieces and over pairs, and the loss."""
    found = {'loss': 0.0}
    if self.masked_weight:
      count = max(float(measures['masked_count'].sum()), 1.0)
      found |= {
        'masked_loss': float(measures['masked_loss'].sum()) / count,
        'masked_accuracy': float(measures['masked_hits'].sum()) / count,
      }
      found['loss'] += self.masked_weight * found['masked_loss']
    if self.contrastive_weight:
      found |= {
        name: float(measures[name].mean()) for name in ('contrastive_loss', 'contrastive_accuracy')
      }
      found['loss'] += self.contrastive_weight * found['contrastive_loss']
    return found

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step."""
    model, total = self.model, 0
    text = flops.encoder_forward(
      model.encoder_layers, model.width, model.mlp_width, model.text_length
    )
    if self.masked_weight:
      head = 2 * model.width * (model.width + model.text_vocabulary)
      total += text + masked_language.most_chosen(model.text_length) * head
    if self.contrastive_weight:
      image = self.image
      total += text + flops.encoder_forward(
        image.image_layers, image.width, image.mlp_width, image.patches
      )
      total += 2 * 3 * image.image_size**2 * image.width
    return 3 * batch_size * total

  def _module(self):
    return text_pretraining.TextPretraining(
      self.model, bool(self.masked_weight), self.image if self.contrastive_weight else None
    )

  def _masked(self, params, batch, keys, dropout_keys):
    """Losses, hits and weights [batch, most] of the chosen pieces."""
    text = masked_language.mask_text(
      batch['encoder_input_tokens'], keys, self.model.text_vocabulary
    )
    logits = self._module().apply({'params': params}, text, dropout_keys, method='piece_logits')
    losses, hits = layers.cross_entropy(logits, text.targets)
    return losses, hits, text.weights

  def _contrastive(self, params, batch, dropout_keys):
    """Losses and hits [batch] of the pairs, and the scale of the logits."""
    texts = batch['encoder_input_tokens']
    of_images, of_texts, scale = self._module().apply(
      {'params': params},
      texts,
      batch['images'].astype(jnp.float32) / 255.0,
      dropout_keys,
      method='features',
    )
    same = contrastive.equal_rows(texts)
    return *contrastive.contrastive_losses(of_images, of_texts, scale, same), scale

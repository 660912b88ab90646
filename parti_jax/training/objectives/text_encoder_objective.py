"""Pretraining of Parti's text encoder: masked language modeling and a contrastive loss."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import PRNGKeyArray

from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import image_sizes
from parti_jax.models import coca
from parti_jax.models import config_checks
from parti_jax.models import contrastive
from parti_jax.models import flops
from parti_jax.models import masked_language
from parti_jax.models import parti_config
from parti_jax.models import pixels
from parti_jax.models import text_pretraining
from parti_jax.models.nn import layers
from parti_jax.training import inputs as inputs_lib
from parti_jax.training.objectives import base
from parti_jax.training.objectives import initial_text_encoder


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class TextEncoderObjective(base.Objective):
  """Masked language modeling and the contrastive loss, each of them optional.

  Both losses together need two passes through the text encoder, one with masks and one without.

  Attributes:
    model: config of Parti, whose text encoder is trained. Settings of its decoder have no effect.
    image: config of the contrastive loss: its image encoder and features; None without this loss.
    masked_weight: weight of masked language modeling (BERT, arXiv 1810.04805, section 3.1); 0 to
      omit it.
    contrastive_weight: weight of the contrastive loss (CLIP, arXiv 2103.00020); 0 to omit it, and
      to read no images. Negatives are those of the whole batch over all devices, or of the
      microbatch.
    text_encoder: model_dir of the run whose text encoder a new run starts with; None for a random
      text encoder. A run on texts can thus be continued on pairs of texts and images.

  Raises:
    UserError: if a value has the wrong type, a weight is negative, both weights are 0, the
      contrastive loss has no image encoder, or the model's text encoder is not Parti's own.
  """

  model: parti_config.PartiConfig
  image: coca.CoCaConfig | None = None
  masked_weight: float = 1.0
  contrastive_weight: float = 0.0
  text_encoder: str | None = None

  name = 'text_encoder'

  def __post_init__(self) -> None:
    config_checks.check_fields(self)
    if min(self.masked_weight, self.contrastive_weight) < 0 or not (
      self.masked_weight or self.contrastive_weight
    ):
      raise errors.UserError(
        f'TextEncoderObjective.masked_weight={self.masked_weight} and TextEncoderObjective.'
        f'contrastive_weight={self.contrastive_weight}: neither may be negative, and at least one '
        'must be above 0'
      )
    if self.model.text_encoder is not None:
      raise errors.UserError(
        "TextEncoderObjective trains Parti's own text encoder; set PartiConfig.text_encoder to None"
      )
    if self.contrastive_weight and self.image is None:
      raise errors.UserError(
        f'TextEncoderObjective.contrastive_weight={self.contrastive_weight} needs an image encoder: '
        'set TextEncoderObjective.image = @CoCaConfig()'
      )

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    if not self.contrastive_weight:
      return ()
    masked = ('mean over masked pieces',) if self.masked_weight else ()
    return ('negatives in the contrastive loss', *masked)

  def feature_lengths(self) -> dict[str, Any]:
    lengths: dict[str, Any] = {'inputs': self.model.text_length}
    return lengths | ({'images': self._image.image_size} if self.contrastive_weight else {})

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    return {'inputs': ('PartiConfig.text_vocabulary', self.model.text_vocabulary)}

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    batch = {
      'encoder_input_tokens': jax.ShapeDtypeStruct((batch_size, self.model.text_length), jnp.int32)
    }
    if self.contrastive_weight:
      shape = (batch_size, *image_sizes.sides(self._image.image_size), 3)
      batch['images'] = jax.ShapeDtypeStruct(shape, jnp.uint8)
    return batch

  def init(self, rng: PRNGKeyArray) -> base.Params:
    """Returns random parameters; the part 'text_encoder' is the same as Parti's."""
    module = self._module()
    return module.init(rng, *text_pretraining.example_inputs(self.model, module.image))['params']

  def sources(self) -> dict[str, fingerprints.Fingerprint]:
    return initial_text_encoder.sources(self.text_encoder, 'TextEncoderObjective.text_encoder')

  def initial_parts(
    self, abstract_params: base.Params, inputs: inputs_lib.Inputs
  ) -> dict[str, Any]:
    """Reads the text encoder of the run `text_encoder`, if it is set."""
    return initial_text_encoder.parts(
      self.text_encoder, self.model, abstract_params, inputs, 'TextEncoderObjective.text_encoder'
    )

  def loss(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The weighted sum of both losses.

    Args:
      params: the unboxed parameters.
      batch: 'encoder_input_tokens' int32 [batch, text_length] and, for the contrastive loss,
        'images' uint8 [batch, height, width, 3].
      dropout_keys: keys of the examples, for dropout and for the masks.
      step: not used.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics'.
    """
    del step
    loss = jnp.zeros(())
    metrics: dict[str, Array] = {}
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

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the number of masked pieces; with the contrastive loss, the number of pairs."""
    texts = batch['encoder_input_tokens']
    if self.contrastive_weight:
      return jnp.float32(len(texts))
    return jnp.sum(masked_language.count_chosen(texts)).astype(jnp.float32)

  def evaluate(self, params: base.Params, batch: base.Batch) -> dict[str, Float[Array, 'batch']]:
    """Evaluates each example, without dropout.

    Returns:
      'masked_loss' and 'masked_hits', sums over 'masked_count' pieces, whose choice only depends on
      the text; 'contrastive_loss' and 'contrastive_accuracy' among the examples of this batch.
    """
    measures: dict[str, Array] = {}
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

  def summarize(self, measures: Mapping[str, Float[np.ndarray, 'examples']]) -> dict[str, float]:
    """Returns means over masked pieces and over pairs, and the weighted loss."""
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
    model, total = self.model, 0
    text = flops.text_encoder_forward(model)
    if self.masked_weight:
      head = 2 * model.width * (model.width + model.text_vocabulary)
      total += text + masked_language.most_chosen(model.text_length) * head
    if self.contrastive_weight:
      image = self._image
      total += text + flops.encoder_forward(
        image.image_layers, image.width, image.mlp_width, image.patches
      )
      total += 2 * 3 * math.prod(image_sizes.sides(image.image_size)) * image.width
    return 3 * batch_size * total

  @property
  def _image(self) -> coca.CoCaConfig:
    """The config of the contrastive loss, where it is in use."""
    assert self.image is not None
    return self.image

  def _module(self) -> text_pretraining.TextPretraining:
    return text_pretraining.TextPretraining(
      self.model, bool(self.masked_weight), self.image if self.contrastive_weight else None
    )

  def _masked(
    self,
    params: base.Params,
    batch: base.Batch,
    keys: layers.DropoutKeys | None,
    dropout_keys: layers.DropoutKeys | None,
  ) -> tuple[Float[Array, 'batch most'], Float[Array, 'batch most'], Float[Array, 'batch most']]:
    """Returns losses, hits (1 for a correct prediction) and weights of the masked pieces."""
    assert keys is not None
    text = masked_language.mask_text(
      batch['encoder_input_tokens'], keys, self.model.text_vocabulary
    )
    apply: Callable[..., Any] = self._module().apply
    logits = apply({'params': params}, text, dropout_keys, method='piece_logits')
    losses, hits = layers.cross_entropy(logits, text.targets)
    return losses, hits, text.weights

  def _contrastive(
    self, params: base.Params, batch: base.Batch, dropout_keys: layers.DropoutKeys | None
  ) -> tuple[Float[Array, 'batch'], Float[Array, 'batch'], Float[Array, '']]:
    """Returns losses and hits (1 for a correct match) of the pairs, and the scale of the logits."""
    texts = batch['encoder_input_tokens']
    apply: Callable[..., Any] = self._module().apply
    of_images, of_texts, scale = apply(
      {'params': params},
      texts,
      pixels.from_bytes(batch['images']),
      dropout_keys,
      method='features',
    )
    same = contrastive.equal_rows(texts)
    return *contrastive.contrastive_losses(of_images, of_texts, scale, same), scale

"""The objective of the ranker, a contrastive captioner of images and texts (CoCa, section 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key
from jaxtyping import PRNGKeyArray
from jaxtyping import UInt8

from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.models import coca
from parti_jax.models import config_checks
from parti_jax.models import contrastive
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import pixels
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer

# Number of queries to compare with all candidates at once, to bound the memory.
_BLOCK = 1024


def shifted(
  images: Float[Array, 'batch height width 3'], keys: Key[Array, 'batch'], most: int
) -> Float[Array, 'batch height width 3']:
  """Shifts images by random offsets, and repeats the pixels of the edge.

  Args:
    images: the images.
    keys: a key for each image.
    most: maximum offset along each axis, in pixels.
  """

  def shift(
    image: Float[Array, 'height width 3'], key: Key[Array, '']
  ) -> Float[Array, 'height width 3']:
    down, right = jax.random.randint(key, (2,), -most, most + 1)
    rows = jnp.clip(jnp.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
    columns = jnp.clip(jnp.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
    return image[rows][:, columns]

  return jax.vmap(shift)(images, keys)


def noisy(
  images: Float[Array, 'batch height width 3'], keys: Key[Array, 'batch'], most: float
) -> Float[Array, 'batch height width 3']:
  """Adds Gaussian noise to images in [0, 1], with standard deviations drawn from [0, most]."""

  def add(
    image: Float[Array, 'height width 3'], key: Key[Array, '']
  ) -> Float[Array, 'height width 3']:
    strength, noise = jax.random.split(key)
    deviation = jax.random.uniform(strength, maxval=most)
    return image + deviation * jax.random.normal(noise, image.shape, image.dtype)

  return jnp.clip(jax.vmap(add)(images, keys), 0.0, 1.0)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class RankerObjective(base.Objective):
  """The contrastive and the captioning loss, on images that look like a generator's.

  The ranker scores images from an image tokenizer's decoder, which are less sharp than those of
  the data. It is trained on both, so that it doesn't score the sharpness rather than the content.

  Attributes:
    model: config of the contrastive captioner.
    contrastive_weight: weight of the contrastive loss (1 in CoCa, section 4.1).
    caption_weight: weight of the captioning loss (2 in CoCa).
    tokenizer: model_dir of an image tokenizer's run, to reconstruct some of the images with; None
      for no reconstructions. Until it is trained, plans use gin's
      TokenizerObjective.model.
    reconstruct_every: one of this many images is reconstructed; must divide the batch size.
    shift: maximum random shift of an image, in pixels.
    noise: maximum standard deviation of the noise in pixels, whose values are in [0, 1].

  Raises:
    UserError: if a value has the wrong type or is out of range.
  """

  model: coca.CoCaConfig
  contrastive_weight: float = 1.0
  caption_weight: float = 2.0
  tokenizer: str | None = None
  reconstruct_every: int = 2
  shift: int = 0
  noise: float = 0.0

  def __post_init__(self) -> None:
    not_negative = dict.fromkeys(('contrastive_weight', 'caption_weight', 'noise'), (0, None))
    config_checks.check_fields(
      self, reconstruct_every=(1, None), shift=(0, config_checks.MAX_SIZE), **not_negative
    )

  name = 'ranker'

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    reconstructed = ('choice of images that go through the tokenizer',) if self.tokenizer else ()
    return ('negatives in the contrastive loss', *reconstructed)

  def feature_lengths(self) -> dict[str, Any]:
    return {'inputs': self.model.text_length, 'images': self.model.image_size}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    return {'inputs': ('CoCaConfig.text_vocabulary', self.model.text_vocabulary)}

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (batch_size, *image_sizes.sides(self.model.image_size), 3)
    return {
      'encoder_input_tokens': jax.ShapeDtypeStruct((batch_size, self.model.text_length), jnp.int32),
      'images': jax.ShapeDtypeStruct(shape, jnp.uint8),
    }

  def init(self, rng: PRNGKeyArray) -> base.Params:
    return coca.CoCa(self.model).init(rng, *coca.example_inputs(self.model))['params']

  def constants(self) -> dict[str, Any]:
    """Returns the frozen tokenizer's parameters as 'tokenizer'."""
    if self.tokenizer is None:
      return {}
    self._checked_config()
    return {'tokenizer': self.frozen_tokenizer.params}

  def abstract_constants(self) -> dict[str, Any]:
    """Returns shapes and dtypes of `constants`, also for a tokenizer that isn't trained yet."""
    if self.tokenizer is None:
      return {}
    return {'tokenizer': frozen_tokenizer.planned_params(self._checked_config())}

  def loss(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The weighted sum of the means of both losses (CoCa, eq. 4).

    An example's captioning loss is the mean over its tokens. Examples with the same text aren't
    negatives of each other. With microbatches, negatives are those of the microbatch.

    Args:
      params: the unboxed parameters, and `constants`.
      batch: 'encoder_input_tokens' int32 [batch, text_length], 'images' uint8 [batch, height,
        width, 3].
      dropout_keys: keys of the examples, for dropout, shifts and noise.
      step: not used.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics'.
    """
    del step
    texts = batch['encoder_input_tokens']
    images = self._varied(params, batch['images'], layers.fold(dropout_keys, 0))
    out: Any = coca.CoCa(self.model).apply(
      {'params': params}, images, texts, layers.fold(dropout_keys, 1)
    )
    losses, hits = contrastive.contrastive_losses(
      out['image_features'], out['text_features'], out['logit_scale'], contrastive.equal_rows(texts)
    )
    contrastive_loss, caption_loss = jnp.mean(losses), jnp.mean(_caption_losses(out, texts))
    loss = self.contrastive_weight * contrastive_loss + self.caption_weight * caption_loss
    return loss, {
      'metrics': {
        'contrastive_loss': contrastive_loss,
        'caption_loss': caption_loss,
        'batch_top1': jnp.mean(hits),
        'logit_scale': out['logit_scale'],
      }
    }

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the number of examples in a batch."""
    return jnp.float32(len(batch['images']))

  def evaluate(
    self, params: base.Params, batch: base.Batch
  ) -> dict[str, Float[Array, 'batch ...']]:
    """Evaluates each example.

    Returns:
      'caption_loss' [batch], and 'image_features' and 'text_features' [batch, feature_dim].
    """
    texts = batch['encoder_input_tokens']
    out: Any = coca.CoCa(self.model).apply(
      {'params': params}, pixels.from_bytes(batch['images']), texts
    )
    return {
      'caption_loss': _caption_losses(out, texts),
      'image_features': out['image_features'],
      'text_features': out['text_features'],
    }

  def summarize(
    self, measures: Mapping[str, Float[np.ndarray, 'examples ...']]
  ) -> dict[str, float]:
    """Returns the captioning loss, and retrieval accuracy among all examples of the split.

    Returns:
      'caption_loss'; 'text_of_image_top1', the share of images whose own text is the nearest of
      all texts, or as near as the nearest if several examples have the same text;
      'image_of_text_top1', the same for texts and their images.
    """
    images, texts = measures['image_features'], measures['text_features']
    return {
      'caption_loss': float(measures['caption_loss'].mean()),
      'text_of_image_top1': retrieval(images, texts),
      'image_of_text_top1': retrieval(texts, images),
    }

  def step_flops(self, batch_size: int) -> int:
    """Returns the model FLOPs of a training step, without those of the frozen tokenizer."""
    return 3 * batch_size * flops.coca_forward(self.model)

  def _varied(
    self,
    params: base.Params,
    images: UInt8[Array, 'batch height width 3'],
    keys: layers.DropoutKeys | None,
  ) -> Float[Array, 'batch height width 3']:
    """Converts images to [0, 1], shifts them, reconstructs some, and adds noise."""

    def row_keys(site: int) -> Key[Array, 'rows']:
      assert keys is not None
      site_key = jax.random.fold_in(keys.key, site)
      return jax.vmap(lambda row: jax.random.fold_in(site_key, row))(keys.rows)

    varied = pixels.from_bytes(images)
    if self.shift:
      varied = shifted(varied, row_keys(0), self.shift)
    if self.tokenizer is not None:
      varied = self._some_reconstructed(params['tokenizer'], varied)
    return noisy(varied, row_keys(1), self.noise) if self.noise else varied

  def _some_reconstructed(
    self, params: Mapping[str, Any], images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch height width 3']:
    """Replaces the first of every `reconstruct_every` images by the tokenizer's reconstruction."""
    every = self.reconstruct_every
    if len(images) % every:
      raise errors.UserError(
        f'RankerObjective.reconstruct_every={every} does not divide the {len(images)} examples of a '
        'batch; set train.batch_size to a multiple'
      )
    # Groups of neighbors, so that each device only needs its own rows.
    groups = images.reshape((-1, every) + images.shape[1:])
    apply: Callable[..., Any] = image_tokenizers.module(self._checked_config()).apply
    with pipeline_parallelism.off():
      tokens = apply({'params': params}, groups[:, 0], method='tokenize')
      again = apply({'params': params}, tokens, method='detokenize')
    return jnp.concatenate([again[:, None], groups[:, 1:]], axis=1).reshape(images.shape)

  def _checked_config(self) -> image_tokenizers.Config:
    """Returns the frozen tokenizer's config, after checking its image size."""
    size = self.tokenizer_config.image_size
    if size != self.model.image_size:
      raise errors.UserError(
        f'RankerObjective.tokenizer={self.tokenizer!r} has images of {image_sizes.text(size)} pixels, but '
        f'CoCaConfig.image_size={self.model.image_size}'
      )
    return self.tokenizer_config


def retrieval(
  queries: Float[np.ndarray, 'examples dim'], candidates: Float[np.ndarray, 'examples dim']
) -> float:
  """Returns the share of queries whose own candidate is the nearest; both are unit vectors."""
  hits = 0
  for start in range(0, len(queries), _BLOCK):
    rows = slice(start, start + _BLOCK)
    own = np.sum(queries[rows] * candidates[rows], axis=1)
    nearest = np.max(queries[rows] @ candidates.T, axis=1)
    # Products with equal candidates may be summed in different orders.
    hits += int(np.sum(own >= nearest - 1e-5))
  return hits / len(queries)


def _caption_losses(
  out: Mapping[str, Array], texts: Int[Array, 'batch text_length']
) -> Float[Array, 'batch']:
  """Returns the cross entropy of each text given its image, a mean over tokens."""
  losses, _ = layers.cross_entropy(out['logits'], texts)
  is_text = (texts > 0).astype(jnp.float32)
  return jnp.sum(losses * is_text, axis=1) / jnp.maximum(jnp.sum(is_text, axis=1), 1.0)

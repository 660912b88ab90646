"""Training the ranker: a contrastive captioner on captions and pictures (CoCa, section 3)."""

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
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer

# Texts that are compared with all pictures at once, to bound the memory.
_BLOCK = 1024


def shifted(images, keys, most: int):
  """Pictures moved by up to `most` pixels each way; what comes in repeats the edge.

  Args:
    images: [batch, height, width, 3].
    keys: keys [batch].
    most: pixels.
  """

  def shift(image, key):
    down, right = jax.random.randint(key, (2,), -most, most + 1)
    rows = jnp.clip(jnp.arange(image.shape[0]) - down, 0, image.shape[0] - 1)
    columns = jnp.clip(jnp.arange(image.shape[1]) - right, 0, image.shape[1] - 1)
    return image[rows][:, columns]

  return jax.vmap(shift)(images, keys)


def noisy(images, keys, most: float):
  """Pictures in [0, 1] with Gaussian noise, of a standard deviation drawn from [0, most]."""

  def add(image, key):
    strength, noise = jax.random.split(key)
    deviation = jax.random.uniform(strength, maxval=most)
    return image + deviation * jax.random.normal(noise, image.shape, image.dtype)

  return jnp.clip(jax.vmap(add)(images, keys), 0.0, 1.0)


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class RankerObjective(base.Objective):
  """The contrastive and the captioning loss, on pictures as a generator draws them.

  The ranker judges pictures that come out of an image tokenizer's decoder, which are never as
  sharp as those of the data. So that it neither takes the difference for something that the text
  says nor meets it for the first time when it ranks, it is trained on both.

  Attributes:
    model: sizes of the contrastive captioner.
    contrastive_weight: of the contrastive loss (1 in CoCa, section 4.1).
    caption_weight: of the captioning loss (2 in CoCa).
    tokenizer: run of an image tokenizer (its --model_dir) that some pictures go through; None
      for none. Until it is trained, plans take its sizes from ViTVQGANConfig in gin.
    reconstruct_every: one picture of so many goes through the tokenizer; must divide the batch.
    shift: pixels that a picture is moved by at most.
    noise: largest standard deviation of noise in pixels, which are in [0, 1].

  Raises:
    UserError: if a value is out of its range.
  """

  model: coca.CoCaConfig
  contrastive_weight: float = 1.0
  caption_weight: float = 2.0
  tokenizer: str | None = None
  reconstruct_every: int = 2
  shift: int = 0
  noise: float = 0.0

  def __post_init__(self):
    not_negative = dict.fromkeys(('contrastive_weight', 'caption_weight', 'noise'), (0, None))
    config_checks.check_fields(
      self, reconstruct_every=(1, None), shift=(0, config_checks.MAX_SIZE), **not_negative
    )

  name = 'ranker'

  @property
  def over_examples(self) -> tuple[str, ...]:
    """What the losses compute over several examples, see `Objective`."""
    reconstructed = ('pictures that go through the tokenizer',) if self.tokenizer else ()
    return ('negatives in the contrastive loss', *reconstructed)

  def feature_lengths(self) -> dict[str, int]:
    return {'inputs': self.model.text_length, 'images': self.model.image_size}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Feature -> the gin key of the number of ids that the model knows, and that number."""
    return {'inputs': ('CoCaConfig.text_vocabulary', self.model.text_vocabulary)}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    size = self.model.image_size
    return {
      'encoder_input_tokens': jax.ShapeDtypeStruct((batch_size, self.model.text_length), jnp.int32),
      'images': jax.ShapeDtypeStruct((batch_size, size, size, 3), jnp.uint8),
    }

  def init(self, rng):
    """Parameters with their logical axis names."""
    return coca.CoCa(self.model).init(rng, *coca.example_inputs(self.model))['params']

  def constants(self):
    """The frozen tokenizer's parameters, which `loss` finds among its own."""
    if self.tokenizer is None:
      return {}
    self._checked_config()
    return {'tokenizer': self.frozen_tokenizer.params}

  def abstract_constants(self):
    """Shapes and dtypes of `constants`; the tokenizer need not be trained yet."""
    if self.tokenizer is None:
      return {}
    return {'tokenizer': frozen_tokenizer.planned_params(self._checked_config())}

  def loss(self, params, batch, dropout_keys, step):
    """The weighted sum of both losses (CoCa, eq. 4), means over examples.

    An example's captioning loss is the mean over its tokens. Texts that are equal are no
    negatives of one another. With microbatches, negatives are those of the microbatch.

    Args:
      params: of `init`, and `constants`.
      batch: 'encoder_input_tokens' int32 [batch, text_length], 'images' uint8 [batch, height,
        width, 3].
      dropout_keys: layers.DropoutKeys of the batch, for the changes of pictures as well.
      step: not used; the loss is the same at all steps.

    Returns:
      float32 [] and a dict with 'metrics' (scalars).
    """
    del step
    texts = batch['encoder_input_tokens']
    images = self._varied(params, batch['images'], layers.fold(dropout_keys, 0))
    out = coca.CoCa(self.model).apply(
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

  def weight(self, batch):
    """What a batch counts in a mean over several: its examples, float32 []."""
    return jnp.float32(len(batch['images']))

  def evaluate(self, params, batch):
    """Of each example 'caption_loss' [batch] and both features [batch, feature_dim]."""
    texts = batch['encoder_input_tokens']
    out = coca.CoCa(self.model).apply({'params': params}, _to_unit(batch['images']), texts)
    return {
      'caption_loss': _caption_losses(out, texts),
      'image_features': out['image_features'],
      'text_features': out['text_features'],
    }

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """The captioning loss, and retrieval among all examples of the split.

    `text_of_image_top1` is the share of pictures whose own text is the nearest of all, or as near
    as the nearest, where several examples have the same text; `image_of_text_top1` likewise.
    """
    images, texts = measures['image_features'], measures['text_features']
    return {
      'caption_loss': float(measures['caption_loss'].mean()),
      'text_of_image_top1': retrieval(images, texts),
      'image_of_text_top1': retrieval(texts, images),
    }

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step, without those of the frozen tokenizer."""
    return 3 * batch_size * flops.coca_forward(self.model)

  def _varied(self, params, images, keys):
    """Pictures in [0, 1], moved, some of them through the tokenizer, with noise."""
    images = _to_unit(images)
    row_keys = lambda site: jax.vmap(
      lambda row: jax.random.fold_in(layers.fold(keys, site).key, row)
    )(keys.rows)
    if self.shift:
      images = shifted(images, row_keys(0), self.shift)
    if self.tokenizer is not None:
      images = self._some_reconstructed(params['tokenizer'], images)
    return noisy(images, row_keys(1), self.noise) if self.noise else images

  def _some_reconstructed(self, params, images):
    """The first of every `reconstruct_every` pictures as the frozen tokenizer gives it back."""
    every = self.reconstruct_every
    if len(images) % every:
      raise errors.UserError(
        f'RankerObjective.reconstruct_every={every} does not divide the {len(images)} examples of a '
        'batch; set train.batch_size to a multiple'
      )
    # Of neighbours, so that each device finds its share among its own rows.
    groups = images.reshape((-1, every) + images.shape[1:])
    module = vit_vqgan.ViTVQGAN(self._checked_config())
    with pipeline_parallelism.off():
      tokens = module.apply({'params': params}, groups[:, 0], method='tokenize')
      again = module.apply({'params': params}, tokens, method='detokenize')
    return jnp.concatenate([again[:, None], groups[:, 1:]], axis=1).reshape(images.shape)

  def _checked_config(self) -> vit_vqgan.ViTVQGANConfig:
    """Sizes of the frozen tokenizer, which is of pictures as large as the ranker's."""
    size = self.tokenizer_config.image_size
    if size != self.model.image_size:
      raise errors.UserError(
        f'RankerObjective.tokenizer={self.tokenizer!r} is of pictures of {size} pixels, but '
        f'CoCaConfig.image_size={self.model.image_size}'
      )
    return self.tokenizer_config


def retrieval(queries: np.ndarray, candidates: np.ndarray) -> float:
  """Share of queries whose own candidate is the nearest, both float [n, dim] of unit vectors."""
  hits = 0
  for start in range(0, len(queries), _BLOCK):
    rows = slice(start, start + _BLOCK)
    own = np.sum(queries[rows] * candidates[rows], axis=1)
    nearest = np.max(queries[rows] @ candidates.T, axis=1)
    # Equal candidates may differ in how their products are summed.
    hits += int(np.sum(own >= nearest - 1e-5))
  return hits / len(queries)


def _to_unit(images):
  return images.astype(jnp.float32) / 255.0


def _caption_losses(out, texts):
  """Cross entropy of each text's tokens given the picture, a mean over tokens: float32 [batch]."""
  losses, _ = layers.cross_entropy(out['logits'], texts)
  is_text = (texts > 0).astype(jnp.float32)
  return jnp.sum(losses * is_text, axis=1) / jnp.maximum(jnp.sum(is_text, axis=1), 1.0)

"""Training super-resolution on what the tokenizer makes of pictures (Parti, section 2.1)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from parti_jax.core import errors
from parti_jax.models import config_checks
from parti_jax.models import discriminator as discriminator_lib
from parti_jax.models import flops
from parti_jax.models import lpips
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import lpips_weights
from parti_jax.training.objectives import tokenizer_objective


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SuperResolutionObjective(base.Objective):
  """Larger pictures from small ones: its inputs, losses and pictures.

  An input is a picture averaged over squares of factor × factor pixels, and then, but for a share
  of the examples, what a trained tokenizer makes of that. The target is the picture itself.

  Attributes:
    model: sizes of the network.
    image_size: height and width of the targets, in pixels.
    tokenizer: run of the image tokenizer (its --model_dir), whose pictures are as many times
      smaller; None to enlarge averaged pictures alone. Until it is trained, plans take its sizes
      from ViTVQGANConfig in gin.
    clean_share: share of the examples that do not go through the tokenizer.
    crop: side of the random squares that are cut out of inputs, in pixels; None for whole ones.
    l2_weight: of the mean squared error (1.0 in ViT-VQGAN).
    l1_weight: of the mean absolute error (1.0 in WDSR, which has no other loss).
    perceptual_weight: of LPIPS (0.1 in ViT-VQGAN); 0 for none, which needs no files.
    vgg16_weights: file of VGG16's weights for LPIPS, see `lpips_weights.read`.
    lpips_weights: file of LPIPS' linear heads.
    adversarial_weight: of the adversarial loss (0.1 in ViT-VQGAN); 0 for no discriminator.
    adversarial_from: until this step there is neither the adversarial loss nor its discriminator's.
    discriminator: sizes of the discriminator.
    discriminator_optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
    r1_weight: γ of the discriminator's penalty γ/2 · R1 (10 in StyleGAN2).
    r1_every: steps between penalties, each of which counts as many times (StyleGAN2, section 3.1).

  Raises:
    UserError: if a value is out of its range, or sizes do not fit each other.
  """

  model: super_resolution.SuperResolutionConfig
  image_size: int
  tokenizer: str | None = None
  clean_share: float = 0.0
  crop: int | None = None
  l2_weight: float = 1.0
  l1_weight: float = 0.0
  perceptual_weight: float = 0.0
  vgg16_weights: str | None = None
  lpips_weights: str | None = None
  adversarial_weight: float = 0.0
  adversarial_from: int = 0
  discriminator: discriminator_lib.DiscriminatorConfig = discriminator_lib.DiscriminatorConfig()
  discriminator_optimizer: Any = None
  r1_weight: float = 10.0
  r1_every: int = 16

  name = 'super_resolution'

  def __post_init__(self):
    not_negative = dict.fromkeys(
      (
        'l2_weight',
        'l1_weight',
        'perceptual_weight',
        'adversarial_weight',
        'adversarial_from',
        'r1_weight',
      ),
      (0, None),
    )
    config_checks.check_fields(
      self, image_size=(1, config_checks.MAX_SIZE), clean_share=(0, 1), **not_negative
    )
    unit = self.model.factor * self.model.unshuffle
    if self.image_size % unit:
      raise errors.UserError(
        f'SuperResolutionObjective.image_size={self.image_size} is not divisible by {unit}, which is '
        'SuperResolutionConfig.factor · unshuffle'
      )
    if self.crop is not None and (
      self.crop % self.model.unshuffle or not 0 < self.crop <= self.input_size
    ):
      raise errors.UserError(
        f'SuperResolutionObjective.crop={self.crop} must be a multiple of '
        f'SuperResolutionConfig.unshuffle={self.model.unshuffle}, at most {self.input_size}'
      )

    if self.r1_every < 1:
      raise errors.UserError(
        f'SuperResolutionObjective.r1_every={self.r1_every} must be at least 1'
      )
    if self.adversarial_weight:
      try:
        self.discriminator.sizes(self._target_size)
      except errors.UserError as error:
        raise errors.UserError(
          f'SuperResolutionObjective.adversarial_weight={self.adversarial_weight}: {error}; or '
          'choose another SuperResolutionObjective.crop'
        ) from error

  @property
  def input_size(self) -> int:
    """Height and width of the inputs, in pixels."""
    return self.image_size // self.model.factor

  @property
  def _target_size(self) -> int:
    """Height and width of what losses compare, in pixels."""
    return self.model.factor * (self.crop or self.input_size)

  @property
  def over_examples(self) -> tuple[str, ...]:
    """What the losses compute over several examples, see `Objective`."""
    return adversarial.over_examples(self.discriminator) if self.adversarial_weight else ()

  def feature_lengths(self) -> dict[str, int]:
    return {'images': self.image_size}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    shape = (batch_size, self.image_size, self.image_size, 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng):
    """Parameters with their logical axis names; with a discriminator also 'discriminator'."""
    module = super_resolution.SuperResolution(self.model)
    params = module.init(rng, *super_resolution.example_inputs(self.model))['params']
    if self.adversarial_weight:
      judge = discriminator_lib.Discriminator(self.discriminator)
      images = jnp.zeros((1, self._target_size, self._target_size, 3), jnp.float32)
      params = params | {'discriminator': judge.init(jax.random.fold_in(rng, 1), images)['params']}
    return params

  def other_optimizers(self):
    return adversarial.other_optimizers(self)

  def constants(self):
    """The tokenizer's parameters, as 'tokenizer', and LPIPS', as 'perceptual', where there are any.

    Raises:
      UserError: if there is no run of a tokenizer, or it is of pictures of another size; if a file
        of weights is not given, is missing or damaged.
    """
    found = {}
    if self.tokenizer is not None:
      self._checked_config()
      found['tokenizer'] = self.frozen_tokenizer.params
    if self.perceptual_weight:
      found['perceptual'] = lpips_weights.of_objective(self)
    return found

  def abstract_constants(self):
    """Shapes and dtypes of `constants`, without any files; the tokenizer need not be trained."""
    found = {}
    if self.tokenizer is not None:
      found['tokenizer'] = frozen_tokenizer.planned_params(self._checked_config())
    if self.perceptual_weight:
      found['perceptual'] = lpips.abstract_params()
    return found

  def loss(self, params, batch, dropout_keys, step):
    """The training loss.

    Args:
      params: of `init`, with `constants`.
      batch: {'images': uint8 [batch, image_size, image_size, 3]}.
      dropout_keys: layers.DropoutKeys, from which follow crops and who is spared the tokenizer.
      step: int32 [], steps done before this one.

    Returns:
      float32 [], the network's loss and the discriminator's, and a dict with 'metrics' (scalars;
      'loss' is the network's).
    """
    targets = _pixels(batch['images'])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_keys.key, dropout_keys.rows)
    inputs = self._clean(targets)
    if self.tokenizer is not None:
      spared = jax.vmap(jax.random.uniform)(keys) < self.clean_share
      inputs = jnp.where(spared[:, None, None, None], inputs, self._reconstruct(params, inputs))
    if self.crop is not None:
      inputs, targets = jax.vmap(self._cropped)(keys, inputs, targets)
    outputs = self._enlarge(params, inputs)
    metrics = {
      'l2': jnp.mean(jnp.square(outputs - targets)),
      'l1': jnp.mean(jnp.abs(outputs - targets)),
    }
    if self.perceptual_weight:
      metrics['perceptual'] = jnp.mean(
        lpips.LPIPS().apply({'params': params['perceptual']}, targets, outputs)
      )
    loss = sum(getattr(self, f'{name}_weight') * value for name, value in metrics.items())
    metrics['psnr'] = jnp.mean(_psnr(targets, outputs))
    of_discriminator = 0.0
    if self.adversarial_weight:
      of_network, of_discriminator, more = self._adversarial_losses(params, targets, outputs, step)
      loss, metrics = loss + of_network, metrics | more
    return loss + of_discriminator, {'metrics': metrics | {'loss': loss}}

  def _adversarial_losses(self, params, targets, outputs, step):
    """The weighted adversarial loss, the discriminator's loss and metrics; 0 until they begin."""
    judge = self.discriminator, params['discriminator']
    begun = step >= self.adversarial_from
    of_network, of_discriminator, metrics = adversarial.losses(*judge, targets, outputs)
    penalty = jax.lax.cond(
      begun & (step % self.r1_every == 0),
      lambda: adversarial.r1_penalty(*judge, targets),
      lambda: jnp.float32(0.0),
    )
    metrics |= {'adversarial': of_network, 'discriminator': of_discriminator, 'r1': penalty}
    of_discriminator += 0.5 * self.r1_weight * self.r1_every * penalty
    return (
      jnp.where(begun, self.adversarial_weight * of_network, 0.0),
      jnp.where(begun, of_discriminator, 0.0),
      metrics,
    )

  def weight(self, batch):
    """What a batch counts in a mean over several: its pictures, float32 []."""
    return jnp.float32(len(batch['images']))

  def evaluate(self, params, batch):
    """PSNR of each example in dB, float32 [batch], beside that of bicubic enlargement.

    Args:
      params: of `init`, with `constants`.
      batch: as in `loss`.

    Returns:
      'psnr' and 'bicubic_psnr' of what the tokenizer makes of the inputs, where there is one, and
      'clean_psnr' and 'clean_bicubic_psnr' of the inputs themselves.
    """
    targets = _pixels(batch['images'])
    clean = self._clean(targets)
    inputs = {'clean_': clean}
    if self.tokenizer is not None:
      inputs[''] = self._reconstruct(params, clean)
    measures = {}
    for name, pictures in inputs.items():
      measures[f'{name}psnr'] = _psnr(targets, self._enlarge(params, pictures))
      measures[f'{name}bicubic_psnr'] = _psnr(
        targets, super_resolution.enlarge(pictures, self.model.factor)
      )
    return measures

  def painter(self):
    """What draws bicubic enlargements, those of the network, and the pictures themselves.

    Returns:
      A function of `params`, a batch as in `loss` and `constants`, which returns
      {'enlarged': uint8 [batch, image_size, 3 · image_size, 3]}; and those constants.
    """

    def draw(params, batch, constants):
      targets = _pixels(batch['images'])
      inputs = self._clean(targets)
      if self.tokenizer is not None:
        inputs = self._reconstruct(constants, inputs)
      row = [
        super_resolution.enlarge(inputs, self.model.factor),
        self._enlarge(params, inputs),
        targets,
      ]
      pixels = jnp.clip(jnp.concatenate(row, axis=2), 0.0, 1.0)
      return {'enlarged': jnp.round(pixels * 255.0).astype(jnp.uint8)}

    return draw, self.constants()

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step, without those of the tokenizer and of the R1 penalty."""
    side, size = self.crop or self.input_size, self._target_size
    total = 3 * flops.super_resolution_forward(self.model, side, side)
    if self.perceptual_weight:
      total += tokenizer_objective.PERCEPTUAL_PASSES * flops.vgg16_forward(size)
    if self.adversarial_weight:
      total += tokenizer_objective.ADVERSARIAL_PASSES * flops.discriminator_forward(
        self.discriminator, size
      )
    return batch_size * total

  def _clean(self, targets):
    """[batch, factor · height, factor · width, 3] averaged over squares of factor × factor."""
    batch, height, width, channels = targets.shape
    factor = self.model.factor
    squares = targets.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return jnp.mean(squares, axis=(2, 4))

  def _checked_config(self) -> vit_vqgan.ViTVQGANConfig:
    """Sizes of the frozen tokenizer, which is of pictures as large as the inputs."""
    size = self.tokenizer_config.image_size
    if size != self.input_size:
      raise errors.UserError(
        f'SuperResolutionObjective.image_size={self.image_size} is not '
        f'SuperResolutionConfig.factor={self.model.factor} times the {size} pixels of the '
        f'tokenizer in {self.tokenizer}'
      )
    return self.tokenizer_config

  def _reconstruct(self, constants, images):
    """What the tokenizer makes of pictures, rounded as pictures are stored."""
    module = vit_vqgan.ViTVQGAN(self._checked_config())
    params = constants['tokenizer']
    with pipeline_parallelism.off():
      tokens = module.apply({'params': params}, images, method='tokenize')
      pixels = module.apply({'params': params}, tokens, method='detokenize')
    return jax.lax.stop_gradient(jnp.round(pixels * 255.0) / 255.0)

  def _cropped(self, key, image, target):
    """The same random square of an input and of its target."""
    unit, factor = self.model.unshuffle, self.model.factor
    places = (self.input_size - self.crop) // unit + 1
    corner = unit * jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, places)
    cut = lambda pixels, times: jax.lax.dynamic_slice(
      pixels, (times * corner[0], times * corner[1], 0), (times * self.crop, times * self.crop, 3)
    )
    return cut(image, 1), cut(target, factor)

  def _enlarge(self, params, images):
    beside = ('tokenizer', 'perceptual', 'discriminator')
    params = {name: part for name, part in params.items() if name not in beside}
    return super_resolution.SuperResolution(self.model).apply({'params': params}, images)


def _pixels(images):
  return images.astype(jnp.float32) / 255.0


def _psnr(targets, outputs):
  return tokenizer_objective.psnr(targets, jnp.clip(outputs, 0.0, 1.0))

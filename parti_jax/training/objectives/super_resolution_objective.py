"""The objective of super-resolution of an image tokenizer's reconstructions (Parti, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Key
from jaxtyping import PRNGKeyArray
from jaxtyping import UInt8

from parti_jax.core import errors
from parti_jax.core import image_sizes
from parti_jax.models import config_checks
from parti_jax.models import discriminator as discriminator_lib
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import lpips
from parti_jax.models import pixels
from parti_jax.models import super_resolution
from parti_jax.models import upscalers
from parti_jax.models.nn import layers
from parti_jax.partitioning import pipeline_parallelism
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import lpips_weights
from parti_jax.training.objectives import tokenizer_objective


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class SuperResolutionObjective(base.Objective):
  """Super-resolution of images, with pixel, perceptual and adversarial losses.

  The target is an image. The input is the image, averaged over squares of factor × factor pixels
  and then, except for a share of the examples, reconstructed by a trained tokenizer.

  Attributes:
    model: config of the network, of a kind in `upscalers.KINDS`.
    image_size: height and width of the targets, in pixels; one number for squares.
    tokenizer: model_dir of the image tokenizer's run, for images of the inputs' size; None to train
      on averaged images only. Until it is trained, plans use gin's
      TokenizerObjective.model.
    clean_share: share of the examples that aren't reconstructed by the tokenizer.
    crop: height and width of random crops of the inputs, in pixels; None for whole inputs.
    l2_weight: weight of the mean squared error (1.0 in ViT-VQGAN).
    l1_weight: weight of the mean absolute error (1.0 in WDSR, which has no other loss).
    perceptual_weight: weight of LPIPS (0.1 in ViT-VQGAN); 0 to omit it, which needs no files.
    vgg16_weights: file of VGG16's weights for LPIPS (`parti_jax.importers.lpips_files`).
    lpips_weights: file of the linear layers of LPIPS.
    adversarial_weight: weight of the adversarial loss (0.1 in ViT-VQGAN); 0 for no discriminator.
    adversarial_from: the first step with an adversarial loss and training of the discriminator.
    discriminator: config of the discriminator.
    discriminator_optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
    r1_weight: γ of the discriminator's penalty γ/2 · R1 (10 in StyleGAN2).
    r1_every: steps between penalties; each penalty is multiplied by this number (lazy
      regularization, StyleGAN2, section 3.1).

  Raises:
    UserError: if a value has the wrong type or is out of range, or if sizes don't match.
  """

  model: upscalers.TrainableConfig
  image_size: image_sizes.ImageSize
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

  def __post_init__(self) -> None:
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
    try:
      upscalers.forward_flops(self.model)
    except errors.UserError as error:
      raise errors.UserError(f'SuperResolutionObjective.model: {error}') from error
    kind, factor, multiple = type(self.model).__name__, self.model.factor, self.model.multiple
    sides = image_sizes.sides(self.image_size)
    if any(side % (factor * multiple) for side in sides):
      raise errors.UserError(
        f'SuperResolutionObjective.image_size={self.image_size} is not divisible by '
        f'{factor * multiple}: this {kind} enlarges inputs whose sides are multiples of {multiple} '
        f'by {factor}'
      )
    most = min(sides) // factor
    if self.crop is not None and (self.crop % multiple or not 0 < self.crop <= most):
      raise errors.UserError(
        f'SuperResolutionObjective.crop={self.crop} must be a multiple of {multiple}, as this '
        f'{kind} needs, and at most {most}'
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
  def input_size(self) -> image_sizes.ImageSize:
    """Height and width of the inputs, in pixels; one number for squares."""
    height, width = image_sizes.sides(self.image_size)
    return image_sizes.of_sides(height // self.model.factor, width // self.model.factor)

  @property
  def _target_size(self) -> image_sizes.ImageSize:
    """Height and width of the images that the losses compare, in pixels."""
    return self.image_size if self.crop is None else self.model.factor * self.crop

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    return adversarial.batch_dependent_terms(self.discriminator) if self.adversarial_weight else ()

  def feature_lengths(self) -> dict[str, Any]:
    return {'images': self.image_size}

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (batch_size, *image_sizes.sides(self.image_size), 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng: PRNGKeyArray) -> base.Params:
    """Returns random parameters; a discriminator's are the part 'discriminator'."""
    module = upscalers.module(self.model)
    params = module.init(rng, *upscalers.example_inputs(self.model))['params']
    if self.adversarial_weight:
      judge = discriminator_lib.Discriminator(self.discriminator)
      images = jnp.zeros((1, *image_sizes.sides(self._target_size), 3), jnp.float32)
      params = params | {'discriminator': judge.init(jax.random.fold_in(rng, 1), images)['params']}
    return params

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    return adversarial.other_optimizers(
      self.adversarial_weight, self.adversarial_from, self.discriminator_optimizer
    )

  def constants(self) -> dict[str, Any]:
    """Reads the parameters of the tokenizer, as 'tokenizer', and of LPIPS, as 'perceptual'.

    Raises:
      UserError: if the tokenizer can't be loaded or has images of another size; if a file of
        weights is not given, is missing or damaged.
    """
    found: dict[str, Any] = {}
    if self.tokenizer is not None:
      # First, because the config of one that is missing would be a plan's.
      found['tokenizer'] = self.frozen_tokenizer.params
      self._checked_config()
    if self.perceptual_weight:
      found['perceptual'] = lpips_weights.of_objective(self)
    return found

  def abstract_constants(self) -> dict[str, Any]:
    """Returns shapes and dtypes of `constants`, also for a tokenizer that isn't trained yet."""
    found: dict[str, Any] = {}
    if self.tokenizer is not None:
      found['tokenizer'] = frozen_tokenizer.planned_params(self._checked_config())
    if self.perceptual_weight:
      found['perceptual'] = lpips.abstract_params()
    return found

  def loss(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The sum of the network's loss and of the discriminator's.

    Args:
      params: the unboxed parameters, and `constants`.
      batch: 'images' uint8 [batch, height, width, 3] of `image_size`.
      dropout_keys: keys of the examples, for crops and for the choice of clean inputs.
      step: number of steps done before this one.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics', whose 'loss' is that of the network only.
    """
    assert dropout_keys is not None
    targets = pixels.from_bytes(batch['images'])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_keys.key, dropout_keys.rows)
    inputs = self._clean(targets)
    if self.tokenizer is not None:
      clean = jax.vmap(jax.random.uniform)(keys) < self.clean_share
      inputs = jnp.where(clean[:, None, None, None], inputs, self._reconstruct(params, inputs))
    if self.crop is not None:
      inputs, targets = jax.vmap(self._cropped)(keys, inputs, targets)
    outputs = self._enlarge(params, inputs)
    metrics = {
      'l2': jnp.mean(jnp.square(outputs - targets)),
      'l1': jnp.mean(jnp.abs(outputs - targets)),
    }
    if self.perceptual_weight:
      distances: Any = lpips.LPIPS().apply({'params': params['perceptual']}, targets, outputs)
      metrics['perceptual'] = jnp.mean(distances)
    loss = sum(getattr(self, f'{name}_weight') * value for name, value in metrics.items())
    metrics['psnr'] = jnp.mean(_psnr(targets, outputs))
    of_discriminator: Array | float = 0.0
    if self.adversarial_weight:
      of_network, of_discriminator, more = self._adversarial_losses(params, targets, outputs, step)
      loss, metrics = loss + of_network, metrics | more
    return loss + of_discriminator, {'metrics': metrics | {'loss': loss}}

  def _adversarial_losses(
    self,
    params: base.Params,
    targets: Float[Array, 'batch height width 3'],
    outputs: Float[Array, 'batch height width 3'],
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], Float[Array, ''], dict[str, Float[Array, '']]]:
    """Returns the weighted adversarial loss, the discriminator's loss, and metrics.

    The losses are 0 before the step `adversarial_from`.
    """
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

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the number of images in a batch."""
    return jnp.float32(len(batch['images']))

  def evaluate(self, params: base.Params, batch: base.Batch) -> dict[str, Float[Array, 'batch']]:
    """Computes the PSNR of each example in dB, and that of bicubic interpolation.

    Returns:
      'clean_psnr' and 'clean_bicubic_psnr' for averaged images; with a tokenizer also 'psnr' and
      'bicubic_psnr' for its reconstructions of them.
    """
    targets = pixels.from_bytes(batch['images'])
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

  def painter(self) -> base.Painter | None:
    """Returns a function that draws bicubic interpolations, the network's outputs, and the targets.

    Returns:
      A function of the parameters, a batch and `constants`, which returns
      {'enlarged': images [batch, height, 3 · width, 3]}; and `constants`.
    """

    def draw(
      params: base.Params, batch: base.Batch, constants: Any
    ) -> dict[str, UInt8[Array, 'batch height width 3']]:
      targets = pixels.from_bytes(batch['images'])
      inputs = self._clean(targets)
      if self.tokenizer is not None:
        inputs = self._reconstruct(constants, inputs)
      row = [
        super_resolution.enlarge(inputs, self.model.factor),
        self._enlarge(params, inputs),
        targets,
      ]
      return {'enlarged': pixels.to_bytes(jnp.clip(jnp.concatenate(row, axis=2), 0.0, 1.0))}

    return draw, self.constants()

  def step_flops(self, batch_size: int) -> int:
    """Returns a step's model FLOPs, without those of the tokenizer and of the R1 penalty."""
    inputs, size = image_sizes.sides(self.crop or self.input_size), self._target_size
    total = 3 * upscalers.forward_flops(self.model)(self.model, *inputs)
    if self.perceptual_weight:
      total += tokenizer_objective.PERCEPTUAL_PASSES * flops.vgg16_forward(size)
    if self.adversarial_weight:
      total += tokenizer_objective.ADVERSARIAL_PASSES * flops.discriminator_forward(
        self.discriminator, size
      )
    return batch_size * total

  def _clean(
    self, targets: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch input_height input_width 3']:
    """Averages images over squares of factor × factor pixels."""
    batch, height, width, channels = targets.shape
    factor = self.model.factor
    squares = targets.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return jnp.mean(squares, axis=(2, 4))

  def _checked_config(self) -> image_tokenizers.Config:
    """Returns the frozen tokenizer's config, after checking its image size."""
    size = self.tokenizer_config.image_size
    if size != self.input_size:
      raise errors.UserError(
        f'SuperResolutionObjective.image_size={self.image_size} is not '
        f'{type(self.model).__name__}.factor={self.model.factor} times the '
        f'{image_sizes.text(size)} pixels of the tokenizer in {self.tokenizer}'
      )
    return self.tokenizer_config

  def _reconstruct(
    self, constants: Mapping[str, Any], images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch height width 3']:
    """Returns the tokenizer's reconstructions of images, rounded to multiples of 1/255."""
    apply: Callable[..., Any] = image_tokenizers.module(self._checked_config()).apply
    params = constants['tokenizer']
    with pipeline_parallelism.off():
      tokens = apply({'params': params}, images, method='tokenize')
      reconstructions = apply({'params': params}, tokens, method='detokenize')
    return jax.lax.stop_gradient(jnp.round(reconstructions * 255.0) / 255.0)

  def _cropped(
    self,
    key: Key[Array, ''],
    image: Float[Array, 'height width 3'],
    target: Float[Array, 'target_height target_width 3'],
  ) -> tuple[Float[Array, 'crop crop 3'], Float[Array, 'target_crop target_crop 3']]:
    """Cuts the same random square out of an input and of its target."""
    assert self.crop is not None
    unit, factor, crop = self.model.multiple, self.model.factor, self.crop
    places = jnp.array([(side - crop) // unit + 1 for side in image.shape[:2]])
    corner = unit * jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, places)
    cut = lambda array, times: jax.lax.dynamic_slice(
      array, (times * corner[0], times * corner[1], 0), (times * crop, times * crop, 3)
    )
    return cut(image, 1), cut(target, factor)

  def _enlarge(
    self, params: base.Params, images: Float[Array, 'batch height width 3']
  ) -> Float[Array, 'batch target_height target_width 3']:
    others = ('tokenizer', 'perceptual', 'discriminator')
    own = {name: part for name, part in params.items() if name not in others}
    outputs: Any = upscalers.module(self.model).apply({'params': own}, images)
    return outputs


def _psnr(
  targets: Float[Array, 'batch height width 3'], outputs: Float[Array, 'batch height width 3']
) -> Float[Array, 'batch']:
  return tokenizer_objective.psnr(targets, jnp.clip(outputs, 0.0, 1.0))

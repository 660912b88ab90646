"""Training super-resolution on what the tokenizer makes of pictures (Parti, section 2.1)."""

from __future__ import annotations

import dataclasses
import functools

import gin
import jax
import jax.numpy as jnp
import numpy as np

from parti_jax import errors
from parti_jax.models import flops
from parti_jax.models import super_resolution
from parti_jax.models import vit_vqgan
from parti_jax.training import frozen_tokenizer
from parti_jax.training import tokenizer_stage


@gin.configurable
@dataclasses.dataclass(frozen=True)
class SuperResolutionStage:
  """Larger pictures from small ones: its inputs, losses and pictures.

  An input is a picture averaged over squares of factor × factor pixels, and then, but for a share
  of the examples, what a trained tokenizer makes of that. The target is the picture itself.

  Attributes:
    model: sizes of the network.
    image_size: height and width of the targets, in pixels.
    tokenizer: run of the image tokenizer (its --model_dir), whose pictures are as many times
      smaller; None to enlarge averaged pictures alone.
    clean_share: share of the examples that do not go through the tokenizer.
    crop: side of the random squares that are cut out of inputs, in pixels; None for whole ones.
    l2_weight: of the mean squared error (1.0 in ViT-VQGAN).
    l1_weight: of the mean absolute error (1.0 in WDSR, which has no other loss).
  """

  model: super_resolution.SuperResolutionConfig
  image_size: int
  tokenizer: str | None = None
  clean_share: float = 0.0
  crop: int | None = None
  l2_weight: float = 1.0
  l1_weight: float = 0.0

  name = 'super_resolution'
  frozen = ()
  compute_dtype = property(lambda self: self.model.compute_dtype)

  def __post_init__(self):
    unit = self.model.factor * self.model.unshuffle
    if self.image_size % unit:
      raise errors.UserError(
          f'SuperResolutionStage.image_size={self.image_size} is not divisible by {unit}, which is '
          'SuperResolutionConfig.factor · unshuffle')
    if not 0 <= self.clean_share <= 1:
      raise errors.UserError(
          f'SuperResolutionStage.clean_share={self.clean_share} must lie in [0, 1]')
    if self.crop is not None and (self.crop % self.model.unshuffle
                                  or not 0 < self.crop <= self.input_size):
      raise errors.UserError(
          f'SuperResolutionStage.crop={self.crop} must be a multiple of '
          f'SuperResolutionConfig.unshuffle={self.model.unshuffle}, at most {self.input_size}')

  @property
  def input_size(self) -> int:
    """Height and width of the inputs, in pixels."""
    return self.image_size // self.model.factor

  def feature_lengths(self) -> dict[str, int]:
    return {'images': self.image_size}

  def vocabulary_sizes(self) -> dict[str, tuple[str, int]]:
    """Pictures have no ids."""
    return {}

  def abstract_batch(self, batch_size: int):
    """Shapes and dtypes of a batch, as `loss` takes it."""
    shape = (batch_size, self.image_size, self.image_size, 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng):
    """Parameters with their logical axis names."""
    module = super_resolution.SuperResolution(self.model)
    return module.init(rng, *super_resolution.example_inputs(self.model))['params']

  def constants(self):
    """The tokenizer's parameters, as 'tokenizer'.

    Raises:
      UserError: if there is no run of a tokenizer, or it is of pictures of another size.
    """
    return {} if self.tokenizer is None else {'tokenizer': self._tokenizer[1]}

  def abstract_constants(self):
    """Shapes and dtypes of `constants`."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), self.constants())

  def initial_statistics(self):
    """Nothing is carried besides parameters."""
    return {}

  def loss(self, params, batch, dropout_keys, step):
    """The training loss.

    Args:
      params: of `init`, with `constants`.
      batch: {'images': uint8 [batch, image_size, image_size, 3]}.
      dropout_keys: layers.DropoutKeys, from which follow crops and who is spared the tokenizer.
      step: not used; the loss is the same at all steps.

    Returns:
      float32 [] and a dict with 'metrics' (scalars).
    """
    del step
    targets = _pixels(batch['images'])
    keys = jax.vmap(jax.random.fold_in, (None, 0))(dropout_keys.key, dropout_keys.rows)
    inputs = self._clean(targets)
    if self.tokenizer is not None:
      spared = jax.vmap(jax.random.uniform)(keys) < self.clean_share
      inputs = jnp.where(spared[:, None, None, None], inputs, self._reconstruct(params, inputs))
    if self.crop is not None:
      inputs, targets = jax.vmap(self._cropped)(keys, inputs, targets)
    outputs = self._enlarge(params, inputs)
    l2 = jnp.mean(jnp.square(outputs - targets))
    l1 = jnp.mean(jnp.abs(outputs - targets))
    metrics = {'l2': l2, 'l1': l1, 'psnr': jnp.mean(_psnr(targets, outputs))}
    return self.l2_weight * l2 + self.l1_weight * l1, {'metrics': metrics}

  def weight(self, batch):
    """What a batch counts in a mean over several: its pictures, float32 []."""
    return jnp.float32(len(batch['images']))

  def merge(self, aux):
    """Nothing is said besides metrics."""
    return aux

  def after_step(self, params, statistics, aux, step, rng):
    """Nothing to do after an update."""
    del aux, step, rng
    return params, statistics, {}

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
          targets, super_resolution.enlarge(pictures, self.model.factor))
    return measures

  def summarize(self, measures: dict[str, np.ndarray]) -> dict[str, float]:
    """Means over examples."""
    return {name: float(values.mean()) for name, values in measures.items()}

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
      row = [super_resolution.enlarge(inputs, self.model.factor), self._enlarge(params, inputs),
             targets]
      pixels = jnp.clip(jnp.concatenate(row, axis=2), 0.0, 1.0)
      return {'enlarged': jnp.round(pixels * 255.0).astype(jnp.uint8)}

    return draw, self.constants()

  def step_flops(self, batch_size: int) -> int:
    """Model FLOPs of a training step, without those of the tokenizer."""
    side = self.crop or self.input_size
    return 3 * batch_size * flops.super_resolution_forward(self.model, side, side)

  def _clean(self, targets):
    """[batch, factor · height, factor · width, 3] averaged over squares of factor × factor."""
    batch, height, width, channels = targets.shape
    factor = self.model.factor
    squares = targets.reshape(
        batch, height // factor, factor, width // factor, factor, channels)
    return jnp.mean(squares, axis=(2, 4))

  @functools.cached_property
  def _tokenizer(self):
    """The tokenizer's module and parameters, numpy arrays."""
    config, params = frozen_tokenizer.load(self.tokenizer)
    if config.image_size != self.input_size:
      raise errors.UserError(
          f'SuperResolutionStage.image_size={self.image_size} is not '
          f'SuperResolutionConfig.factor={self.model.factor} times the {config.image_size} pixels '
          f'of the tokenizer in {self.tokenizer}')
    return vit_vqgan.ViTVQGAN(config), jax.tree.map(np.asarray, params)

  def _reconstruct(self, constants, images):
    """What the tokenizer makes of pictures, rounded as pictures are stored."""
    module, params = self._tokenizer[0], constants['tokenizer']
    tokens = module.apply({'params': params}, images, method='tokenize')
    pixels = module.apply({'params': params}, tokens, method='detokenize')
    return jax.lax.stop_gradient(jnp.round(pixels * 255.0) / 255.0)

  def _cropped(self, key, image, target):
    """The same random square of an input and of its target."""
    unit, factor = self.model.unshuffle, self.model.factor
    places = (self.input_size - self.crop) // unit + 1
    corner = unit * jax.random.randint(jax.random.fold_in(key, 1), (2,), 0, places)
    cut = lambda pixels, times: jax.lax.dynamic_slice(
        pixels, (times * corner[0], times * corner[1], 0),
        (times * self.crop, times * self.crop, 3))
    return cut(image, 1), cut(target, factor)

  def _enlarge(self, params, images):
    params = {name: part for name, part in params.items() if name != 'tokenizer'}
    return super_resolution.SuperResolution(self.model).apply({'params': params}, images)


def _pixels(images):
  return images.astype(jnp.float32) / 255.0


def _psnr(targets, outputs):
  return tokenizer_stage.psnr(targets, jnp.clip(outputs, 0.0, 1.0))

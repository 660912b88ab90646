"""The objective of image tokenizers (ViT-VQGAN, section 3; Parti, section 2.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from jaxtyping import Float
from jaxtyping import Int
from jaxtyping import Num
from jaxtyping import PRNGKeyArray
from jaxtyping import Shaped
from jaxtyping import UInt8

from parti_jax.checkpoints import run_checkpoints
from parti_jax.core import errors
from parti_jax.core import fingerprints
from parti_jax.core import image_sizes
from parti_jax.models import config_checks
from parti_jax.models import discriminator as discriminator_lib
from parti_jax.models import flops
from parti_jax.models import image_tokenizers
from parti_jax.models import lpips
from parti_jax.models import pixels
from parti_jax.models import vit_vqgan
from parti_jax.models.nn import layers
from parti_jax.training import inputs as inputs_lib
from parti_jax.training import state as state_lib
from parti_jax.training.objectives import adversarial
from parti_jax.training.objectives import base
from parti_jax.training.objectives import frozen_tokenizer
from parti_jax.training.objectives import lpips_weights
from parti_jax.training.objectives import revival

# The parts of the tokenizer's parameters; the objective may add a discriminator. Some quantizers have
# no parameters.
PARTS = fingerprints.TOKENIZER_PARTS
# The cost of a step, in forward passes of one image. VGG16: both images forward, the reconstruction
# also backward to its pixels. The discriminator: both images forward and backward, the
# reconstruction also to its pixels.
PERCEPTUAL_PASSES = 3
ADVERSARIAL_PASSES = 7


def logit_laplace_loss(
  images: Float[Array, 'batch height width channels'],
  mean: Float[Array, 'batch height width channels'],
  log_scale: Float[Array, 'batch height width channels'],
  least_log_scale: float = -7.0,
) -> Float[Array, 'batch']:
  """Negative log likelihood of pixels under a logit-laplace distribution.

  Args:
    images: images in [0, 1].
    mean: mean μ of the logits.
    log_scale: logarithm of the distribution's scale b.
    least_log_scale: minimum of `log_scale`; smaller values are replaced by it.

  Returns:
    The mean over pixels of |logit(x) − μ| / b + log(2·b·x·(1 − x)), where x are the pixels mapped
    to [ε, 1 − ε] (DALL-E, arXiv 2102.12092, appendix A.3).
  """
  epsilon = vit_vqgan.LOGIT_LAPLACE_EPSILON
  x = (1.0 - 2.0 * epsilon) * images + epsilon
  log_scale = jnp.maximum(log_scale, least_log_scale)
  loss = (
    jnp.abs(jnp.log(x) - jnp.log1p(-x) - mean) * jnp.exp(-log_scale)
    + jnp.log(2.0 * x * (1.0 - x))
    + log_scale
  )
  return jnp.mean(loss, axis=(1, 2, 3))


def psnr(
  images: Float[Array, 'batch height width channels'],
  reconstructions: Float[Array, 'batch height width channels'],
) -> Float[Array, 'batch']:
  """Peak signal-to-noise ratio in dB of images in [0, 1]."""
  error = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
  return -10.0 * jnp.log10(jnp.maximum(error, 1e-10))


@config_checks.configurable
@dataclasses.dataclass(frozen=True)
class TokenizerObjective(base.Objective):
  """The image tokenizer's losses, code statistics and images.

  Attributes:
    model: config of the tokenizer, of a kind in `image_tokenizers.KINDS`.
    l2_weight: weight of the mean squared error (1.0 in ViT-VQGAN).
    coarse_l2_weight: weight of the mean squared error between images averaged over squares of 4×4
      pixels. It isn't in the papers. It keeps the colors of flat areas right in images where
      outlines dominate the l2 loss.
    logit_laplace_weight: weight of the logit-laplace loss (0.1 in ViT-VQGAN). It must be 0 if the
      network predicts pixels without a scale.
    least_log_scale: minimum of the logit-laplace distribution's log scale. If it is low and images
      have flat areas of one color, tiny errors there dominate the gradient.
    quantizer_weight: weight of the quantizer's loss.
    perceptual_weight: weight of LPIPS (0.1 in ViT-VQGAN); 0 to omit it, which needs no files.
    vgg16_weights: file of VGG16's weights for LPIPS (`parti_jax.importers.lpips_files`).
    lpips_weights: file of the linear layers of LPIPS.
    adversarial_weight: weight of the adversarial loss (0.1 in ViT-VQGAN); 0 for no discriminator.
    adversarial_adaptive: whether to multiply that weight by VQGAN's ratio of gradient norms
      (`adversarial.adaptive_weight`). Each microbatch has its own ratio.
    adversarial_from: the first step with an adversarial loss and training of the discriminator.
    discriminator: config of the discriminator.
    discriminator_optimizer: an optax transformation; None for Adam with a learning rate of 1e-4.
    r1_weight: γ of the discriminator's penalty γ/2 · R1 (10 in StyleGAN2).
    r1_every: steps between penalties; each penalty is multiplied by this number (lazy
      regularization, StyleGAN2, section 3.1).
    ema: decay of the moving average of parameters, which evaluation, images and exported models use
      (0.999 in ViT-VQGAN); 0 for no average. `state.update_average` computes it.
    quantize_from: the first step that quantizes. Before it, the decoder gets the latents, so that
      they are useful when the first codes are taken from them.
    revive_every: steps between revivals of dead codes (`revival.revive`); 0 for never. It must be 0 if the
      quantizer doesn't search a table for the nearest code.
    revive_until: no revivals from this step on, so that the codes converge.
    dead_below: a code is dead if its use per batch, averaged over about 50 steps, is below this.
    frozen: parts of the tokenizer that aren't trained. ('encoder', 'quantizer') is the second phase,
      in which the decoder learns better images for the same tokens (Parti, section 2.1).
    first_phase: model_dir of a tokenizer's run that a new run starts from, with its encoder and
      codebook, and with its decoder if the configs are the same. A larger decoder starts from
      random parameters (Parti, section 2.1).
  """

  model: image_tokenizers.TrainableConfig
  l2_weight: float = 1.0
  coarse_l2_weight: float = 0.0
  logit_laplace_weight: float = 0.1
  least_log_scale: float = -7.0
  quantizer_weight: float = 1.0
  perceptual_weight: float = 0.0
  vgg16_weights: str | None = None
  lpips_weights: str | None = None
  adversarial_weight: float = 0.0
  adversarial_adaptive: bool = False
  adversarial_from: int = 0
  discriminator: discriminator_lib.DiscriminatorConfig = discriminator_lib.DiscriminatorConfig()
  discriminator_optimizer: Any = None
  r1_weight: float = 10.0
  r1_every: int = 16
  ema: float = 0.0
  quantize_from: int = 0
  revive_every: int = 0
  revive_until: int = 0
  dead_below: float = 0.02
  frozen: tuple[str, ...] = ()
  first_phase: str | None = None

  def __post_init__(self) -> None:
    not_negative = dict.fromkeys(
      (
        'l2_weight',
        'coarse_l2_weight',
        'logit_laplace_weight',
        'quantizer_weight',
        'perceptual_weight',
        'adversarial_weight',
        'adversarial_from',
        'r1_weight',
        'quantize_from',
        'revive_every',
        'revive_until',
        'dead_below',
      ),
      (0, None),
    )
    config_checks.check_fields(self, **not_negative)
    self._check_model()
    unknown = set(self.frozen) - set(PARTS)
    if unknown:
      raise errors.UserError(
        f'TokenizerObjective.frozen: unknown parts {sorted(unknown)}; choose from '
        'encoder, quantizer and decoder'
      )
    if self.adversarial_weight:
      self.discriminator.sizes(self.model.image_size)
    if self.r1_every < 1:
      raise errors.UserError(f'TokenizerObjective.r1_every={self.r1_every} must be at least 1')
    if not 0 <= self.ema < 1:
      raise errors.UserError(f'TokenizerObjective.ema={self.ema} must be at least 0 and below 1')
    shorter = min(image_sizes.sides(self.model.image_size))
    if self.perceptual_weight and shorter < lpips.LEAST_SIZE:
      raise errors.UserError(
        f'TokenizerObjective.perceptual_weight: LPIPS needs images of at least '
        f'{lpips.LEAST_SIZE} pixels; '
        f'set it to 0 with {type(self.model).__name__}.image_size={self.model.image_size}'
      )

  def _check_model(self) -> None:
    """Raises UserError unless the model's kind can be trained with these settings."""
    try:
      training = image_tokenizers.training(self.model)
    except errors.UserError as error:
      raise errors.UserError(f'TokenizerObjective.model: {error}') from error
    kind = type(self.model).__name__
    if self.logit_laplace_weight and not self.model.predicts_scale:
      raise errors.UserError(
        f'TokenizerObjective.logit_laplace_weight={self.logit_laplace_weight}: this {kind} predicts '
        "pixels without a scale; set it to 0, or VQGANConfig.output to 'logit_laplace'"
      )
    if self.revive_every and self.model.code_distance is None:
      raise errors.UserError(
        f'TokenizerObjective.revive_every={self.revive_every}: the quantizer of this {kind} does '
        'not search a table for the nearest code, so no codes can be revived; set it to 0'
      )
    adaptive = self.adversarial_weight and self.adversarial_adaptive
    if adaptive and training.last_kernel_gradient is None:
      raise errors.UserError(
        f'TokenizerObjective.adversarial_adaptive: not supported for {kind}; set it to False'
      )

  name = 'tokenizer'

  @property
  def batch_dependent_terms(self) -> tuple[str, ...]:
    own = self.model.batch_dependent_terms if self.quantizer_weight else ()
    if not self.adversarial_weight:
      return own
    weight = ('adaptive weight of the adversarial loss',) if self.adversarial_adaptive else ()
    return (*own, *adversarial.batch_dependent_terms(self.discriminator), *weight)

  def feature_lengths(self) -> dict[str, Any]:
    return {'images': self.model.image_size}

  def abstract_batch(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    shape = (batch_size, *image_sizes.sides(self.model.image_size), 3)
    return {'images': jax.ShapeDtypeStruct(shape, jnp.uint8)}

  def init(self, rng: PRNGKeyArray) -> base.Params:
    """Returns random parameters: PARTS, and 'discriminator' if there is one."""
    module = image_tokenizers.module(self.model)
    images = image_tokenizers.example_inputs(self.model)
    params = module.init(rng, *images)['params']
    fingerprints.check_tokenizer_parts(params)
    if self.adversarial_weight:
      judge = discriminator_lib.Discriminator(self.discriminator)
      rng = jax.random.fold_in(rng, 1)
      params = params | {'discriminator': judge.init(rng, *images)['params']}
    return params

  def initial_parts(
    self, abstract_params: base.Params, inputs: inputs_lib.Inputs
  ) -> dict[str, Any]:
    """Reads the parts of the run `first_phase`, if it is set.

    Returns:
      {name of a part: its parameters on the mesh}.

    Raises:
      UserError: if there is no finished checkpoint, or its encoder or codebook has another config.
    """
    del inputs  # Images depend neither on a vocabulary nor on a tokenizer.
    if self.first_phase is None:
      return {}
    first = frozen_tokenizer.load(self.first_phase)
    theirs = run_checkpoints.description(self.name, first.config)
    ours = run_checkpoints.description(self.name, self.model)
    of_decoder = image_tokenizers.training(self.model).decoder_fields
    encoders = {name: value for name, value in ours['config'].items() if name not in of_decoder}
    run_checkpoints.check_same_model(
      f'TokenizerObjective.first_phase={self.first_phase}', theirs, ours | {'config': encoders}
    )
    same = all(theirs['config'][name] == ours['config'][name] for name in of_decoder)
    taken = [name for name in first.params if same or name != 'decoder']
    return run_checkpoints.put_like(
      {name: first.params[name] for name in taken}, {name: abstract_params[name] for name in taken}
    )

  def other_optimizers(self) -> dict[str, optax.GradientTransformation]:
    return adversarial.other_optimizers(
      self.adversarial_weight, self.adversarial_from, self.discriminator_optimizer
    )

  def constants(self) -> dict[str, Any]:
    """Reads the parameters of LPIPS, as 'perceptual'.

    Raises:
      UserError: if a file of weights is not given, is missing or damaged.
    """
    if not self.perceptual_weight:
      return {}
    return {'perceptual': lpips_weights.of_objective(self)}

  def abstract_constants(self) -> dict[str, Any]:
    """Returns shapes and dtypes of `constants`, without the files."""
    if not self.perceptual_weight:
      return {}
    return {'perceptual': lpips.abstract_params()}

  def initial_statistics(self) -> base.Statistics:
    """Returns the state, other than parameters, that is carried from step to step.

    Returns:
      'code_use', float32 [codebook]: use of each code per batch, averaged over steps. It starts at
      0, so that with revival the first codes are latents of the first batch that is quantized.
      With a discriminator, 'r1', float32 []: the last penalty. With `ema`, 'average', float32: the
      moving average of the tokenizer's parameters.
    """
    statistics: base.Statistics = {'code_use': jnp.zeros((self.model.codebook_size,), jnp.float32)}
    if self.adversarial_weight:
      statistics['r1'] = jnp.zeros((), jnp.float32)
    if self.ema:
      statistics['average'] = state_lib.initial_average(self.init, PARTS)
    return statistics

  def loss(
    self,
    params: base.Params,
    batch: base.Batch,
    dropout_keys: layers.DropoutKeys | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], dict[str, Any]]:
    """The sum of the tokenizer's loss and of the discriminator's.

    Args:
      params: the unboxed parameters, and `constants`.
      batch: 'images' uint8 [batch, height, width, 3].
      dropout_keys: not used; there is no dropout.
      step: number of steps done before this one.

    Returns:
      loss: the loss.
      aux: a dict with 'metrics', whose 'loss' is that of the tokenizer only, 'latents' [batch,
        tokens, code_dim] and 'code_use' [codebook].
    """
    del dropout_keys
    images = pixels.from_bytes(batch['images'])
    apply: Callable[..., Any] = image_tokenizers.module(self.model).apply
    out, sown = apply(
      {'params': params}, images, step >= self.quantize_from, mutable=['intermediates']
    )
    drawn = {name: out[name] for name in ('mean', 'log_scale', 'pixels') if name in out}
    quantizer_loss = jnp.where(step >= self.quantize_from, out['quantizer_loss'], 0.0)
    loss, metrics = self._reconstruction_loss(params, images, drawn)
    loss = loss + self.quantizer_weight * quantizer_loss
    metrics['quantizer_loss'] = out['quantizer_loss']
    of_discriminator: Array | float = 0.0
    if self.adversarial_weight:
      hidden = None
      if self.adversarial_adaptive:
        (hidden,) = sown['intermediates']['decoder']['last_hidden']
      of_tokenizer, of_discriminator, more = self._adversarial_losses(
        params, images, drawn, hidden, step
      )
      loss = loss + of_tokenizer
      metrics |= more
    return loss + of_discriminator, {
      'metrics': metrics | {'loss': loss},
      'latents': out['latents'],
      'code_use': self._count(out['tokens']),
    }

  def _reconstruction_loss(
    self,
    params: base.Params,
    images: Float[Array, 'batch height width 3'],
    drawn: Mapping[str, Float[Array, 'batch height width 3']],
  ) -> tuple[Float[Array, ''], dict[str, Float[Array, '']]]:
    """Returns the weighted sum of the losses of reconstructions, and metrics."""
    reconstructions = _pixels(drawn)
    metrics = {
      'l2': jnp.mean(jnp.square(reconstructions - images)),
      'coarse_l2': jnp.mean(jnp.square(_coarse(reconstructions) - _coarse(images))),
    }
    if 'log_scale' in drawn:
      metrics['logit_laplace'] = jnp.mean(
        logit_laplace_loss(images, drawn['mean'], drawn['log_scale'], self.least_log_scale)
      )
    if self.perceptual_weight:
      apply: Callable[..., Any] = lpips.LPIPS().apply
      metrics['perceptual'] = jnp.mean(
        apply({'params': params['perceptual']}, images, reconstructions)
      )
    loss = sum(getattr(self, f'{name}_weight') * value for name, value in metrics.items())
    return loss, metrics | {'psnr': jnp.mean(psnr(images, jnp.clip(reconstructions, 0.0, 1.0)))}

  def _adversarial_losses(
    self,
    params: base.Params,
    images: Float[Array, 'batch height width 3'],
    drawn: Mapping[str, Float[Array, 'batch height width 3']],
    hidden: Float[Array, 'batch *places embed'] | None,
    step: Int[Array, ''],
  ) -> tuple[Float[Array, ''], Float[Array, ''], dict[str, Float[Array, '']]]:
    """Returns the weighted adversarial loss, the discriminator's loss, and metrics.

    They are 0 before the step `adversarial_from`.
    """

    def losses():
      of_tokenizer, of_discriminator, metrics = adversarial.losses(
        self.discriminator, params['discriminator'], images, _pixels(drawn)
      )
      weight = self.adversarial_weight * (
        1.0 if hidden is None else self._adaptive_weight(params, images, drawn, hidden)
      )
      penalty = jax.lax.cond(
        step % self.r1_every == 0,
        lambda: adversarial.r1_penalty(self.discriminator, params['discriminator'], images),
        lambda: jnp.float32(0.0),
      )
      metrics |= {
        'adversarial': of_tokenizer,
        'adversarial_weight': jnp.float32(weight),
        'discriminator': of_discriminator,
        'r1': penalty,
      }
      of_discriminator = of_discriminator + 0.5 * self.r1_weight * self.r1_every * penalty
      return weight * of_tokenizer, of_discriminator, metrics

    if self.adversarial_from <= 0:
      return losses()
    zeros = lambda: jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(losses)
    )
    return jax.lax.cond(step >= self.adversarial_from, losses, zeros)

  def _adaptive_weight(
    self,
    params: base.Params,
    images: Float[Array, 'batch height width 3'],
    drawn: Mapping[str, Float[Array, 'batch height width 3']],
    hidden: Float[Array, 'batch *places embed'],
  ) -> Float[Array, '']:
    """Returns VQGAN's ratio of gradient norms at the decoder's last layer."""
    params, drawn, hidden = jax.lax.stop_gradient((params, drawn, hidden))
    rest = jax.grad(lambda drawn: self._reconstruction_loss(params, images, drawn)[0])(drawn)
    of_adversary = jax.grad(
      lambda drawn: adversarial.losses(
        self.discriminator, params['discriminator'], images, _pixels(drawn)
      )[0]
    )(drawn)
    of_kernel = image_tokenizers.training(self.model).last_kernel_gradient
    assert of_kernel is not None  # `_check_model` made sure of it.
    return adversarial.adaptive_weight(
      of_kernel(self.model, hidden, rest), of_kernel(self.model, hidden, of_adversary)
    )

  def weight(self, batch: base.Batch) -> Float[Array, '']:
    """Returns the number of images in a batch."""
    return jnp.float32(len(batch['images']))

  def merge(self, aux: dict[str, Any]) -> dict[str, Any]:
    # Microbatch k of n has the examples k, k + n, k + 2 · n ...; this restores their order.
    latents = aux['latents'].swapaxes(0, 1)
    return {
      'latents': latents.reshape((-1,) + latents.shape[2:]),
      'code_use': jnp.sum(aux['code_use'], axis=0),
    }

  def after_step(
    self,
    params: base.Params,
    statistics: base.Statistics,
    aux: dict[str, Any],
    step: Int[Array, ''],
    rng: PRNGKeyArray | None,
  ) -> tuple[base.Params, base.Statistics, dict[str, Float[Array, '']]]:
    """Revives dead codes, and updates the use of codes and the average of parameters."""
    use = 0.98 * statistics['code_use'] + 0.02 * aux['code_use']
    use = jnp.where(step > self.quantize_from, use, 0.0)
    dead = use < self.dead_below
    metrics = {
      'codes_alive': 1.0 - jnp.mean(dead),
      'codes_in_batch': jnp.mean(aux['code_use'] > 0),
      'code_perplexity': _perplexity(aux['code_use']),
    }
    revived = None
    if self.revive_every and 'quantizer' not in self.frozen:
      assert rng is not None
      since = step - self.quantize_from
      now = (since >= 0) & (since % self.revive_every == 0) & (step < self.revive_until)
      table = params['quantizer']['codebook']['table']
      distance = self.model.code_distance
      assert distance is not None  # `_check_model` made sure of it.
      table, use = jax.lax.cond(
        now,
        lambda: revival.revive(table, use, dead, aux['latents'], rng, distance),
        lambda: (table, use),
      )
      revived = jnp.any(table != params['quantizer']['codebook']['table'], axis=1)
      params = _with_table(params, table)
    statistics = statistics | {'code_use': use}
    if self.adversarial_weight:
      due = (step >= self.adversarial_from) & (step % self.r1_every == 0)
      statistics['r1'] = jnp.where(due, aux['metrics']['r1'], statistics['r1'])
      metrics['r1'] = statistics['r1']
    if self.ema:
      average = state_lib.update_average(statistics['average'], params, step, self.ema)
      if revived is not None:  # The averages of revived codes start again.
        old = average['quantizer']['codebook']['table']
        table = jnp.where(revived[:, None], params['quantizer']['codebook']['table'], old)
        average = _with_table(average, table)
      statistics['average'] = average
    return params, statistics, metrics

  def evaluate(
    self, params: base.Params, batch: base.Batch
  ) -> dict[str, Shaped[Array, 'batch ...']]:
    """Evaluates each example.

    Returns:
      'l2' and 'psnr', float32 [batch], and 'tokens', int32 [batch, tokens].
    """
    images = pixels.from_bytes(batch['images'])
    tokens, reconstructions = self._reconstruct(params, images)
    error = jnp.mean(jnp.square(images - reconstructions), axis=(1, 2, 3))
    return {'l2': error, 'psnr': psnr(images, reconstructions), 'tokens': tokens}

  def summarize(
    self, measures: Mapping[str, Shaped[np.ndarray, 'examples ...']]
  ) -> dict[str, float]:
    """Returns means over examples, the share of codes that they use, and the codes' perplexity."""
    counts = np.bincount(measures['tokens'].ravel(), minlength=self.model.codebook_size)
    return {
      'l2': float(measures['l2'].mean()),
      'psnr': float(measures['psnr'].mean()),
      'codes_used': float(np.mean(counts > 0)),
      'code_perplexity': float(_perplexity(counts.astype(np.float32))),
    }

  def painter(self) -> base.Painter | None:
    """Returns a function that draws each image and its reconstruction to the right.

    Returns:
      A function of the parameters, a batch and {}, which returns
      {'reconstructions': images [batch, height, 2 · width, 3]}; and {}.
    """

    def draw(
      params: base.Params, batch: base.Batch, nothing: Any
    ) -> dict[str, UInt8[Array, 'batch height width 3']]:
      del nothing
      images = pixels.from_bytes(batch['images'])
      _, reconstructions = self._reconstruct(params, images)
      pairs = jnp.concatenate([images, reconstructions], axis=2)
      return {'reconstructions': pixels.to_bytes(pairs)}

    return draw, {}

  def step_flops(self, batch_size: int) -> int:
    """Returns a step's model FLOPs, without those of the R1 penalty."""
    size = self.model.image_size
    total = 3 * image_tokenizers.training(self.model).forward_flops(self.model)
    if self.perceptual_weight:
      total += PERCEPTUAL_PASSES * flops.vgg16_forward(size)
    if self.adversarial_weight:
      total += ADVERSARIAL_PASSES * flops.discriminator_forward(self.discriminator, size)
    return batch_size * total

  def _reconstruct(
    self, params: base.Params, images: Float[Array, 'batch height width 3']
  ) -> tuple[Int[Array, 'batch tokens'], Float[Array, 'batch height width 3']]:
    apply: Callable[..., Any] = image_tokenizers.module(self.model).apply
    tokens = apply({'params': params}, images, method='tokenize')
    return tokens, apply({'params': params}, tokens, method='detokenize')

  def _count(self, tokens: Int[Array, 'batch tokens']) -> Float[Array, 'codebook']:
    return jnp.zeros((self.model.codebook_size,), jnp.float32).at[tokens.reshape(-1)].add(1.0)


def _pixels(
  drawn: Mapping[str, Float[Array, 'batch height width 3']],
) -> Float[Array, 'batch height width 3']:
  """Returns the reconstructions that a tokenizer's results describe, not clipped to [0, 1]."""
  return drawn['pixels'] if 'pixels' in drawn else vit_vqgan.to_pixels(drawn['mean'])


def _with_table(params: base.Params, table: Float[Array, 'codebook code_dim']) -> base.Params:
  """Returns the parameters with another table of codes."""
  codebook = params['quantizer']['codebook'] | {'table': table}
  return params | {'quantizer': params['quantizer'] | {'codebook': codebook}}


def _coarse(
  images: Float[Array, 'batch height width 3'],
) -> Float[Array, 'batch coarse_height coarse_width 3']:
  """Averages images over squares of 4×4 pixels."""
  return nn.avg_pool(images, (4, 4), (4, 4))


def _perplexity(use: Num[Array | np.ndarray, 'codebook']) -> Float[Array, '']:
  share = use / jnp.sum(use)
  return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0.0)))
